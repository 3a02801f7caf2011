"""The registry of models: name to module, gate sizes and cost model.

`width` is the base width of a family (None: its default), so channel expansion
is a wider one; `counts` are the channels of the gated layers, in the order of
`gate_sizes`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import costs, errors
from pfs_jax.models import mobilenet, resnet, slicing, vgg


@dataclasses.dataclass(frozen=True)
class Family:
  """What the registry knows of a model name.

  Attributes:
    build: (num_classes, width, counts, gated, multiplier, dtype, gate_site) ->
      module.
    gate_sizes: width -> {layer name: channels}, forward order.
    default_width: The base width that `None` stands for.
    multiplier: Whether block outputs can be widened too.
    acting: {layer name: layer that carries its gate} with gate_site 'acting',
      where that is another layer than with 'published'.
  """

  build: Callable[..., nn.Module]
  gate_sizes: Callable[[int], dict[str, int]]
  default_width: int
  multiplier: bool = False
  acting: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _family(room, name: str) -> Family:
  def build(num_classes, width, counts, gated, multiplier, dtype, gate_site):
    del multiplier, gate_site  # The published gates act here.
    return room.build(name, num_classes, width, counts, gated, dtype)

  return Family(
    build,
    functools.partial(room.gate_sizes, room.DEPTHS[name]),
    room.DEFAULT_WIDTH,
  )


def _resnet50() -> Family:
  def build(num_classes, width, counts, gated, multiplier, dtype, gate_site):
    del width, gate_site  # The counts say all; the published gates act here.
    return resnet.build_resnet50(num_classes, counts, gated, multiplier, dtype)

  return Family(
    build, resnet.resnet50_gate_sizes, resnet.RESNET50_WIDTH, multiplier=True
  )


def _mobilenet(name: str) -> Family:
  def build(num_classes, width, counts, *args):
    del width  # The counts say all.
    return mobilenet.build(name, num_classes, counts, *args)

  return Family(
    build,
    mobilenet.GATE_SIZES[name],
    mobilenet.DEFAULT_WIDTH,
    multiplier=name == 'mobilenet_v2',
    acting=mobilenet.ACTING[name],
  )


REGISTRY: dict[str, Family] = {
  **{
    name: _family(room, name) for room in (resnet, vgg) for name in room.DEPTHS
  },
  **{name: _mobilenet(name) for name in mobilenet.GATE_SIZES},
  'resnet50': _resnet50(),
}
GATE_SITES = ('acting', 'published')


def family(name: str) -> Family:
  """The registry's entry; an unknown name lists the known ones."""
  if name not in REGISTRY:
    raise errors.UserError(
      f'config.model.name must be one of {", ".join(REGISTRY)}; got {name!r}.'
    )
  return REGISTRY[name]


def gate_sizes(name: str, width: int | None = None) -> dict[str, int]:
  """{layer name: channels} of the gated layers, in forward order."""
  entry = family(name)
  return entry.gate_sizes(entry.default_width if width is None else width)


