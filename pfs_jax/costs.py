"""MACs and parameters of a network, as exact polynomials in channel counts.

A network is traced once, abstractly, with a *distinct* number of channels in
every gated layer. The sizes that its convolutions and dense layers then show
say which layer feeds which, so the cost of any narrower network is a small
polynomial of degree two in the counts: exact integers in microseconds, and no
formula kept by hand for any family.

Counting rules (those of the published implementation, one multiply-accumulate
is 1 MAC):

* convolution: kernel_h * kernel_w * C_in * C_out / groups per output position;
* dense: inputs * outputs;
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
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# A number of channels as an affine function of the counts: pairs (layer,
# multiple) that are added up; layer FIXED stands for the number 1.
FIXED = -1
Size = tuple[tuple[int, int], ...]

# Widths that no real layer has mark the gated layers in the trace.
_FIRST_MARK = 10_007


@dataclasses.dataclass(frozen=True)
class Call:
  """One recorded call of a layer that costs something.

  Attributes:
    path: Module path, joined by '/'.
    kind: 'conv', 'depthwise', 'dense', 'norm' or 'pool'.
    inputs: Channels that go in.
    outputs: Channels that come out.
    positions: Output positions per image (1 for dense); for 'pool' the input
      positions.
    taps: Kernel positions (kernel_h * kernel_w; 1 for dense, norm, pool).
    groups: Feature groups of a convolution.
    vectors: Parameter vectors of `outputs` channels: a bias counts 1, a
      normalisation with scale and bias 2.
    output_size: Spatial output size, () where there is none.
    again: Whether an earlier call already had the parameters (a module that is
      called more than once).
    input_size: Spatial input size, () where there is none.
    kernel: Kernel size of a convolution.
    strides: Strides of a convolution.
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
  again: bool = False
  input_size: tuple[int, ...] = ()
  kernel: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()

  @property
  def macs(self) -> int:
    """Multiply-accumulates of one image."""
    if self.kind == 'norm':
      return 0
    if self.kind == 'pool':
      return self.inputs * self.positions
    return (
      self.positions * self.taps * self.inputs * self.outputs // self.groups
    )

  @property
  def params(self) -> int:
    """Parameters, without running statistics."""
    if self.again:
      return 0
    kernel = 0
    if self.kind in ('conv', 'depthwise', 'dense'):
      kernel = self.taps * self.inputs * self.outputs // self.groups
    return kernel + self.vectors * self.outputs


def _call_of(module: nn.Module, x, y) -> Call | None:
  path = '/'.join(module.path)
  if isinstance(module, nn.Conv):
    kernel = module.kernel_size
    kernel = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    groups = module.feature_group_count
    depthwise = groups > 1 and groups == x.shape[-1]
    space = y.shape[-1 - len(kernel) : -1]
    strides = module.strides
    if strides is None or isinstance(strides, int):
      strides = (strides or 1,) * len(kernel)
    return Call(
      path,
      'depthwise' if depthwise else 'conv',
      x.shape[-1],
      y.shape[-1],
      math.prod(space),
      math.prod(kernel),
      groups,
      int(module.use_bias),
      space,
      input_size=x.shape[-1 - len(kernel) : -1],
      kernel=kernel,
      strides=tuple(strides),
    )
  if isinstance(module, nn.Dense):
    # A dense layer on a feature map is applied at each position.
    space = y.shape[1:-1]
    return Call(
      path,
      'dense',
      x.shape[-1],
      y.shape[-1],
      math.prod(space),
      vectors=int(module.use_bias),
      output_size=space,
    )
  if isinstance(module, nn.BatchNorm | nn.LayerNorm | nn.GroupNorm):
    vectors = int(module.use_scale) + int(module.use_bias)
    width = y.shape[-1]
    return Call(
      path, 'norm', width, width, math.prod(y.shape[1:-1]), vectors=vectors
    )
  if getattr(module, 'macs_per_input', 0):
    width = x.shape[-1]
    return Call(path, 'pool', width, width, math.prod(x.shape[1:-1]))
  return None


def record(function: Callable[..., Any], *args) -> list[Call]:
  """The costly layer calls of `function(*args)`, in forward order.

  `function` is traced abstractly (`jax.eval_shape`): nothing is computed and no
  memory is used. Typically `function` is `module.init` partially applied.
  """
  calls, seen, inside = [], set(), set()

  def interceptor(next_fun, args, kwargs, context):
    path = context.module.path
    # A subclass that calls `super().__call__` is one call, not two.
    if context.method_name != '__call__' or path in inside:
      return next_fun(*args, **kwargs)
    inside.add(path)
    try:
      out = next_fun(*args, **kwargs)
    finally:
      inside.discard(path)
    x = args[0] if args else kwargs.get('inputs', kwargs.get('x'))
    call = _call_of(context.module, x, out)
    if call is not None:
      calls.append(dataclasses.replace(call, again=call.path in seen))
      seen.add(call.path)
    return out

  def traced(*args):
    with nn.intercept_methods(interceptor):
      return function(*args)

  jax.eval_shape(traced, *args)
  return calls


def record_module(module: nn.Module, input_shape: Sequence[int]) -> list[Call]:
  """The costly layer calls of a module on one image [H, W, C]."""
  x = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return record(module.init, key, x)


