"""ONNX: the traced program, operator by operator.

The forward pass is traced with a symbolic batch size. Calls in it are inlined,
values that depend on no image are computed at once, and each operator that
remains becomes one of ONNX. This works for any module whose operators are in
`operators.TABLE`. Any other operator is refused, and the error names it.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors, jaxprs
from pfs_jax.export import operators, stablehlo
from pfs_jax.export.graph import INPUT, Graph
from pfs_jax.export.operators import Refused, Tensor

FILE = 'model.onnx'
PLATFORMS = ('any ONNX runtime with opset 17',)
PACKAGES = ('onnx', 'onnxruntime')
# If no image is involved, NumPy computes these; JAX would compile each shape.
_NUMPY: dict[str, Callable[..., Any]] = {
  'add': np.add,
  'sub': np.subtract,
  'mul': np.multiply,
  'max': np.maximum,
  'min': np.minimum,
  'sqrt': np.sqrt,
  'rsqrt': lambda x: 1 / np.sqrt(x),
  'convert_element_type': lambda x: x,
}


def write(
  folder: pathlib.Path,
  module: Any,
  variables: Mapping[str, Any],
  shape: tuple[int, int, int],
  facts: Mapping[str, str] | None = None,
) -> None:
  """Writes `module.apply(variables, x)` as operators of ONNX, and the facts.

  Raises:
    errors.UserError: The module uses an operator that is not known here.
  """
  variables = jax.tree.map(np.asarray, variables)
  images = stablehlo.images(shape)
  traced = jax.make_jaxpr(lambda x: module.apply(variables, x))(images)
  graph = Graph()
  results = _walk(graph, traced, [Tensor(INPUT, (0, 1, 2, 3))])
  if len(results) != 1 or not isinstance(results[0], Tensor):
    raise errors.UserError(
      'the model must return one array, the logits, to be written as ONNX.'
    )
  graph.finish(operators.in_order(graph, results[0], (0, 1)))
  classes = traced.out_avals[0].shape[1]
  graph.write(folder / FILE, shape, classes, facts or {})


def read(
  folder: pathlib.Path, shape: tuple[int, ...], factory: str = ''
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
  """(the graph in onnxruntime on the CPU, the name of its network).

  Raises:
    errors.UserError: The graph refers to other files, or takes other images.
  """
  import onnx
  import onnxruntime

  del factory
  content = (folder / FILE).read_bytes()
  if _is_external(onnx.load_model_from_string(content)):
    raise errors.UserError(f'{FILE} refers to other files: not allowed.')
  session = onnxruntime.InferenceSession(
    content, providers=['CPUExecutionProvider']
  )
  if [image.shape[1:] for image in session.get_inputs()] != [list(shape)]:
    raise errors.UserError(f'{FILE} takes other images than {list(shape)}.')
  facts = session.get_modelmeta().custom_metadata_map
  return lambda x: session.run(None, {INPUT: x})[0], facts.get('network', '')


def _is_external(message: Any) -> bool:
  """Whether a tensor at any depth of a message lies in another file."""
  if getattr(message, 'external_data', ()):
    return True
  for field, value in message.ListFields():
    parts = [value] if hasattr(value, 'ListFields') else value
    if field.message_type and any(map(_is_external, parts)):
      return True
  return False


def _walk(graph: Graph, program: Any, arguments: Sequence[Any]) -> list[Any]:
  """Writes the equations of a jaxpr; values are Tensors or NumPy arrays."""

  def results(equation, inputs):
    inputs = [
      x if isinstance(x, Tensor) else np.asarray(x, v.aval.dtype)
      for x, v in zip(inputs, equation.invars, strict=True)
    ]
    try:
      return _write(graph, equation, inputs)
    except Refused as e:
      name, where = equation.primitive.name, equation.source_info.name_stack
      place = f' in {where}' if str(where) else ''
      known = sorted({*operators.TABLE, *jaxprs.CALLS})
      raise errors.UserError(
        f'ONNX: the operator {name}{place} cannot be written{e}. Leave onnx '
        f'out of the formats (--formats).\nKnown: {", ".join(known)}.'
      ) from e

  return jaxprs.walk(program, arguments, results, np.asarray)


def _write(graph: Graph, equation, inputs) -> Sequence[Any]:
  """The results of one equation."""
  name, params = equation.primitive.name, equation.params
  if name == 'platform_index':  # The branch for all platforms is written.
    operators.refuse(
      None not in params['platforms'], 'without a branch for all platforms'
    )
    return [np.int32(params['platforms'].index(None))]
  if name == 'cond' and not isinstance(inputs[0], Tensor):
    last = len(params['branches']) - 1
    chosen = params['branches'][int(np.clip(inputs[0], 0, last))]
    return _walk(graph, chosen, inputs[1:])
  inner = jaxprs.called(equation)
  if inner is not None:
    return _walk(graph, inner, inputs)
  sizes = [size for v in equation.outvars for size in v.aval.shape]
  static = all(isinstance(size, int) for size in sizes)
  if static and not any(isinstance(x, Tensor) for x in inputs):
    return _computed(equation, inputs)
  indexed = '(indexing such as x[:, ::2]; jax.lax.slice can)'
  operators.refuse(name == 'gather', indexed)
  if name not in operators.TABLE:
    raise Refused
  found = operators.TABLE[name](graph, equation, *inputs)
  return found if equation.primitive.multiple_results else [found]


def _computed(equation, inputs) -> list[np.ndarray]:
  """The results of an equation without images, computed now."""
  name, aval = equation.primitive.name, equation.outvars[0].aval
  if name in _NUMPY:
    return [np.asarray(_NUMPY[name](*inputs), aval.dtype)]
  if name == 'reshape':
    return [np.reshape(inputs[0], aval.shape)]
  if name == 'broadcast_in_dim':
    placed = operators.placed_shape(inputs[0].shape, equation)
    return [np.broadcast_to(np.reshape(inputs[0], placed), aval.shape)]
  arrays = map(jnp.asarray, inputs)
  try:
    found = equation.primitive.bind(*arrays, **equation.params)
  except NotImplementedError as e:  # The batch size is a symbol.
    raise Refused from e
  found = found if equation.primitive.multiple_results else [found]
  return [np.asarray(x) for x in found]
