"""MACs and parameters of a network, as exact polynomials in channel counts.

`record` traces a network abstractly and lists the calls of its layers.
`groups.Table` says which channels each layer reads and makes, so the cost of
any narrower network is a small polynomial of degree two in the counts: exact
integers in microseconds, and no formula is kept by hand for any family.

Counting rules (those of the published implementation; one multiply-accumulate
is 1 MAC):

* convolution: kernel_h * kernel_w * C_in * C_out / groups per output position;
* transposed convolution: the same, for each input position;
* dense: inputs * outputs per position;
* other operations that multiply and accumulate (matrix products and
  convolutions in the model's own code): counted from the traced program, fixed;
* global average pooling: its input elements (modules that declare
  `macs_per_input = 1`; VGG's pooling does not);
* normalisation, activations, max pooling, additions: 0;
* parameters: kernels and biases, scale and bias of normalisation. Gates and
  running statistics are not parameters.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors

# Channels of the gated layers, in forward order.
Counts = Sequence[int] | np.ndarray

# A number of channels as an affine function of the counts: pairs (group,
# multiple) that are added up. Group FIXED stands for the number 1.
FIXED = -1
Size = tuple[tuple[int, int], ...]
Terms = dict[tuple[int, int], int]

MIXING = ('conv', 'dense')  # Kinds of layers that make channels of their own.


@dataclasses.dataclass(frozen=True)
class Layer:
  """One call of a layer, as a trace showed it.

  Attributes:
    path: Module path, joined by '/'.
    kind: 'conv', 'depthwise', 'dense', 'norm' or 'pool'; 'other' for what is
      counted but neither gated nor narrowed.
    inputs: Channels that go in.
    outputs: Channels that come out.
    positions: Output positions per image (1 for dense); for 'pool' the input
      positions.
    taps: Kernel positions (kernel_h * kernel_w; 1 for dense, norm, pool).
    groups: Feature groups of a convolution.
    vectors: Parameter vectors of `outputs` channels: a bias counts 1, a
      normalisation with scale and bias 2.
    output_size: Spatial output size, () where there is none.
    input_size: Spatial input size, () where there is none.
    kernel: Kernel size of a convolution.
    strides: Strides of a convolution.
    again: Whether an earlier call already had the parameters (a module that is
      called more than once).
    ndim: Rank of the input.
    obstacle: Why surgery cannot follow channels through it, '' if it can.
    dtype: Dtype of the parameters.
    low_precision: Whether it computes in fewer than 32 bits.
    transposed: Whether the kernel is [..., outputs, inputs].
    joint: Whether a normalisation has statistics over all channels.
    axis_name: The axis of devices that a BatchNorm averages over, '' if none.
    fixed_macs: Further MACs that no count changes.
    fixed_params: Further parameters that no count changes.
    reads: `inputs` as a function of the counts; fixed by default.
    makes: `outputs` as a function of the counts; fixed by default.
  """

  path: str
  kind: str
  inputs: int
  outputs: int
  positions: int
  taps: int = 1
  groups: int = 1
  vectors: int = 0
  output_size: tuple[int, ...] = ()
  input_size: tuple[int, ...] = ()
  kernel: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()
  again: bool = False
  ndim: int = 0
  obstacle: str = ''
  dtype: Any = np.float32
  low_precision: bool = False
  transposed: bool = False
  joint: bool = False
  axis_name: str = ''
  fixed_macs: int = 0
  fixed_params: int = 0
  reads: Size = ()
  makes: Size = ()

  def __post_init__(self):
    if not self.reads:
      object.__setattr__(self, 'reads', ((FIXED, self.inputs),))
    if not self.makes:
      object.__setattr__(self, 'makes', ((FIXED, self.outputs),))

  @property
  def multiplier(self) -> int:
    """Output channels of a depthwise convolution for each input channel."""
    return self.outputs // self.inputs if self.kind == 'depthwise' else 0

  def _kernel_terms(self) -> Terms:
    """Products inputs * outputs / groups as {(group, group): coefficient}."""
    if self.kind in ('norm', 'pool', 'other'):
      return {}
    if self.kind == 'depthwise':  # One filter per output channel.
      return {(i, FIXED): self.taps * a for i, a in self.makes}
    terms = collections.Counter()
    for i, a in self.reads:
      for j, b in self.makes:
        terms[min(i, j), max(i, j)] += self.taps * a * b // self.groups
    return terms

  def macs_terms(self) -> Terms:
    """MACs as {(group, group): coefficient}."""
    if self.kind == 'pool':
      return {(i, FIXED): a * self.positions for i, a in self.reads}
    terms = {k: v * self.positions for k, v in self._kernel_terms().items()}
    return {**terms, **_fixed(self.fixed_macs)}

  def params_terms(self) -> Terms:
    """Parameters as {(group, group): coefficient}."""
    if self.again:
      return {}
    terms = collections.Counter(self._kernel_terms())
    for i, a in self.makes:
      terms[i, FIXED] += self.vectors * a
    terms.update(_fixed(self.fixed_params))
    return terms

  def macs(self, counts: Sequence[int] = ()) -> int:
    """Multiply-accumulates of this call at the given counts."""
    return _value(self.macs_terms(), counts)

  def params(self, counts: Sequence[int] = ()) -> int:
    """Parameters that this call adds at the given counts."""
    return _value(self.params_terms(), counts)

  def channels(self, counts: Sequence[int]) -> tuple[int, int]:
    """(inputs, outputs) at the given counts."""
    return value(self.reads, counts), value(self.makes, counts)


def _fixed(number: int) -> Terms:
  return {(FIXED, FIXED): number} if number else {}


def value(size: Size, counts: Sequence[int]) -> int:
  """The number of channels that a size stands for at the given counts."""
  sized = [*counts, 1]
  return sum(multiple * int(sized[i]) for i, multiple in size)


def _value(terms: Terms, counts: Sequence[int]) -> int:
  sized = [*counts, 1]
  return sum(v * int(sized[i]) * int(sized[j]) for (i, j), v in terms.items())


# Recording.


def _tuple(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
  """What Flax takes as one number for all axes, as one number for each."""
  if value is None or isinstance(value, int):
    return (value or 1,) * rank
  return tuple(value)


def describe_convolution(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a convolution's record."""
  kernel = module.kernel_size
  kernel = (kernel,) if isinstance(kernel, int) else tuple(kernel)
  groups = getattr(module, 'feature_group_count', 1)
  depthwise = groups > 1 and groups == x.shape[-1]
  space = y.shape[-1 - len(kernel) : -1]
  return {
    'kind': 'depthwise' if depthwise else 'conv',
    'obstacle': '' if depthwise or groups == 1 else 'a grouped convolution',
    'positions': math.prod(space),
    'taps': math.prod(kernel),
    'groups': groups,
    'vectors': _vectors(module, y.shape[-1]),
    'output_size': space,
    'input_size': x.shape[-1 - len(kernel) : -1],
    'kernel': kernel,
    'strides': _tuple(getattr(module, 'strides', 1), len(kernel)),
  }