def count(module: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
  """(MACs, parameters) of a built module on one image [H, W, C]."""
  calls = record_module(module, input_shape)
  return sum(c.macs for c in calls), sum(c.params for c in calls)


@dataclasses.dataclass(frozen=True)
class Op:
  """One costly layer whose sizes are functions of the counts.

  `inputs` and `outputs` are affine in the counts (`Size`); all else is as in
  `Call`.
  """

  path: str
  kind: str
  inputs: Size
  outputs: Size
  positions: int
  taps: int
  groups: int
  vectors: int
  output_size: tuple[int, ...] = ()
  again: bool = False
  input_size: tuple[int, ...] = ()
  kernel: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()

  def _kernel(self) -> dict[tuple[int, int], int]:
    """Products inputs * outputs / groups as {(layer, layer): coefficient}."""
    if self.kind in ('norm', 'pool'):
      return {}
    if self.kind == 'depthwise':  # One filter per output channel.
      return {(i, FIXED): self.taps * a for i, a in self.outputs}
    terms = collections.Counter()
    for i, a in self.inputs:
      for j, b in self.outputs:
        terms[min(i, j), max(i, j)] += self.taps * a * b // self.groups
    return terms

  def macs_terms(self) -> dict[tuple[int, int], int]:
    """MACs as {(layer, layer): coefficient}."""
    if self.kind == 'pool':
      return {(i, FIXED): a * self.positions for i, a in self.inputs}
    return {k: v * self.positions for k, v in self._kernel().items()}

  def params_terms(self) -> dict[tuple[int, int], int]:
    """Parameters as {(layer, layer): coefficient}."""
    if self.again:
      return {}
    terms = collections.Counter(self._kernel())
    for i, a in self.outputs:
      terms[i, FIXED] += self.vectors * a
    return terms

  def channels(self, counts: Sequence[int]) -> tuple[int, int]:
    """(inputs, outputs) at the given counts."""
    sized = [*counts, 1]
    return (
      sum(a * sized[i] for i, a in self.inputs),
      sum(a * sized[i] for i, a in self.outputs),
    )


class _Polynomial:
  """Sum of coefficient * c[i] * c[j] with exact integers."""

  def __init__(self, terms: dict[tuple[int, int], int]):
    items = sorted(terms.items())
    self._i = np.array([i for (i, _), _ in items], np.int64)
    self._j = np.array([j for (_, j), _ in items], np.int64)
    self._coefficient = np.array([v for _, v in items], np.int64)

  def __call__(self, counts: np.ndarray) -> int:
    sized = np.append(counts, 1)  # Index FIXED = -1 reads the 1.
    return int(self._coefficient @ (sized[self._i] * sized[self._j]))


class CostModel:
  """MACs and parameters as functions of the counts of the gated layers.

  Attributes:
    layers: Names of the gated layers, in forward order.
    widths: Their channels in the searched network, the most that can be kept.
    ops: The costly layers (`Op`), in forward order.
  """

  def __init__(
    self, layers: Sequence[str], widths: Sequence[int], ops: Sequence[Op]
  ):
    self.layers = tuple(layers)
    self.widths = tuple(int(w) for w in widths)
    self.ops = tuple(ops)
    macs, params = collections.Counter(), collections.Counter()
    for op in self.ops:
      macs.update(op.macs_terms())
      params.update(op.params_terms())
    self._macs, self._params = _Polynomial(macs), _Polynomial(params)

  def _checked(self, counts: Sequence[int]) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.shape != (len(self.layers),):
      raise ValueError(
        f'counts must hold one number for each of the {len(self.layers)} gated '
        f'layers; got shape {counts.shape}.'
      )
    return counts.astype(np.int64)

  def macs(self, counts: Sequence[int]) -> int:
    """Multiply-accumulates of one image at these counts, exact."""
    return self._macs(self._checked(counts))

  def params(self, counts: Sequence[int]) -> int:
    """Parameters at these counts, exact."""
    return self._params(self._checked(counts))


def marks(n: int) -> tuple[int, ...]:
  """`n` distinct widths that no real layer has, to trace a network with."""
  return tuple(_FIRST_MARK + i for i in range(n))


def from_calls(
  calls: Sequence[Call],
  layers: Sequence[str],
  widths: Sequence[int],
  size_of: Callable[[int], Size] | None = None,
) -> CostModel:
  """The cost model behind calls recorded at the widths `marks(len(layers))`.

  Args:
    calls: Recorded by `record` from the network with marked widths.
    layers: Names of the gated layers, forward order.
    widths: Their real widths.
    size_of: Channels in the trace -> affine function of the counts. By default
      a mark is its layer and any other number is fixed.
  """
  index = {mark: i for i, mark in enumerate(marks(len(layers)))}

  def default(channels: int) -> Size:
    if channels in index:
      return ((index[channels], 1),)
    return ((FIXED, channels),)

  size_of = size_of or default
  ops = []
  for call in calls:
    fields = dataclasses.asdict(call)
    fields['inputs'] = size_of(call.inputs)
    fields['outputs'] = size_of(call.outputs)
    ops.append(Op(**fields))
  return CostModel(layers, widths, ops)
