"""MACs and parameters of a network, as exact polynomials in channel counts.

`record` traces a network abstractly and lists the calls of its layers.
`groups.Table` says which channels each layer reads and makes, so the cost of
any narrower network is a small polynomial of degree two in the counts. It is
exact, takes microseconds, and needs no formula for each family.

Counting rules (those of the published implementation; one multiply-accumulate
is 1 MAC):

* convolution: kernel_h * kernel_w * C_in * C_out / groups per output position;
* transposed convolution: the same, for each input position;
* dense: inputs * outputs per position;
* other operations that multiply and accumulate (matrix products and
  convolutions in the model's own code): a fixed number from the traced program;
* global average pooling: its input elements (modules that declare
  `macs_per_input = 1`; VGG's pooling does not);
* normalisation, activations, max pooling, additions: 0;
* parameters: kernels and biases, scale and bias of normalisation. Gates and
  running statistics are not parameters.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import described, errors

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
  """One call of a layer, as recorded in a trace.

  `reads` and `makes` are `inputs` and `outputs` as functions of the counts. For
  'dense', `positions` is 1 on vectors; for 'pool' it counts input positions.
  """

  path: str  # Module path, joined by '/'.
  kind: str  # 'conv', 'depthwise', 'dense', 'norm', 'pool' or 'other'.
  inputs: int  # Channels that go in.
  outputs: int  # Channels that come out.
  positions: int  # Output positions for each image.
  groups: int = 1  # Feature groups of a convolution.
  folded: int = 1  # Inputs for each image: windows, frames, rows.
  vectors: int = 0  # Parameter vectors of `outputs` channels, such as a bias.
  output_size: tuple[int, ...] = ()  # Spatial, like the next three.
  input_size: tuple[int, ...] = ()
  kernel: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()
  again: bool = False  # Whether an earlier call used the same parameters.
  ndim: int = 0  # Rank of the input.
  obstacle: str = ''  # Why surgery cannot follow channels through it.
  dtype: Any = np.float32  # Dtype of the parameters.
  low_precision: bool = False  # Whether it computes in fewer than 32 bits.
  transposed: bool = False  # Whether the kernel is [..., outputs, inputs].
  joint: bool = False  # Whether it normalises over all channels together.
  axis_name: str = ''  # The axis of devices that a BatchNorm averages over.
  fixed_macs: int = 0  # Further MACs that no count changes.
  fixed_params: int = 0  # Further parameters that no count changes.
  reads: Size = ()
  makes: Size = ()

  def __post_init__(self):
    if not self.reads:
      object.__setattr__(self, 'reads', ((FIXED, self.inputs),))
    if not self.makes:
      object.__setattr__(self, 'makes', ((FIXED, self.outputs),))

  def resized(self, inputs: int, outputs: int) -> Self:
    """The same call with other widths, which are fixed."""
    return dataclasses.replace(
      self, inputs=inputs, outputs=outputs, reads=(), makes=()
    )

  @property
  def multiplier(self) -> int:
    """Output channels of a depthwise convolution for each input channel."""
    return self.outputs // self.inputs if self.kind == 'depthwise' else 0

  def _kernel_terms(self) -> Terms:
    """Products inputs * outputs / groups as {(group, group): coefficient}."""
    terms = collections.Counter()
    taps = math.prod(self.kernel)
    if self.kind == 'depthwise':  # One filter per output channel.
      terms.update({(i, FIXED): taps * a for i, a in self.makes})
    elif self.kind in MIXING:
      for i, a in self.reads:
        for j, b in self.makes:
          terms[min(i, j), max(i, j)] += taps * a * b // self.groups
    return terms

  def macs_terms(self) -> Terms:
    """MACs as {(group, group): coefficient}."""
    positions = self.positions * self.folded
    if self.kind == 'pool':
      return {(i, FIXED): a * positions for i, a in self.reads}
    terms = self._kernel_terms()
    terms = collections.Counter({k: n * positions for k, n in terms.items()})
    terms[FIXED, FIXED] += self.fixed_macs
    return terms

  def params_terms(self) -> Terms:
    """Parameters as {(group, group): coefficient}."""
    if self.again:
      return {}
    terms = collections.Counter(self._kernel_terms())
    for i, a in self.makes:
      terms[i, FIXED] += self.vectors * a
    terms[FIXED, FIXED] += self.fixed_params
    return terms

  def macs(self, counts: Counts = ()) -> int:
    """Multiply-accumulates of this call at the given counts."""
    return _evaluated(self.macs_terms(), counts)

  def params(self, counts: Counts = ()) -> int:
    """Parameters that this call adds at the given counts."""
    return _evaluated(self.params_terms(), counts)

  def channels(self, counts: Counts) -> tuple[int, int]:
    """(inputs, outputs) at the given counts."""
    return value(self.reads, counts), value(self.makes, counts)


def value(size: Size, counts: Counts) -> int:
  """The number of channels that a size stands for at the given counts."""
  sized = [*counts, 1]
  return sum(multiple * int(sized[i]) for i, multiple in size)


def describe(
  module: Any, path: str, x: Any, y: Any, earlier: Sequence[Layer], images: int
) -> Layer:
  """The record of one call of a layer, y = module(x), on a batch of images."""
  rule = described.rule(module)
  assert rule is not None, path
  if 0 in y.shape:
    raise errors.UserError(
      f'{path} has no pixels left: its output is {y.shape[1:-1]}. Give larger '
      'images.'
    )
  fields = {
    'path': path,
    'inputs': x.shape[-1],
    'outputs': y.shape[-1],
    'ndim': x.ndim,
    'dtype': getattr(module, 'param_dtype', np.float32),
    'low_precision': y.dtype.itemsize < 4,
    'again': any(call.path == path for call in earlier),
    **rule(module, x, y),
  }
  size = images * math.prod(fields.get('input_size') or x.shape[1:-1])
  return Layer(**fields, folded=max(1, math.prod(x.shape[:-1]) // size))


def intercept(
  around: Callable[[nn.Module, str, Any, Callable[[Any], Any]], Any],
  base: int = 0,
) -> Callable[..., Any]:
  """A Flax interceptor that hands each outermost layer call to `around`.

  A subclass that calls `super().__call__` counts as one call, not two.

  Args:
    around: (module, path, x, call: x -> y) -> y.
    base: How many components to remove from the start of each path.
  """
  if not __debug__:  # Flax removes interceptors inside an `assert`.
    raise errors.UserError(
      'Flax needs the assertions of Python: run it without -O, and unset '
      'PYTHONOPTIMIZE.'
    )
  active = set()

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    if context.method_name != '__call__' or described.rule(module) is None:
      return next_fun(*args, **kwargs)
    path = '/'.join(module.path[base:])
    if path in active:
      return next_fun(*args, **kwargs)
    name = next((n for n in ('inputs', 'x', *kwargs) if n in kwargs), '')
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

  `function`, typically `module.init` on one image, is traced abstractly:
  nothing is computed and no memory is used.
  """
  found = []

  def around(module, path, x, call):
    y = call(x)
    found.append(describe(module, path, x, y, found, images=1))
    return y

  def traced(*args):
    with nn.intercept_methods(intercept(around)):
      return function(*args)

  jax.eval_shape(traced, *args)
  return found


