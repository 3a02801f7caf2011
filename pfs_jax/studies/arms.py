"""Arms of a study: ways to get a structure, and to train it.

An arm is a few words joined by '+', each a change to the fields of `Arm`:
'searched', 'searched+cost0.5', 'uniform+scratch_b', 'filters+rewind'. All arms
end in scores, {layer: [C] float}, that `prune.fit` cuts to the same ceiling on
the MACs, by the same rules of minimum width and ties.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax
import numpy as np

from pfs_jax import errors, rankings


@dataclasses.dataclass(frozen=True)
class Arm:
  """What tells one arm from another.

  Attributes:
    scores: Where the scores of the channels come from: 'gates' (a search),
      'equal' (uniform width), 'random' (a uniform draw per channel), 'shuffled'
      (the counts of a search, permuted among layers of equal width), 'filters'
      (L1 norm of trained filters over its layer's mean), 'scales' (|BatchNorm
      scale| after network slimming), 'profile' (a tilt), 'probe' (the loss that
      dropped channels cost), 'tournament' (those of the best candidate), 'full'
      (nothing is cut).
    ranking: A name of `rankings`, by which the scores are compared.
    power: The exponent of the cost, with the ranking 'cost'.
    pretrain_epochs: Epochs for which the weights were trained before the
      search; at most (and inf: as many as) config.train.epochs.
    penalty: Weight of the L1 norm of the BatchNorm scales in network slimming.
    training: 'scratch' (new random weights), 'inherit' (the kept channels'
      weights where they were scored), 'rewind' (the same channels' first
      random values), or 'none' (only the structure).
    overrides: Fields of the config.
  """

  scores: str = 'gates'
  ranking: str = 'global'
  power: float = 0.0
  pretrain_epochs: float = 0.0
  penalty: float = 0.0
  training: str = 'scratch'
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def searches(self) -> bool:
    """Whether a search of gates is part of it."""
    return self.scores in ('gates', 'shuffled')

  @property
  def untrained(self) -> bool:
    """Whether its scores need nothing but the cost model and the seed."""
    return self.scores in ('full', 'equal', 'random', 'profile')


# Fine-tuning starts at a tenth of the recipe's rate: at the whole rate the
# first epochs undo what was inherited.
WORDS: dict[str, dict[str, Any]] = {
  'full': {'scores': 'full'},
  'searched': {'scores': 'gates'},
  'pretrained': {'scores': 'gates', 'pretrain_epochs': math.inf},
  'uniform': {'scores': 'equal'},
  'random': {'scores': 'random'},
  'shuffled': {'scores': 'shuffled'},
  'filters': {'scores': 'filters'},
  'slimming': {'scores': 'scales', 'penalty': 1e-4},
  'tournament': {'scores': 'tournament'},
  'seeing': {'overrides': {'search.train_classifier': True}},
  'epochs10': {'overrides': {'search.epochs': 10.0}},
  'min_share': {'overrides': {'budget.min_share': 0.25}},
  'scratch_b': {'overrides': {'train.scratch': 'B'}},
  'fine_tune': {
    'training': 'inherit',
    'overrides': {'train.learning_rate': 0.01},
  },
  'rewind': {'training': 'rewind'},
  'structure': {'training': 'none'},
}


def _ranking(word: str) -> dict[str, Any]:
  """What the name of a ranking changes; unknown words list the known ones."""
  if not rankings.known(word):
    raise errors.UserError(
      f'an arm must be of the words {", ".join(WORDS)} and the rankings '
      f'{rankings.KNOWN} (X: a number), joined by +; got {word!r}.'
    )
  kind, number = rankings.parse(word)
  if kind == 'cost':
    return {'ranking': kind, 'power': 1.0 if number is None else number}
  scores = {'tilt': 'profile', 'sensitivity': 'probe'}.get(kind)
  return {'ranking': word, **({'scores': scores} if scores else {})}


def check_candidate(name: str) -> None:
  """Refuses the name of an arm that cannot take part in a tournament."""
  arm, _, number = name.partition('#')
  found = parse(arm)
  changed = [k for k in found.overrides if not k.startswith('search.')]
  scores = ('gates', 'equal', 'random', 'profile', 'probe')
  if (
    found.scores not in scores
    or found.training != 'scratch'
    or found.pretrain_epochs
    or changed
    or not (number.isdigit() if '#' in name else True)
  ):
    raise errors.UserError(
      f'config.tournament.candidates must be searches, rankings, uniform or '
      f'random, with #i for seed i; got {name!r}.'
    )


def parse(name: str) -> Arm:
  """The arm that words joined by '+' describe; unknown ones list the known."""
  fields: dict[str, Any] = {}
  for word in name.split('+'):
    change = dict(WORDS[word] if word in WORDS else _ranking(word))
    overrides = {**fields.get('overrides', {}), **change.pop('overrides', {})}
    fields = {**fields, **change, 'overrides': overrides}
  arm = Arm(**fields)
  if arm.training in ('inherit', 'rewind') and arm.scores in (
    'full',
    'equal',
    'random',
    'shuffled',
    'profile',
    'probe',
    'tournament',
  ):
    raise errors.UserError(
      f'config.arms: {name!r} has no weights to start from.'
    )
  return arm


def folded(
  variables: Mapping[str, Any],
  gates: Mapping[str, Any],
  norms: Mapping[str, str],
) -> dict[str, Any]:
  """Variables with the gates multiplied into BatchNorm's scale and bias.

  Args:
    variables: Those of the network without gates.
    gates: {layer: [C]}.
    norms: {layer: path of the BatchNorm whose output its gates multiply}.
  """
  flat = flax.traverse_util.flatten_dict(dict(variables))
  for layer, gate in gates.items():
    for name in ('scale', 'bias'):
      path = ('params', *norms[layer].split('/'), name)
      flat[path] = np.asarray(flat[path]) * np.asarray(gate)
  return flax.traverse_util.unflatten_dict(flat)