def build(
  name: str,
  num_classes: int,
  width: int | None = None,
  counts: Sequence[int] | None = None,
  gated: bool = False,
  multiplier: float = 1.0,
  dtype: Any = jnp.float32,
  gate_site: str = 'acting',
) -> nn.Module:
  """A Linen module: (x: [N, H, W, C], train=False) -> logits [N, num_classes].

  Args:
    name: A name of the registry.
    num_classes: Number of classes.
    width: Base width; None is the family's default (16 for the CIFAR ResNets,
      64 for VGG and ResNet-50, 32 for the MobileNets).
    counts: Channels of the gated layers in the order of `gate_sizes`; None is
      the full width.
    gated: Whether gated layers hold a [C] vector in the collection `gates`.
    multiplier: Widens block outputs in the families that have them.
    dtype: Dtype of the computation. Parameters, gates and statistics are
      float32, or float64 with dtype float64 (under `jax_enable_x64`).
    gate_site: Where the MobileNets' gates stand (`models.mobilenet`): 'acting',
      behind the depthwise convolution, or 'published', in front of it, where
      the next BatchNorm divides them out. No effect on the other families, or
      on what the gates are called.

  Raises:
    errors.UserError: Unknown name or gate site, wrong number of counts, counts
      below 1, or a multiplier for a family without one.
  """
  entry = family(name)
  width = entry.default_width if width is None else width
  if width < 1:
    raise errors.UserError(f'config.model.width must be >= 1; got {width}.')
  if multiplier != 1.0 and not entry.multiplier:
    raise errors.UserError(
      f'config.model.multiplier must be 1.0 for {name}; got {multiplier}.'
    )
  if gate_site not in GATE_SITES:
    raise errors.UserError(
      f'config.model.gate_site must be one of {", ".join(GATE_SITES)}; '
      f'got {gate_site!r}.'
    )
  sizes = entry.gate_sizes(width)
  counts = sizes.values() if counts is None else counts
  counts = tuple(int(c) for c in counts)
  if len(counts) != len(sizes) or min(counts) < 1:
    raise errors.UserError(
      f'counts of {name} must be {len(sizes)} integers >= 1, one for each '
      f'gated layer; got {len(counts)}, the least {min(counts, default=None)}.'
    )
  return entry.build(
    num_classes, width, counts, gated, multiplier, dtype, gate_site
  )


def gates_by_layer(name: str, gates: Mapping[str, Any]) -> dict[str, Any]:
  """The collection `gates` as {layer name: [C]}, in forward order.

  Either gate site's collection: a gate has the name of its layer in
  `gate_sizes` wherever it stands.
  """
  flat = {
    '/'.join(path[:-1]): gate
    for path, gate in flax.traverse_util.flatten_dict(gates).items()
  }
  acting = family(name).acting
  return {
    layer: flat[layer] if layer in flat else flat[acting[layer]]
    for layer in gate_sizes(name)
  }


def slice_variables(
  name: str,
  variables: Mapping[str, Any],
  kept: Mapping[str, Any],
  *,
  width: int | None = None,
  gate_site: str = 'acting',
) -> dict[str, Any]:
  """The variables of the narrow network that keeps these channels.

  In evaluation mode they give the logits of the wide network whose other gates
  are 0.

  Args:
    name: A name of the registry.
    variables: `params` and `batch_stats` of the wide network.
    kept: {layer name: sorted indices}, as `prune.kept` gives them.
    width: Base width of the wide network.
    gate_site: Where the gates stood that chose the channels.

  Raises:
    errors.UserError: With the published gate site in a network where it is not
      the acting one: a gate of 0 there is not a removed channel, since the
      next BatchNorm makes a constant of it.
  """
  if gate_site == 'published' and family(name).acting:
    raise errors.UserError(
      f"config.model.gate_site must be 'acting' to slice weights of {name}: a "
      'published gate of 0 is no removed channel (docs/gate_sites.md).'
    )
  model = cost_model(name, 10, 32, width=width)  # Only who feeds whom is used.
  return slicing.slice_variables(model, variables, kept)


@functools.lru_cache(maxsize=64)
def cost_model(
  name: str,
  num_classes: int,
  image_size: int,
  channels: int = 3,
  width: int | None = None,
  multiplier: float = 1.0,
) -> costs.CostModel:
  """MACs and parameters as exact functions of the counts.

  Traced once, abstractly; each later call of `.macs` or `.params` takes
  microseconds.

  Args:
    name: A name of the registry.
    num_classes: Number of classes.
    image_size: Side of the square images.
    channels: Channels of the images.
    width: Base width of the searched network; None is the default.
    multiplier: As for `build`.
  """
  sizes = gate_sizes(name, width)
  marked = build(
    name, num_classes, width, costs.marks(len(sizes)), multiplier=multiplier
  )
  calls = costs.record_module(marked, (image_size, image_size, channels))
  return costs.from_calls(calls, tuple(sizes), tuple(sizes.values()))


@functools.partial(jax.jit, static_argnums=(0, 2))
def init(
  module: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """New random variables of a module for images of shape (H, W, C).

  Compiled, so that the forward pass that `module.init` contains is dropped.
  """
  return module.init(key, jnp.zeros((1, *image_shape), jnp.float32))
