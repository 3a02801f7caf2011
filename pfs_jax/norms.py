"""BatchNorm's running statistics, estimated again after a short run.

A BatchNorm keeps running = m * running + (1 - m) * batch, with the momentum m.
After T steps its first values still have the weight m^T, and the averages come
from earlier weights of the network. With flax's default m = 0.99, a network
trained for 70 steps classifies test images as if it were untrained, though its
weights are good. The remedy (Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
2021) is to compute the statistics of the current weights over some batches.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import devices

BATCHES = 50  # Training batches that the statistics are estimated from.
_REMAINDER = 0.01  # A run is short if the first values weigh more than this.
_FROZEN = 1 - 1e-5  # Statistics with this momentum or more are frozen.


def _is_average(path: Any) -> bool:
  """Whether a leaf's name is that of a mean or a variance.

  Others, such as those of nn.SpectralNorm, are used by the call itself.
  """
  return any(word in str(path[-1].key) for word in ('mean', 'var'))


@functools.cache
def _batch_statistics(module: nn.Module, draw: Callable) -> Callable:
  """(variables, resident, chunk) -> (statistics of the batch, momenta)."""

  def of_batch(variables, resident, chunk):
    x, _ = draw(resident, jax.tree.map(lambda v: v[0], chunk))

    def updated(stats):
      _, found = module.apply(
        {**variables, 'batch_stats': stats},
        x,
        train=True,
        mutable=['batch_stats'],
        rngs=dict.fromkeys(('dropout', 'params'), jax.random.key(0)),
      )
      return found['batch_stats']

    old = variables['batch_stats']
    moves = jax.tree_util.tree_map_with_path(
      lambda path, a, b: _is_average(path) & (a != b).any(), old, updated(old)
    )

    def filled(value):
      return updated(
        jax.tree.map(lambda a, m: jnp.where(m, value, a), old, moves)
      )

    # (1 - m) * batch, and m + (1 - m) * batch: their difference is m.
    low, high = filled(0.0), filled(1.0)
    momenta = jax.tree.map(
      lambda a, b, m: jnp.where(m, jnp.median(b - a), 1.0), low, high, moves
    )
    moved = jax.tree.map(
      lambda v, m: jnp.where(m < _FROZEN, v / jnp.maximum(1 - m, 1e-6), v),
      low,
      momenta,
    )
    return moved, momenta

  return jax.jit(of_batch, out_shardings=devices.replicated())


def longest_momentum(state: Any, source: Any) -> float:
  """The largest BatchNorm momentum of the module below 1; 0 without any."""
  if not state.batch_stats:
    return 0.0
  call = _batch_statistics(state.module, source.draw)
  _, momenta = call(state.variables, source.resident, source.chunk(0, 1))
  found = [float(m) for m in jax.tree.leaves(momenta)]
  return max((m for m in found if m < _FROZEN), default=0.0)


def is_short(momentum: float, steps: int) -> bool:
  """Whether the first statistics still weigh more than 1 % after `steps`.

  >>> is_short(0.9, 70), is_short(0.99, 70), is_short(0.99, 1000)
  (False, True, False)
  """
  return 0 < momentum and steps * math.log(momentum) > math.log(_REMAINDER)


def estimated(state: Any, source: Any, step: int) -> Any:
  """The state with statistics of its current weights over training batches.

  With means a_i and variances v_i of n batches, the mean is the mean of a_i and
  the variance is the mean of v_i plus the variance of a_i. Statistics that a
  training step does not change (a frozen BatchNorm) stay.

  Args:
    state: A state with `module`, `variables` and `batch_stats`.
    source: Training batches, such as `pipeline.ArraySource`.
    step: The number of steps made. The `BATCHES` batches before it are used,
      or the first ones of the run.
  """
  call = _batch_statistics(state.module, source.draw)
  first = max(0, step - BATCHES)
  found = []
  for i in range(first, first + min(BATCHES, max(source.steps_per_epoch, 1))):
    stats, momenta = call(state.variables, source.resident, source.chunk(i, 1))
    found.append(flax.traverse_util.flatten_dict(stats))
  flat = flax.traverse_util.flatten_dict(state.batch_stats)
  momenta = flax.traverse_util.flatten_dict(momenta)
  for path, old in flat.items():
    if momenta[path] >= _FROZEN:
      continue
    value = jnp.stack([stats[path] for stats in found]).mean(0)
    mean = (*path[:-1], 'mean')
    if path[-1] == 'var' and mean in flat:
      value += jnp.stack([stats[mean] for stats in found]).var(0)
    flat[path] = value.astype(old.dtype)
  stats = flax.traverse_util.unflatten_dict(flat)
  return state.replace(batch_stats=stats)


def refresher(
  mode: str, is_own: bool, state: Any, source: Any
) -> Callable[[Any, int], Any]:
  """A function (state, steps made) -> the state to evaluate and save.

  Args:
    mode: `config.train.statistics`: 'running', 'estimated', or 'auto', which is
      'estimated' for a model of the user's own while the run `is_short`.
    is_own: Whether the model is the user's own.
    state: The state at step 0.
    source: Training batches.
  """
  if mode == 'running' or (mode == 'auto' and not is_own):
    return lambda state, step: state
  momentum = longest_momentum(state, source)

  def refreshed(state: Any, step: int) -> Any:
    if momentum and (mode == 'estimated' or is_short(momentum, step)):
      return estimated(state, source, step)
    return state

  return refreshed


def warning(training: float, test: float) -> str:
  """A sentence where the accuracies (0..1) are implausibly far apart, else ''.

  >>> warning(0.67, 0.10).split(';')[0]
  'test accuracy 10 % is less than half of the training accuracy 67 %'
  >>> warning(0.99, 0.70)
  ''
  """
  if 2 * test >= training:
    return ''
  return (
    f'test accuracy {100 * test:.0f} % is less than half of the training '
    f'accuracy {100 * training:.0f} %; the training set may be too small, or '
    "BatchNorm's running statistics lag (see config.train.statistics)."
  )
