"""Latency of a network, predicted from measured times of its layers.

The time of a narrower network is predicted as the sum of its layers' times.
Each layer is timed alone, on a grid of channel counts, with BatchNorm and ReLU
as inference has them (a scale, a shift and a maximum, which the compiler fuses
into the convolution). Between grid points times are interpolated linearly; a
time never falls when a count grows (running maximum), so that a ceiling on it
can be searched like one on MACs.

The sum leaves out fusion across layers, residual additions, pooling, and the
overlap of layers. So the whole network is timed afterwards (`measure`), and the
difference is shown; a budget in milliseconds is a budget on the *sum*.
"""

import contextlib
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from pfs_jax import console, costs, errors, runs, storage

# The shares of a layer's width at which it is timed.
_GRID = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
_REPEATS = 15
_Positive = Annotated[float, msgspec.Meta(gt=0)]


def milliseconds(repeats: int, call: Callable, *args: Any) -> list[float]:
  """Times of so many calls of a jitted function, after one that compiles."""
  jax.block_until_ready(call(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    times.append(1000 * (time.perf_counter() - start))
  return times


def _time_layer(
  op: costs.Layer, inputs: int, outputs: int, batch: int, dtype: Any
) -> float:
  """The least time of a layer in seconds: other programs only add to it."""
  groups = inputs if op.kind == 'depthwise' else op.groups
  size = op.input_size or (op.positions,)  # A dense layer has no image.
  axes = 'DHW'[-len(size) :]
  rng = np.random.default_rng(0)
  x, kernel, scale, shift = (
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in (
      (batch * op.folded, *size, inputs),
      (*op.kernel, inputs // groups, outputs),
      *[(1,) * (len(size) + 1) + (outputs,)] * 2,
    )
  )

  @jax.jit
  def layer(x, kernel, scale, shift):
    if op.kind == 'dense':
      return x @ kernel + shift
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      op.strides,
      [(k // 2, k // 2) for k in op.kernel],
      dimension_numbers=(f'N{axes}C', f'{axes}IO', f'N{axes}C'),
      feature_group_count=groups,
    )
    return jax.nn.relu(y * scale + shift)

  return min(milliseconds(_REPEATS, layer, x, kernel, scale, shift)) / 1000


class LatencyModel:
  """Predicted milliseconds of one batch as a function of the counts.

  Args:
    cost_model: Costs of the searched network.
    batch_size: Images in a batch.
    cache: The JSON file of measured seconds, by hardware, dtype, batch size
      and shapes. A file with other content is replaced.
    dtype: Dtype of the computation.
  """

  def __init__(
    self,
    cost_model: costs.CostModel,
    batch_size: int,
    cache: pathlib.Path,
    dtype: Any = jnp.float32,
  ):
    self._batch_size, self._dtype = batch_size, jnp.dtype(dtype)
    self._seconds: dict[str, float] = {}
    busy = f'{cache}: another process measures; waiting'
    # Two processes at once would disturb each other, and find other times.
    with contextlib.ExitStack() as stack:
      lock = storage.locked(cache.parent, wait=lambda: console.note(busy))
      with contextlib.suppress(errors.UserError):  # Nothing can be saved, then.
        stack.enter_context(lock)
      with contextlib.suppress(errors.UserError):
        self._seconds = storage.read_json(cache, dict[str, _Positive])
      self._tables = [
        (op, *self._table(op))
        for op in cost_model.ops
        if op.kind in ('depthwise', *costs.MIXING)
      ]
      try:
        storage.write_json(cache, self._seconds)
      except errors.UserError as e:
        console.note(f'latency: measured, but not saved: {e}')

  def _table(self, op: costs.Layer):
    """(points of inputs, points of outputs, seconds [inputs, outputs])."""
    inputs = _timed_widths(op.inputs, op.reads)
    outputs = _timed_widths(op.outputs, op.makes)
    if op.kind == 'depthwise':  # The inputs say how many outputs there are.
      outputs = outputs[-1:]
      grid = np.array([[self._time(op, n, n * op.multiplier)] for n in inputs])
    else:
      grid = np.array([[self._time(op, i, o) for o in outputs] for i in inputs])
    for axis in (0, 1):
      grid = np.maximum.accumulate(grid, axis=axis)
    return inputs, outputs, runs.agreed(grid)

  def _time(self, op: costs.Layer, inputs: int, outputs: int) -> float:
    key = json.dumps(
      [
        runs.hardware(),
        runs.cores(),
        jax.__version__,
        str(self._dtype),
        self._batch_size,
        op.kind,
        op.positions * op.folded,
        op.groups,
        *map(list, (op.input_size, op.kernel, op.strides)),
        inputs,
        outputs,
      ]
    )
    if key not in self._seconds:
      self._seconds[key] = _time_layer(
        op, inputs, outputs, self._batch_size, self._dtype
      )
    return self._seconds[key]

  def layers(self, counts: costs.Counts) -> dict[str, float]:
    """{layer path: milliseconds of all calls of the layer} at these counts."""
    found: dict[str, float] = {}
    for op, *table in self._tables:
      ms = 1000 * _interpolate(*table, *op.channels(counts))
      found[op.path] = found.get(op.path, 0.0) + ms
    return found

  def __call__(self, counts: costs.Counts) -> float:
    """Milliseconds of one batch: the sum over the layers."""
    return sum(self.layers(counts).values())


def _timed_widths(width: int, size: costs.Size) -> list[int]:
  """The numbers of channels at which a layer is timed."""
  if all(group == costs.FIXED for group, _ in size):
    return [width]
  return sorted({max(1, round(share * width)) for share in _GRID})


def _interpolate(xs, ys, grid, x: int, y: int) -> float:
  """Bilinear interpolation in a grid; constant outside of it."""
  columns = [float(np.interp(x, xs, grid[:, j])) for j in range(len(ys))]
  return float(np.interp(y, ys, columns))


def measure(
  module: nn.Module,
  variables: Mapping[str, Any],
  batch_size: int,
  image_shape: tuple[int, int, int],
) -> tuple[float, float]:
  """(median, least) milliseconds of one batch through a whole network."""
  apply = jax.jit(functools.partial(module.apply, train=False))
  x = jnp.zeros((batch_size, *image_shape), jnp.float32)
  times = milliseconds(2 * _REPEATS, apply, variables, x)
  return statistics.median(times), min(times)


def padding_use(
  cost_model: costs.CostModel, counts: Sequence[int], multiple: int
) -> dict[str, float]:
  """{layer path: useful MACs over MACs with channels padded to a multiple}.

  That is the useful share of the work of a matrix unit that takes `multiple`
  channels at a time: 8 for tensor cores, 128 for a TPU.
  """

  def share(channels: int) -> float:
    return channels / (multiple * -(-channels // multiple))

  shares = {}
  for op in cost_model.ops:
    inputs, outputs = op.channels(counts)
    if op.kind in costs.MIXING:
      shares[op.path] = share(inputs) * share(outputs)
    elif op.kind == 'depthwise':
      shares[op.path] = share(outputs)
  return shares
