"""Gates, narrows and slices a model at the sites that `discover` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import costs, errors
from pfs_jax.surgery import sites as sites_lib
from pfs_jax.surgery import wrap

Sites = sites_lib.Sites
_TOLERANCE = 1e-5
_TOLERANCE_LOW = 5e-2  # bfloat16 keeps 8 bits.


def gate(model: nn.Module, sites: Sites) -> wrap.Wrapped:
  """The model with a gate on each channel of each group.

  `init` adds the collection `gates`, one [C] vector for each group, starting at
  1; they multiply the outputs of the group's BatchNorms. With unit gates the
  output is the untouched model's, bit for bit.

  Raises:
    errors.UserError: If there is no group.
  """
  _require_groups(sites)
  plan = wrap.Plan(
    gates=tuple((p, tuple(u.tolist())) for p, u in sites.gated.items()),
    groups=tuple((g.name, g.size, str(g.dtype)) for g in sites.groups),
  )
  return wrap.Wrapped(model, sites.call, plan)


def _require_groups(sites: Sites) -> None:
  if not sites.groups:
    reasons = '; '.join(dict.fromkeys(sites.left_alone.values()))
    raise errors.UserError(
      f'surgery: no channel of the model can carry a gate: {reasons}.'
    )


def _checked(sites: Sites, counts: Any) -> tuple[int, ...]:
  """Counts in the order of the groups."""
  if isinstance(counts, Mapping):
    if set(counts) != set(sites.sizes):
      raise errors.UserError(
        f'surgery: counts must name {", ".join(sites.sizes)}; got '
        f'{", ".join(counts)}.'
      )
    counts = [counts[g.name] for g in sites.groups]
  counts = tuple(int(c) for c in counts)
  sizes = tuple(sites.sizes.values())
  if len(counts) != len(sizes) or any(
    not 1 <= c <= n for c, n in zip(counts, sizes, strict=False)
  ):
    raise errors.UserError(
      f'surgery: counts must be {len(sizes)} integers between 1 and {sizes}; '
      f'got {counts}.'
    )
  return counts


def _width(sites: Sites, units: np.ndarray, counts: Sequence[int]) -> int:
  """Channels of a layer with these units at the given counts."""
  return sum(
    multiple * (1 if i == costs.FIXED else counts[i])
    for i, multiple in _size(sites, units)
  )


def _size(sites: Sites, units: np.ndarray) -> costs.Size:
  """The number of channels as an affine function of the counts."""
  terms = []
  fixed = int((units < 0).sum())
  if fixed:
    terms.append((costs.FIXED, fixed))
  group = np.searchsorted(sites.offsets, units[units >= 0], side='right') - 1
  for i, channels in enumerate(np.bincount(group)):
    if channels:  # A whole number of channels of each unit of the group.
      terms.append((i, int(channels) // sites.groups[i].size))
  return tuple(terms)


def narrow(
  model: nn.Module,
  sites: Sites,
  counts: Sequence[int] | Mapping[str, int],
  *,
  verify: bool = False,
  x: Any = None,
  args: Sequence[Any] = (),
) -> wrap.Wrapped:
  """The model with `counts` channels in each group, to train from new weights.

  Args:
    model: The model of `discover`.
    sites: What `discover` found.
    counts: Channels to keep of each group, 1 to its size, in forward order or
      by name.
    verify: Whether to check, with `check` below, that it computes what the
      gated model does.
    x: Images to check it on, needed if `verify`.
    args: Further arguments of the model, for the check.

  Raises:
    errors.UserError: Wrong counts, or the check failed.
  """
  counts = _checked(sites, counts)
  features = {
    path: _width(sites, units, counts) for path, units in sites.outputs.items()
  }
  wrapped = wrap.narrowed(model, sites.call, sites.layers, features)
  if verify:
    if x is None:
      raise errors.UserError('surgery: verify=True needs images, x=...')
    check(model, sites, counts, x, args)
  return wrapped


def slice_variables(
  model: nn.Module,
  sites: Sites,
  variables: Mapping[str, Any],
  kept: Mapping[str, Any],
) -> dict[str, Any]:
  """The narrow model's variables: those of the channels that are kept.

  The collection `gates` is left out; kept channels count as having gate 1.

  Args:
    model: The model of `discover`.
    sites: What `discover` found.
    variables: The wide model's variables, gated or not.
    kept: {group name: sorted indices}, as from `prune.kept`.

  Raises:
    errors.UserError: A group is missing, or loses channels although a gate of
      0 is not a removed channel there.
  """
  del model  # The sites say all.
  mask = _mask(sites, kept)
  for group, part in zip(sites.groups, sites.split(mask), strict=True):
    if not group.removable and not part.all():
      raise errors.UserError(
        f'surgery: weights of {group.name} cannot be sliced: an activation '
        'makes a constant of its zeros. Train the counts from new weights.'
      )
  flat = flax.traverse_util.flatten_dict(dict(variables))
  return flax.traverse_util.unflatten_dict(
    {
      path: _sliced(sites, mask, path, leaf)
      for path, leaf in flat.items()
      if path[0] != wrap.GATES
    }
  )


def _mask(sites: Sites, kept: Mapping[str, Any]) -> np.ndarray:
  """[units] whether each is kept."""
  parts = []
  for group in sites.groups:
    if group.name not in kept:
      raise errors.UserError(f'surgery: kept has no group {group.name!r}.')
    part = np.zeros(group.size, bool)
    part[np.asarray(kept[group.name])] = True
    parts.append(part)
  return np.concatenate([np.zeros(0, bool), *parts])


def _sliced(sites: Sites, mask: np.ndarray, path, leaf) -> Any:
  """One parameter or statistic with only the kept channels."""
  layer = sites.layers.get('/'.join(path[1:-1]))
  if layer is None or layer.path not in sites.inputs or not leaf.ndim:
    return leaf

  def taken(units: np.ndarray) -> np.ndarray:
    return np.flatnonzero((units < 0) | np.append(mask, True)[units])

  inputs = sites.inputs[layer.path]
  outputs = sites.outputs.get(layer.path, inputs)
  if layer.multiplier:
    outputs = np.repeat(inputs, layer.multiplier)
  if path[-1] == 'kernel' and layer.kind in ('conv', 'dense'):
    leaf = jnp.take(leaf, taken(inputs), axis=-2)
  if leaf.shape[-1] == layer.outputs:
    leaf = jnp.take(leaf, taken(outputs), axis=-1)
  return leaf


def cost_model(
  model: nn.Module, sites: Sites, x: Any, *args
) -> costs.CostModel:
  """MACs and parameters of the narrow models, exact functions of the counts.

  Convolutions, dense layers and normalisations are counted (`costs`), and
  nothing else: neither a model's own `x.mean()` nor the modules of
  `sites.uncounted`.

  Args:
    model: The model of `discover`.
    sites: What `discover` found.
    x: One image [1, H, W, C] or its `jax.ShapeDtypeStruct`.
    *args: Further arguments of the model.
  """
  wrapped = wrap.Wrapped(model, sites.call)
  key = jax.eval_shape(lambda: jax.random.key(0))
  x = jax.ShapeDtypeStruct(x.shape, x.dtype)
  calls = costs.record(wrapped.init, key, x, *args)
  ops = []
  for call in calls:
    units = sites.inputs.get(call.path, np.full(call.inputs, -1))
    out = sites.outputs.get(call.path, units)
    if call.kind == 'depthwise':
      out = np.repeat(units, call.outputs // call.inputs)
    fields = {**vars(call), 'inputs': _size(sites, units)}
    out = out if len(out) == call.outputs else np.full(call.outputs, -1)
    ops.append(costs.Op(**{**fields, 'outputs': _size(sites, out)}))
  sizes = sites.sizes
  return costs.CostModel(tuple(sizes), tuple(sizes.values()), ops)


# The check that narrowing and gates of 0 are the same.


def check(
  model: nn.Module,
  sites: Sites,
  counts: Sequence[int] | Mapping[str, int],
  x: Any,
  args: Sequence[Any] = (),
  *,
  seed: int = 0,
  tolerance: float | None = None,
) -> float:
  """Compares gates of 0 with removed channels, in evaluation mode.

  The wide model with random weights, statistics and biases, and with gates of 0
  for the channels that are not kept (a random choice), must give the logits of
  the narrow one with sliced weights. It is computed in float64 where the model
  follows its inputs and parameters, so that depth does not blur it. Groups
  where a gate of 0 is not a removed channel are kept whole.

  Args:
    model: The model of `discover`.
    sites: What `discover` found.
    counts: As for `narrow`.
    x: Images [N, H, W, C].
    args: Further arguments of the model.
    seed: Of the random variables and of the choice.
    tolerance: Largest error allowed, relative to the largest logit where that
      is over 1; by default 1e-5, or 5e-2 for models that compute in 16 bits.

  Returns:
    The largest error.

  Raises:
    errors.UserError: It is over the tolerance.
  """
  counts = _checked(sites, counts)
  random = np.random.default_rng(seed)
  kept = {
    g.name: np.sort(random.permutation(g.size)[: n if g.removable else g.size])
    for g, n in zip(sites.groups, counts, strict=True)
  }
  try:
    with jax.enable_x64(True):
      error = _error(
        model, sites, kept, (np.asarray(x, np.float64), *args), random
      )
  except TypeError:  # The model does not take float64.
    error = _error(model, sites, kept, (x, *args), random)
  if tolerance is None:
    low = any(layer.low_precision for layer in sites.layers.values())
    tolerance = _TOLERANCE_LOW if low else _TOLERANCE
  if not error <= tolerance:  # Also if it is not a number.
    raise errors.UserError(
      f'surgery: the narrow model differs from the gated one by {error:.3g}, '
      f'more than {tolerance:g}: some layer is not what it looks like.'
    )
  return error


def _error(model, sites: Sites, kept, arguments, random) -> float:
  """The largest difference of the logits, relative where they are large."""
  wide = gate(model, sites)
  variables = _random_variables(wide, arguments, random)
  gates = {
    (*name.split('/'), 'gate'): np.isin(np.arange(n), kept[name])
    for name, n in sites.sizes.items()
  }
  gates = flax.traverse_util.unflatten_dict(gates)
  gates = jax.tree.map(
    lambda g, on: jnp.asarray(on, g.dtype), variables[wrap.GATES], gates
  )
  expected = jax.jit(wide.apply)({**variables, wrap.GATES: gates}, *arguments)
  thin = narrow(model, sites, {name: len(k) for name, k in kept.items()})
  sliced = slice_variables(model, sites, variables, kept)
  found = jax.jit(thin.apply)(sliced, *arguments)
  error = 0.0
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = max(error, np.abs(a - b).max() / max(1.0, np.abs(a).max()))
  return float(error)


def _random_variables(wrapped: wrap.Wrapped, arguments, random) -> Any:
  """Random weights, and statistics and biases that are not 0 and 1.

  Drawn by NumPy: `init` would compile one program for each shape.
  """
  shapes = jax.eval_shape(wrapped.init, jax.random.key(0), *arguments)

  precise = jax.dtypes.canonicalize_dtype(np.float64)

  def draw(path, leaf):
    name, floating = path[-1].key, jnp.issubdtype(leaf.dtype, jnp.inexact)
    if name in ('var', 'scale', 'gate'):
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