def _transposed(module: nn.ConvTranspose, x, y) -> dict[str, Any]:
  fields = describe_convolution(module, x, y)
  fields['positions'] = math.prod(fields['input_size'])
  # Timed as a convolution with as many operations.
  fields['strides'] = (1,) * len(fields['kernel'])
  return {**fields, 'transposed': module.transpose_kernel}


def describe_dense(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a dense layer's record."""
  del x
  space = y.shape[1:-1]  # On a feature map it is applied at each position.
  return {
    'kind': 'dense',
    'positions': math.prod(space),
    'vectors': _vectors(module, y.shape[-1]),
    'output_size': space,
  }


def describe_norm(module: Any, x: Any, y: Any) -> dict[str, Any]:
  """The fields of a normalisation's record."""
  channels, obstacle, joint = x.shape[-1], '', False
  axes = getattr(module, 'axis', getattr(module, 'feature_axes', -1))
  axes = [a % x.ndim for a in (axes if isinstance(axes, Sequence) else [axes])]
  if axes != [x.ndim - 1]:
    obstacle = 'its channels are not on the last axis'
  elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
    joint = True
  elif isinstance(module, nn.GroupNorm):
    size = module.group_size or channels // (module.num_groups or 1)
    if size != 1:
      obstacle = f'it normalises {size} neighbouring channels together'
  return {
    'kind': 'norm',
    'obstacle': obstacle,
    'joint': joint,
    'groups': getattr(module, 'num_groups', None) or 1,
    'positions': math.prod(y.shape[1:-1]),
    'vectors': _vectors(module, y.shape[-1]),
  }


def _vectors(module: nn.Module, channels: int) -> int:
  """How many parameters of a bound layer are vectors over its channels."""
  params = module.variables.get('params', {})
  return sum(leaf.shape == (channels,) for leaf in jax.tree.leaves(params))


def _pool(module: nn.Module, x, y) -> dict[str, Any]:
  del module, y
  return {'kind': 'pool', 'positions': math.prod(x.shape[1:-1])}


# Classes that are layers, and how to describe them. The first that fits counts.
_RULES: dict[type, Callable[..., dict[str, Any]]] = {
  nn.ConvTranspose: _transposed,
  nn.Conv: describe_convolution,
  nn.Dense: describe_dense,
  nn.BatchNorm: describe_norm,
  nn.LayerNorm: describe_norm,
  nn.RMSNorm: describe_norm,
  nn.InstanceNorm: describe_norm,
  nn.GroupNorm: describe_norm,
}


def register_norm(cls: type[nn.Module]) -> None:
  """Makes a class of the user's own known as a BatchNorm.

  Subclasses of Flax's normalisations, and classes that call them, are known
  without it. The class must treat each channel of the last axis alone and have
  its parameters and statistics as vectors [C] of its own.
  """
  register(cls, describe_norm)


def register_conv(cls: type[nn.Module]) -> None:
  """Makes a class of the user's own known as a convolution.

  Subclasses of `nn.Conv`, and classes that call it, are known without it. The
  class needs the fields `features` (the number of outputs, which narrowing
  sets) and `kernel_size`, and a kernel [..., inputs, outputs].

  Raises:
    errors.UserError: A field is missing.
  """
  fields = {f.name for f in dataclasses.fields(cls)}
  missing = {'features', 'kernel_size'} - fields
  if missing:
    raise errors.UserError(
      f'{cls.__name__} must have the fields features and kernel_size to be a '
      f'convolution; it has no {" and no ".join(sorted(missing))}.'
    )
  register(cls, describe_convolution)


def register(
  cls: type[nn.Module], rule: Callable[[Any, Any, Any], dict[str, Any]]
) -> None:
  """Makes a class known as a layer.

  Args:
    cls: A class of Linen modules.
    rule: (module, x, y) -> the fields of `Layer` that describe y = module(x).

  Raises:
    errors.UserError: It is no such class.
  """
  if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
    raise errors.UserError(f'{cls!r} must be a class of flax.linen.Module.')
  _RULES[cls] = rule


def _rule(module: nn.Module) -> Callable[..., dict[str, Any]] | None:
  """How to describe a call of this module, None if it is no layer."""
  for cls in reversed(_RULES):  # Those of the user come first.
    if isinstance(module, cls):
      return _RULES[cls]
  if isinstance(module, nn.DenseGeneral):
    plain = isinstance(module.features, int) and not module.batch_dims
    return describe_dense if plain and module.axis in (-1, (-1,)) else None
  return _pool if getattr(type(module), 'macs_per_input', 0) else None


def is_pool(module: nn.Module) -> bool:
  """Whether it counts its inputs as MACs, and does nothing else of note."""
  return _rule(module) is _pool


def describe(module: nn.Module, path: str, x: Any, y: Any) -> Layer:
  """The record of one call of a layer, y = module(x)."""
  fields = {
    'path': path,
    'inputs': x.shape[-1],
    'outputs': y.shape[-1],
    'ndim': x.ndim,
    'dtype': getattr(module, 'param_dtype', np.float32),
    'low_precision': y.dtype.itemsize < 4,
  }
  rule = _rule(module)
  assert rule is not None, path
  return Layer(**{**fields, **rule(module, x, y)})


def intercept(
  around: Callable[[nn.Module, str, Any, Callable[[Any], Any]], Any],
  base: int = 0,
) -> Callable[..., Any]:
  """A Flax interceptor that hands each outermost layer call to `around`.

  A subclass that calls `super().__call__` is one call, not two.

  Args:
    around: (module, path, x, call: x -> y) -> y.
    base: Components that paths leave out at their start.
  """
  active = set()

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or _rule(module) is None:
      return next_fun(*args, **kwargs)
    path = '/'.join(module.path[base:])
    if path in active:
      return next_fun(*args, **kwargs)
    name = 'inputs' if 'inputs' in kwargs else 'x'
    x = args[0] if args else kwargs[name]

    def call(x):
      if args:
        return next_fun(x, *args[1:], **kwargs)
      return next_fun(**{**kwargs, name: x})

    active.add(path)
    try:
      return around(module, path, x, call)
    finally:
      active.discard(path)

  return interceptor


def record(function: Callable[..., Any], *args: Any) -> list[Layer]:
  """The layer calls of `function(*args)`, in forward order.

  `function` is traced abstractly (`jax.eval_shape`): nothing is computed and no
  memory is used. Typically `function` is `module.init` partially applied.
  """
  found, seen = [], set()

  def around(module, path, x, call):
    y = call(x)
    layer = describe(module, path, x, y)
    found.append(dataclasses.replace(layer, again=path in seen))
    seen.add(path)
    return y

  def traced(*args):
    with nn.intercept_methods(intercept(around)):
      return function(*args)

  jax.eval_shape(traced, *args)
  return found


def record_model(module: nn.Module, x: Any, *args: Any) -> list[Layer]:
  """The layer calls of `module(x, *args)`.

  Args:
    module: A Linen module.
    x: Images [N, H, W, C] or their `jax.ShapeDtypeStruct`.
    *args: Further arguments of the module.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  x = jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
  return record(module.init, key, x, *args)


def record_module(module: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
  """The layer calls of a module on one image [H, W, C]."""
  return record_model(
    module, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
  )


def count(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
  """(MACs, parameters) of a built module on one image [H, W, C].

  >>> count(nn.Conv(5, (3, 3)), (8, 8, 2))
  (5760, 95)
  """
  found = record_module(module, input_shape)
  return sum(c.macs() for c in found), sum(c.params() for c in found)


# The model.


class _Polynomial:
  """Sum of coefficient * c[i] * c[j] with exact integers."""

  def __init__(self, parts: Iterable[Terms]):
    terms = collections.Counter()
    for part in parts:
      terms.update(part)
    items = sorted(terms.items())
    self._i = np.array([i for (i, _), _ in items], np.int64)
    self._j = np.array([j for (_, j), _ in items], np.int64)
    self._coefficient = np.array([v for _, v in items], np.int64)

  def __call__(self, counts: np.ndarray) -> int:
    sized = np.append(counts, 1)  # Index FIXED = -1 reads the 1.
    return int(self._coefficient @ (sized[self._i] * sized[self._j]))


class CostModel:
  """MACs and parameters as functions of the counts of the channel groups.

  Attributes:
    layers: Names of the groups (the gated layers), in forward order.
    widths: Their channels in the searched network, the most that can be kept.
    ops: The calls of layers that cost something, in forward order.
  """

  def __init__(
    self, layers: Sequence[str], widths: Sequence[int], ops: Sequence[Layer]
  ):
    self.layers = tuple(layers)
    self.widths = tuple(int(w) for w in widths)
    self.ops = tuple(ops)
    self._macs = _Polynomial(op.macs_terms() for op in self.ops)
    self._params = _Polynomial(op.params_terms() for op in self.ops)

  def _checked(self, counts: Counts) -> np.ndarray:
    array = np.asarray(counts)
    if array.shape != (len(self.layers),):
      raise ValueError(
        f'counts must hold one number for each of the {len(self.layers)} gated '
        f'layers; got shape {array.shape}.'
      )
    return array.astype(np.int64)

  def macs(self, counts: Counts) -> int:
    """Multiply-accumulates of one image at these counts, exact."""
    return self._macs(self._checked(counts))

  def params(self, counts: Counts) -> int:
    """Parameters at these counts, exact."""
    return self._params(self._checked(counts))
