"""A network to search as the stages see it, and structures of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from pfs_jax import costs, errors, prune
from pfs_jax.models import registry


@dataclasses.dataclass(frozen=True)
class Network:
  """A network to search, what it costs, and the way to its narrower selves.

  All that `stages` needs to know of a model, whether it is the registry's or
  the user's own.

  Attributes:
    gated: The module that is searched, with the collection `gates`.
    cost_model: Its costs by counts.
    reference: The network that budgets refer to, ungated.
    reference_macs: Its MACs.
    reference_params: Its parameters.
    by_layer: The collection `gates` -> {layer name: [C]}, forward order.
    narrow: counts -> the narrow module; with gated=True, with the collection
      `gates`.
    slice_variables: (variables, kept) -> variables of the narrow module.
    description: What `Structure.model` holds.
  """

  gated: nn.Module
  cost_model: costs.CostModel
  reference: nn.Module
  reference_macs: int
  reference_params: int
  by_layer: Callable[[Mapping[str, Any]], dict[str, Any]]
  narrow: Callable[..., nn.Module]
  slice_variables: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
  description: Mapping[str, Any]


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
) -> Network:
  """The registry's model as a `Network`.

  Args:
    name: A name of the registry.
    num_classes: Number of classes.
    image_size: Side of the square images.
    channels: Channels of the images.
    base_width: Base width of the reference network; None: the family's.
    width: Base width of the searched network; None: `base_width`.
    multiplier: Of the searched network's block outputs.
    dtype: Dtype of the computation.
    gate_site: As for `build`.
  """
  base_width = base_width or registry.family(name).default_width
  width = width or base_width
  shape = (num_classes, image_size, channels)
  reference = registry.cost_model(name, *shape, base_width)
  return Network(
    gated=registry.build(
      name,
      num_classes,
      width,
      gated=True,
      multiplier=multiplier,
      dtype=dtype,
      gate_site=gate_site,
    ),
    cost_model=registry.cost_model(name, *shape, width, multiplier),
    reference=registry.build(name, num_classes, base_width, dtype=dtype),
    reference_macs=reference.macs(reference.widths),
    reference_params=reference.params(reference.widths),
    by_layer=functools.partial(registry.gates_by_layer, name),
    narrow=lambda counts, gated=False: registry.build(
      name,
      num_classes,
      width,
      counts,
      gated=gated,
      multiplier=multiplier,
      dtype=dtype,
      gate_site=gate_site,
    ),
    slice_variables=functools.partial(
      registry.slice_variables, name, width=width, gate_site=gate_site
    ),
    description={
      'name': name,
      'base_width': base_width,
      'width': width,
      'multiplier': multiplier,
      'num_classes': num_classes,
      'image_size': image_size,
      'channels': channels,
    },
  )


def structure_from_list(
  network: Network, counts: Sequence[int]
) -> prune.Structure:
  """The structure with a plain list of counts, as the published code keeps it.

  Args:
    network: The searched network.
    counts: Channels of its gated layers in forward order.

  Raises:
    errors.UserError: The list has another length, or an entry is no integer in
      [1, width of its layer].
  """
  model = network.cost_model
  if not isinstance(counts, list | tuple) or len(counts) != len(model.layers):
    raise errors.UserError(
      f'a list of counts must have {len(model.layers)} entries, one for each '
      f'gated layer; got {len(counts)}.'
    )
  for layer, width, count in zip(
    model.layers, model.widths, counts, strict=True
  ):
    if type(count) is not int or not 1 <= count <= width:
      raise errors.UserError(
        f'the count of {layer} must be an integer in [1, {width}]; got '
        f'{count!r}.'
      )
  return prune.Structure(
    layers=model.layers,
    counts=tuple(counts),
    macs=model.macs(counts),
    params=model.params(counts),
    model=network.description,
  )


def build_from(
  structure: prune.Structure, dtype: Any = jnp.float32
) -> nn.Module:
  """The narrow network that a structure describes."""
  model = dict(structure.model)
  if not model.get('name'):
    raise errors.UserError(
      "structure: model.name is missing: it describes a model of the user's "
      'own; build that one with surgery.narrow.'
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
    dtype=dtype,
  )
