"""Latency of a network by its layers, measured on the device that is there.

The time of a narrower network is predicted as the sum of its layers' times.
Each layer is timed alone, on a grid of channel counts, with BatchNorm and ReLU
as inference has them (a scale, a shift and a maximum, which the compiler fuses
into the convolution). Between grid points times are interpolated linearly; a
time never falls when a count grows (running maximum), so that a ceiling on it
can be searched like one on MACs.

What the sum leaves out: fusion across layers, residual additions, pooling, and
the overlap of layers. So the whole network is timed afterwards (`measure`) and
the gap shown; a budget in milliseconds is a budget on the *sum*.

Times are cached in a JSON file by device kind, dtype, batch size and shapes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import costs, storage

# Share of a layer's width at which it is timed.
_GRID = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
_REPEATS = 15


def _seconds(function: Callable, *args) -> float:
  """Least time of a compiled call: others on the machine only add to it."""
  call = jax.jit(function)
  jax.block_until_ready(call(*args))  # Compiles.
  times = []
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    times.append(time.perf_counter() - start)
  return min(times)


def _layer(op: costs.Layer, dtype: Any) -> Callable:
  """(x, kernel, scale, shift) -> the layer's output at inference."""

  def convolution(x, kernel, scale, shift):
    padding = [(k // 2, k // 2) for k in op.kernel]
    groups = x.shape[-1] if op.kind == 'depthwise' else 1
    y = jax.lax.conv_general_dilated(
      x,
      kernel,
      op.strides,
      padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )
    return jax.nn.relu(y * scale[None, None, None] + shift[None, None, None])

  def dense(x, kernel, scale, shift):
    del scale
    return x @ kernel + shift[None]

  return dense if op.kind == 'dense' else convolution


def _time_layer(
  op: costs.Layer, inputs: int, outputs: int, batch: int, dtype: Any
) -> float:
  """Seconds of one layer at these channels."""
  size = op.input_size if op.kind != 'dense' else ()
  fan_in = 1 if op.kind == 'depthwise' else inputs
  rng = np.random.default_rng(0)

  def random(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  return _seconds(
    _layer(op, dtype),
    random(batch, *size, inputs),
    random(*op.kernel, fan_in, outputs),
    random(outputs),
    random(outputs),
  )


class Cache:
  """Measured seconds by key, kept in a JSON file."""

  def __init__(self, path: pathlib.Path):
    self._path, self._times = path, {}
    if path.exists():
      with contextlib.suppress(json.JSONDecodeError, OSError):
        self._times = json.loads(path.read_text())

  def get(self, key: str, measure: Callable[[], float]) -> float:
    """The time of a key, measured where it is new."""
    if key not in self._times:
      self._times[key] = measure()
    return self._times[key]

  def save(self) -> None:
    """Writes the file."""
    storage.write_json(self._path, self._times)


def _points(width: int) -> list[int]:
  return sorted({max(1, round(share * width)) for share in _GRID})


def _is_fixed(size: costs.Size) -> bool:
  return all(i == costs.FIXED for i, _ in size)


class LatencyModel:
  """Predicted milliseconds of one batch as a function of the counts.

  Args:
    cost_model: Costs of the searched network.
    batch_size: Images in a batch.
    cache: The file of measured times.
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
    store = Cache(cache)
    self._tables = [
      (op, *self._table(op, store))
      for op in cost_model.ops
      if op.kind in ('conv', 'depthwise', 'dense')
    ]
    store.save()

  def _table(self, op: costs.Layer, store: Cache):
    """(points of inputs, points of outputs, seconds [inputs, outputs])."""
    axes = []
    for width, size in ((op.inputs, op.reads), (op.outputs, op.makes)):
      axes.append([width] if _is_fixed(size) else _points(width))
    if op.kind == 'depthwise':  # Inputs and outputs are the same channels.
      times = [[self._time(op, n, n, store)] for n in axes[1]]
      axes = [axes[1], [axes[1][-1]]]
    else:
      times = [[self._time(op, i, o, store) for o in axes[1]] for i in axes[0]]
    grid = np.array(times)
    for axis in (0, 1):
      grid = np.maximum.accumulate(grid, axis=axis)
    return np.array(axes[0]), np.array(axes[1]), grid

  def _time(self, op: costs.Layer, inputs: int, outputs: int, store) -> float:
    key = json.dumps(
      [
        jax.devices()[0].device_kind,
        jax.device_count(),
        str(self._dtype),
        self._batch_size,
        op.kind,
        *map(list, (op.input_size, op.kernel, op.strides)),
        inputs,
        outputs,
      ]
    )
    measure = functools.partial(
      _time_layer, op, inputs, outputs, self._batch_size, self._dtype
    )
    return store.get(key, measure)

  def layers(self, counts: costs.Counts) -> dict[str, float]:
    """{layer path: milliseconds} at these counts, per call of a layer."""
    return {
      op.path: 1000 * _interpolate(*table, *op.channels(counts))
      for op, *table in self._tables
    }

  def __call__(self, counts: costs.Counts) -> float:
    """Milliseconds of one batch: the sum over the layers."""
    return sum(self.layers(counts).values())


def _interpolate(xs, ys, grid, x: int, y: int) -> float:
  """Bilinear between the points of a grid; constant outside."""
  columns = [float(np.interp(x, xs, grid[:, j])) for j in range(len(ys))]
  return float(np.interp(y, ys, columns))


def measure(
  module: nn.Module,
  variables: Mapping[str, Any],
  batch_size: int,
  image_shape: tuple[int, int, int],
) -> tuple[float, float]:
  """(median, least) milliseconds of one batch through a whole network."""
  x = jnp.zeros((batch_size, *image_shape), jnp.float32)
  call = jax.jit(lambda v, x: module.apply(v, x, train=False))
  jax.block_until_ready(call(variables, x))
  times = []
  for _ in range(2 * _REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(call(variables, x))
    times.append(1000 * (time.perf_counter() - start))
  return statistics.median(times), min(times)


def padding_use(
  cost_model: costs.CostModel, counts: Sequence[int], multiple: int
) -> dict[str, float]:
  """{layer path: useful MACs over MACs with channels padded to a multiple}.

  What a matrix unit that works on `multiple` channels at a time makes of a
  layer: 8 for tensor cores, 128 for a TPU's.
  """

  def padded(n: int) -> int:
    return -(-n // multiple) * multiple

  shares = {}
  for op in cost_model.ops:
    if op.kind in ('conv', 'dense'):
      inputs, outputs = op.channels(counts)
      shares[op.path] = inputs * outputs / (padded(inputs) * padded(outputs))
    elif op.kind == 'depthwise':
      _, outputs = op.channels(counts)
      shares[op.path] = outputs / padded(outputs)
  return shares
