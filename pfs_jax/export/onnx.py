"""ONNX: the traced program, operator by operator.

The forward pass is traced with a symbolic batch size, calls in it are inlined,
what depends on no image is computed here and now, and each operator that is
left becomes one of ONNX. So this knows no family: any module can be written
whose operators are in `operators`; another operator is refused by its name.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors, jaxprs
from pfs_jax.export import graph as graphs
from pfs_jax.export import operators, stablehlo
from pfs_jax.export.operators import Refused, Tensor

FILE = 'model.onnx'
PLATFORMS = ('any ONNX runtime with opset 17',)
PACKAGES = ('onnx', 'onnxruntime')


def write(
  folder: pathlib.Path,
  module: Any,
  variables: Mapping[str, Any],
  shape: tuple[int, int, int],
  facts: Mapping[str, str] | None = None,
) -> None:
  """Writes `module.apply(variables, x)` as operators of ONNX.

  Args:
    folder: Gets the file.
    module: Anything with `apply(variables, images) -> logits`.
    variables: Its collections.
    shape: (H, W, C) of the images.
    facts: Metadata of the file.

  Raises:
    errors.UserError: It uses an operator that is not known here.
  """
  variables = jax.tree.map(np.asarray, variables)
  images = stablehlo.images(shape)
  traced = jax.make_jaxpr(lambda x: module.apply(variables, x))(images)
  graph = graphs.Graph()
  start = Tensor(graphs.INPUT, (0, 1, 2, 3))
  results = _walk(graph, traced, [start])
  if len(results) != 1 or not isinstance(results[0], Tensor):
    raise errors.UserError(
      'the model must return one array, the logits, to be written as ONNX.'
    )
  graph.finish(operators.in_order(graph, results[0], (0, 1)))
  classes = traced.out_avals[0].shape[1]
  graph.write(folder / FILE, shape, classes, facts or {})


def read(
  folder: pathlib.Path, shape: tuple[int, ...], factory: str = ''
) -> Callable[[np.ndarray], np.ndarray]:
  """The graph in onnxruntime, on the CPU; it needs no factory.

  It is read from memory, so that it cannot ask for files outside of the folder.
  """
  import onnxruntime

  del shape, factory
  session = onnxruntime.InferenceSession(
    (folder / FILE).read_bytes(), providers=['CPUExecutionProvider']
  )
  return lambda x: session.run(None, {graphs.INPUT: x})[0]


def _walk(graph: graphs.Graph, program: Any, arguments: Sequence[Any]):
  """Writes the equations of a jaxpr; values are Tensors or NumPy arrays."""

  def results(equation, inputs):
    inputs = [
      x if isinstance(x, Tensor) else np.asarray(x, v.aval.dtype)
      for x, v in zip(inputs, equation.invars, strict=True)
    ]
    try:
      return _write(graph, equation, inputs)
    except Refused as e:
      raise _refusal(equation, str(e)) from e

  return jaxprs.walk(program, arguments, results, np.asarray)


def _refusal(equation, why: str) -> errors.UserError:
  name, where = equation.primitive.name, str(equation.source_info.name_stack)
  known = {*operators.HANDLERS, *operators.ELEMENTWISE, *jaxprs.CALLS}
  place = f' in {where}' if where else ''
  return errors.UserError(
    f'ONNX: the operator {name}{place} cannot be written{why}. Leave onnx out '
    f'of the formats.\nKnown: {", ".join(sorted(known))}.'
  )


def _write(graph: graphs.Graph, equation, inputs) -> Sequence[Any]:
  """The results of one equation."""
  name = equation.primitive.name
  if name == 'platform_index':  # The branch of accelerators is not for CPUs.
    if None not in equation.params['platforms']:
      raise Refused(' without a branch for all platforms')
    return [np.int32(equation.params['platforms'].index(None))]
  if name == 'cond' and not isinstance(inputs[0], Tensor):
    branches = equation.params['branches']
    chosen = branches[int(np.clip(inputs[0], 0, len(branches) - 1))]
    return _walk(graph, chosen, inputs[1:])
  inner = jaxprs.called(equation)
  if inner is not None:
    return _walk(graph, inner, inputs)
  if not any(isinstance(x, Tensor) for x in inputs) and _is_static(equation):
    return _computed(equation, inputs)
  if name in operators.ELEMENTWISE:
    how = operators.ELEMENTWISE[name]
    return [operators.elementwise(graph, how, inputs)]
  if name == 'gather':
    raise Refused(' (indexing such as x[:, ::2]; jax.lax.slice can)')
  if name not in operators.HANDLERS:
    raise Refused('')
  return [operators.HANDLERS[name](graph, equation, *inputs)]


def _is_static(equation) -> bool:
  return all(
    isinstance(size, int) for v in equation.outvars for size in v.aval.shape
  )


def _computed(equation, inputs) -> list[np.ndarray]:
  """The results of an equation without images, computed now.

  With NumPy where that is simple: JAX would compile for each shape.
  """
  name, aval = equation.primitive.name, equation.outvars[0].aval
  if name in operators.NUMPY:
    return [np.asarray(operators.NUMPY[name](*inputs), aval.dtype)]
  if name == 'reshape':
    return [np.reshape(inputs[0], aval.shape)]
  if name == 'broadcast_in_dim':
    placed = operators.placed_shape(inputs[0].shape, equation)
    return [np.broadcast_to(np.reshape(inputs[0], placed), aval.shape)]
  try:
    found = equation.primitive.bind(
      *map(jnp.asarray, inputs), **equation.params
    )
  except NotImplementedError as e:  # It depends on the batch size.
    raise Refused('') from e
  found = found if equation.primitive.multiple_results else [found]
  return [np.asarray(x) for x in found]
