"""A structure: channel counts, in a JSON file that a person can edit."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec

from pfs_jax import errors, storage

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
      'latency_ms'), '' if no ceiling stopped the cut.
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
  floor: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
    """The counts as the published PyTorch code keeps them, in forward order."""
    return list(self.counts)

  def to_json(self) -> str:
    """A JSON text that a person can read and edit."""
    fields = dataclasses.asdict(self)
    layers = dict(zip(fields.pop('layers'), fields.pop('counts'), strict=True))
    fields['unused'] = self.unused
    return json.dumps({'schema': SCHEMA, 'counts': layers, **fields}, indent=2)

  @classmethod
  def from_json(cls, text: str, where: object = 'structure') -> Self:
    """Reads what `to_json` wrote, also if a person edited it.

    `where` is the name of the text in errors, such as the path of the file.

    Raises:
      errors.UserError: The text is no structure; one line names the field.

    >>> Structure.from_json('{"counts": 3}', 'x')
    Traceback (most recent call last):
    ...
    pfs_jax.errors.UserError: x: Expected `object`, got `int` - at `$.counts`.
    """
    file = storage.decode(text, _File, where)
    for layer, number in file.counts.items():
      if type(number) is not int or not 1 <= number < 2**31:
        raise errors.UserError(
          f'{where}: counts[{layer!r}] must be an integer >= 1 and < 2**31; '
          f'got {str(number)[:40]}.'
        )
    fields = msgspec.structs.asdict(file)
    del fields['schema'], fields['unused']
    counts = fields.pop('counts')
    made = cls(layers=tuple(counts), counts=tuple(counts.values()), **fields)
    try:
      made.to_json()
    except (TypeError, RecursionError) as e:
      raise errors.UserError(
        f'{where}: a ceiling of budget is no number, or it is nested deeply.'
      ) from e
    return made


_Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """What a structure file holds; see `Structure`."""

  schema: Literal['pfs_jax.structure/1']
  counts: dict[str, Any]
  macs: _Natural
  params: _Natural
  latency_ms: float | None = None
  budget: dict[str, Any] = {}
  floor: dict[str, int | float] = {}
  binding: str = ''
  tie_share: float = 0.0
  model: dict[str, Any] = {}
  source: dict[str, Any] = {}
  unused: dict[str, Any] = {}
