"""The check that a gate of 0 and a removed channel are the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pfs_jax import errors, gating, groups
from pfs_jax.surgery import nnx_models


def narrow(
  model: Any,
  table: groups.Table,
  counts: Sequence[int] | Mapping[str, int],
  *,
  verify: bool = False,
  x: Any = None,
  args: Sequence[Any] = (),
) -> Any:
  """The model with `counts` channels in each group, to train from new weights.

  Args:
    model: The model of `discover`.
    table: What `discover` found.
    counts: Channels to keep of each group, 1 to its size, in forward order or
      by name.
    verify: Whether to check, by `check` below, that the narrow model computes
      the same as the gated one.
    x: Images for the check, needed if `verify`.
    args: Further arguments of the model, for the check.

  Returns:
    A Linen module, which can be bound, tabulated and used inside other modules.
    For an NNX module, an NNX module with the weights of the first channels of
    each group: train it from new weights, or use `nnx_models.narrowed`.

  Raises:
    errors.UserError: Wrong counts, or the check failed.
  """
  counts = table.counts(counts)
  if verify:
    if x is None:
      raise errors.UserError('surgery: verify=True needs images, x=...')
    check(model, table, counts, x, args)
  if isinstance(model, nnx.Module):
    return nnx_models.narrowed(model, table, counts)
  return narrow_linen(model, table, counts)


def narrow_linen(
  model: Any, table: groups.Table, counts: Sequence[int]
) -> gating.Wrapped:
  """As `narrow`, but a Linen module even for a model of flax.nnx."""
  source = gating.Source(nnx_models.as_linen(model), table.call)
  return gating.narrowed(source, table.layers, table.features(counts))


def gate(model: Any, table: groups.Table) -> gating.Wrapped:
  """As `gating.gate`, also for a model of flax.nnx; returns a Linen module."""
  return gating.gate(nnx_models.as_linen(model), table)


def check(
  model: Any,
  table: groups.Table,
  counts: Sequence[int] | Mapping[str, int],
  x: Any,
  args: Sequence[Any] = (),
) -> float:
  """Compares gates of 0 with removed channels, in evaluation mode.

  The wide model with random weights, statistics and biases, and with gates of 0
  for the channels that are not kept (a random choice), must give the logits of
  the narrow one with sliced weights. If the dtype of the model is that of its
  inputs and parameters, both compute in float64, so that rounding errors stay
  small in deep models. Groups that are not `removable` are kept whole. The
  largest error allowed is 1e-5, or 5e-2 for models that compute in 16 bits,
  relative to the largest logit if that is over 1.

  Args:
    model: The model of `discover`.
    table: What `discover` found.
    counts: As for `narrow`.
    x: Images [N, H, W, C].
    args: Further arguments of the model.

  Returns:
    The largest error.

  Raises:
    errors.UserError: The error is larger.
  """
  model, counts = nnx_models.as_linen(model), table.counts(counts)
  random = np.random.default_rng(0)
  kept = {
    g.name: np.sort(random.permutation(g.size)[: n if g.removable else g.size])
    for g, n in zip(table.groups, counts, strict=True)
  }
  try:
    with jax.enable_x64(True):
      x64 = np.asarray(x, np.float64)
      error = _max_error(model, table, kept, (x64, *args), random)
  except Exception:  # The model may not take float64.
    error = _max_error(model, table, kept, (x, *args), random)
  low = any(layer.low_precision for layer in table.calls)
  tolerance = 5e-2 if low else 1e-5  # bfloat16 keeps 8 bits.
  if not error <= tolerance:  # A NaN fails, too.
    raise errors.UserError(
      f'surgery: the narrow model differs from the gated one by {error:.3g}, '
      f'more than {tolerance:g}: some layer does not do what its class says.'
    )
  return error


def _max_error(model, table: groups.Table, kept, arguments, random) -> float:
  """The largest difference of the logits, relative if they are over 1."""
  wide = gating.gate(model, table)
  variables = _random_variables(wide, arguments, random)
  gates = {
    g.name: jnp.asarray(np.isin(np.arange(g.size), kept[g.name]), g.dtype)
    for g in table.groups
  }
  gated = {**variables, groups.GATES: groups.tree(gates)}
  thin = narrow_linen(model, table, [len(kept[n]) for n in table.sizes])
  sliced = table.slice_variables(variables, kept)
  outputs = [
    jax.tree.leaves(jax.jit(module.apply)(values, *arguments))
    for module, values in ((wide, gated), (thin, sliced))
  ]
  error = 0.0
  for a, b in zip(*outputs, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.maximum(1, np.abs(a).max())  # Unlike `max`, it keeps a NaN.
    error = np.maximum(error, np.abs(a - b).max() / scale)
  return float(error)


def _random_variables(wide: gating.Wrapped, arguments, random) -> Any:
  """Random weights, and statistics and biases that are not 0 and 1.

  NumPy draws them, because `init` would compile one program for each shape.
  """
  key = jax.random.key(0)
  shapes = nn.meta.unbox(jax.eval_shape(wide.init, key, *arguments))
  precise = jax.dtypes.canonicalize_dtype(np.float64)

  def draw(path, leaf):
    name, floating = path[-1].key, jnp.issubdtype(leaf.dtype, jnp.inexact)
    if path[0].key == 'batch_stats' or name in ('scale', 'gate'):
      value = random.uniform(0.5, 1.5, leaf.shape)
    elif leaf.ndim < 2:
      value = random.normal(0, 0.3, leaf.shape)
    else:
      fan_in = np.prod(leaf.shape[:-1])
      value = random.normal(0, np.sqrt(2 / fan_in), leaf.shape)
    if leaf.dtype == np.float32:
      return jnp.asarray(value, precise)
    return jnp.asarray(value if floating else np.zeros(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)
