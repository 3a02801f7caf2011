"""A structure: channel counts, what they cost, and where they come from.

The few integers that pass from search to train, as a JSON file that a person
can read and edit. What is read back is checked field by field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pfs_jax import errors

SCHEMA = 'pfs_jax.structure/1'


@dataclasses.dataclass(frozen=True)
class Structure:
  """Channel counts and what they cost: all that passes from search to train.

  Attributes:
    layers: Names of the gated layers, forward order.
    counts: Channels kept in each.
    macs: Multiply-accumulates of one image.
    params: Parameters.
    latency_ms: Predicted milliseconds of one batch, where there was a latency
      model; else None.
    budget: What was asked: ceilings, minimum width, multiple; {} if nothing.
    floor: MACs and parameters of the narrowest structure allowed.
    binding: The ceiling of which the largest share is used ('macs', 'params',
      'latency_ms'), '' where none stopped the cut.
    tie_share: Share (0..1) of the kept channels whose gate equals that of some
      channel that was dropped: these were chosen by the tie rule, not by the
      search.
    model: What `models.build_from` needs to build the network; {} for a model
      of the user's own.
    source: Where the structure comes from: seed, config hash, checksum of the
      gates.
  """

  layers: tuple[str, ...]
  counts: tuple[int, ...]
  macs: int
  params: int
  latency_ms: float | None = None
  budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  floor: Mapping[str, int] = dataclasses.field(default_factory=dict)
  binding: str = ''
  tie_share: float = 0.0
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def unused(self) -> dict[str, float]:
    """What the ceilings left unused, by quantity."""
    return {
      quantity: self.budget[f'max_{quantity}'] - getattr(self, quantity)
      for quantity in ('macs', 'params', 'latency_ms')
      if self.budget.get(f'max_{quantity}') is not None
    }

  def to_list(self) -> list[int]:
    """The counts as the published PyTorch code keeps them: a plain list.

    It holds the gated layers in the forward order that `models.gate_sizes` has.
    """
    return list(self.counts)

  def to_json(self) -> str:
    """A JSON text that a person can read and edit."""
    fields = dataclasses.asdict(self)
    layers = dict(zip(fields.pop('layers'), fields.pop('counts'), strict=True))
    fields['unused'] = self.unused
    return json.dumps({'schema': SCHEMA, 'counts': layers, **fields}, indent=2)

  @classmethod
  def from_json(cls, text: str) -> Structure:
    """Reads what `to_json` wrote; raises UserError naming a bad field."""
    try:
      data = json.loads(text)
    except json.JSONDecodeError as e:
      raise errors.UserError(f'structure: not valid JSON: {e}.') from e
    if not isinstance(data, dict):
      raise errors.UserError('structure: must be a JSON object.')
    schema = data.pop('schema', None)
    if schema != SCHEMA:
      raise errors.UserError(
        f'structure: schema must be {SCHEMA!r}; got {schema!r}.'
      )
    counts = data.pop('counts', None)
    if not isinstance(counts, dict) or not counts:
      raise errors.UserError(
        'structure: counts must be a map from layer name to channels.'
      )
    for layer, number in counts.items():
      if type(number) is not int or number < 1:
        raise errors.UserError(
          f'structure: counts[{layer!r}] must be an integer >= 1; '
          f'got {number!r}.'
        )
    data.pop('unused', None)
    return cls(
      layers=tuple(counts), counts=tuple(counts.values()), **_typed(data)
    )


_FIELD_TYPES = {
  'macs': int,
  'params': int,
  'latency_ms': (int, float, type(None)),
  'budget': dict,
  'floor': dict,
  'binding': str,
  'tie_share': (int, float),
  'model': dict,
  'source': dict,
}


def _typed(data: dict[str, Any]) -> dict[str, Any]:
  """`data` if it holds the fields of a structure, each of its type."""
  for name in data:
    if name not in _FIELD_TYPES:
      raise errors.UserError(
        f'structure: unknown field {name!r}; known: '
        f'{", ".join(["schema", "counts", "unused", *_FIELD_TYPES])}.'
      )
  for name in ('macs', 'params'):
    if name not in data:
      raise errors.UserError(f'structure: field {name!r} is missing.')
  for name, value in data.items():
    if not isinstance(value, _FIELD_TYPES[name]) or isinstance(value, bool):
      raise errors.UserError(
        f'structure: {name} has the wrong type; got {value!r}.'
      )
  return data