def record_module(module: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
  """The layer calls of a module on one image [H, W, C]."""
  x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
  return record(lambda x: module.init(jax.random.key(0), x), x)


def count(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
  """(MACs, parameters) of a built module on one image [H, W, C].

  >>> count(nn.Conv(5, (3, 3)), (8, 8, 2))
  (5760, 95)
  """
  found = record_module(module, input_shape)
  return sum(c.macs() for c in found), sum(c.params() for c in found)


def _evaluated(terms: Terms, counts: Counts) -> int:
  """Sum of coefficient * c[i] * c[j], with Python's exact integers."""
  # Index FIXED = -1 reads the 1.
  sized = [*np.asarray(counts, np.int64).tolist(), 1]
  return sum(n * sized[i] * sized[j] for (i, j), n in terms.items())


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
    self._macs, self._params = collections.Counter(), collections.Counter()
    for op in self.ops:
      self._macs.update(op.macs_terms())
      self._params.update(op.params_terms())

  def _checked(self, counts: Counts) -> Counts:
    if np.shape(counts) != (len(self.layers),):
      raise ValueError(
        f'counts must hold one number for each of the {len(self.layers)} gated '
        f'layers; got shape {np.shape(counts)}.'
      )
    return counts

  def macs(self, counts: Counts) -> int:
    """Multiply-accumulates of one image at these counts, exact."""
    return _evaluated(self._macs, self._checked(counts))

  def params(self, counts: Counts) -> int:
    """Parameters at these counts, exact."""
    return _evaluated(self._params, self._checked(counts))
