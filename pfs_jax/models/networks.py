"""A network to search, as the stages use it, and its structures."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from pfs_jax import costs, errors, gating, groups, structures
from pfs_jax.models import registry


@dataclasses.dataclass(frozen=True)
class Network:
  """A network to search, its channel groups, and a function for narrower ones.

  It is all that `stages` needs of a model, whether it is the registry's or the
  user's own.

  Attributes:
    module: The network that is searched, without gates.
    table: Its channel groups.
    reference: The network that budgets refer to, without gates.
    reference_macs: Its MACs.
    reference_params: Its parameters.
    build: counts -> the narrow module.
    description: What `Structure.model` holds.
  """

  module: nn.Module
  table: groups.Table
  reference: nn.Module
  reference_macs: int
  reference_params: int
  build: Callable[[Sequence[int]], nn.Module]
  description: Mapping[str, Any]

  @functools.cached_property
  def gated(self) -> gating.Wrapped:
    """The searched module, with the collection `gates`."""
    return gating.gate(self.module, self.table)

  @functools.cached_property
  def cost_model(self) -> costs.CostModel:
    """MACs and parameters of the narrow networks."""
    return self.table.cost_model()

  def narrow(self, counts: Sequence[int], gated: bool = False) -> nn.Module:
    """The module with `counts` channels in each group, forward order.

    If `gated`, it has a gate for each of these channels.
    """
    module = self.build(counts)
    return gating.gate(module, self.table.narrowed(counts)) if gated else module


def network(
  name: str,
  num_classes: int,
  image_size: int,
  channels: int,
  *,
  base_width: int | None = None,
  width: int | None = None,
  multiplier: float = 1.0,
  dtype: Any = jnp.float32,
  gate_site: str = 'acting',
  counts: Sequence[int] = (),
) -> Network:
  """The registry's model as a `Network`.

  Args:
    name: A name of the registry.
    num_classes: Number of classes.
    image_size: Side of the square images.
    channels: Channels of the images.
    base_width: Base width of the reference network; None: the family's.
    width: Base width of the searched network; None: `base_width`.
    multiplier: Widens the searched network's block outputs.
    dtype: Dtype of the computation.
    gate_site: As for `registry.build`.
    counts: Channels of the gated layers of the reference network, which then is
      also the searched one; () means those of the base width.
  """
  base_width = base_width or registry.default_width(name)
  width = width or base_width
  if counts and (width != base_width or multiplier != 1.0):
    raise errors.UserError(
      'config.model.counts must be () for a searched network that is wider or '
      f'narrower than the reference network; got {tuple(counts)}.'
    )
  shape, given = (num_classes, image_size, channels), tuple(counts) or None
  build = functools.partial(registry.build, name, num_classes, dtype=dtype)
  module = build(base_width, given)
  reference = registry.table(
    name, *shape, base_width, counts=given
  ).cost_model()
  return Network(
    module=build(width, given, multiplier=multiplier, gate_site=gate_site),
    table=registry.table(
      name, *shape, width, multiplier, dtype, gate_site, given
    ),
    reference=module,
    reference_macs=reference.macs(reference.widths),
    reference_params=reference.params(reference.widths),
    build=lambda counts: build(width, counts, multiplier=multiplier),
    description={
      'name': name,
      'base_width': base_width,
      'width': width,
      'multiplier': multiplier,
      'num_classes': num_classes,
      'image_size': image_size,
      'channels': channels,
      **({'counts': list(counts)} if counts else {}),
    },
  )


def structure_from_list(
  network: Network, counts: Sequence[int]
) -> structures.Structure:
  """The structure with these counts, such as a list of the published code.

  Raises:
    errors.UserError: As for `groups.Table.counts`.
  """
  model, counts = network.cost_model, network.table.counts(counts)
  return structures.Structure(
    layers=model.layers,
    counts=counts,
    macs=model.macs(counts),
    params=model.params(counts),
    model=network.description,
  )


def build_from(structure: structures.Structure) -> nn.Module:
  """The narrow network that a structure describes."""
  model = structure.model
  if not model.get('name'):
    raise errors.UserError(
      'structure: model.name is missing: prune.fit does not know the model. '
      'Use models.build(name, num_classes, counts=structure.counts), or '
      'surgery.narrow for a model of your own.'
    )
  sizes = registry.gate_sizes(model['name'], model.get('width'))
  if tuple(sizes) != structure.layers:
    raise errors.UserError(
      f'structure: the layers of {model["name"]} are '
      f'{", ".join(sizes)}; got {", ".join(structure.layers)}.'
    )
  return registry.build(
    model['name'],
    model['num_classes'],
    width=model.get('width'),
    counts=structure.counts,
    multiplier=model.get('multiplier', 1.0),
  )
