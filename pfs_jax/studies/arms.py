"""Arms of a study: ways to choose a structure, and to train it.

An arm is a few words joined by '+': 'searched', 'searched+cost0.5',
'uniform+scratch_b', 'filters+rewind'. It is a source of scores, {layer: [C]
float}, and changes to the config. All arms are cut by `prune.cut` to the same
ceiling on the MACs, by the same rules of minimum width and ties.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pfs_jax import errors, rankings


@dataclasses.dataclass(frozen=True)
class Arm:
  """The properties of an arm.

  Attributes:
    scores: Where the scores of the channels come from: 'gates' (a search),
      'equal' (uniform width), 'random' (a uniform draw per channel), 'shuffled'
      (the counts of a search, permuted among layers of equal width), 'filters'
      (L1 norm of trained filters over its layer's mean), 'scales' (|BatchNorm
      scale| after network slimming), 'profile' (a tilt), 'probe' (the loss that
      dropped channels cost), 'tournament' (those of the best candidate), 'full'
      (the whole network).
    pretrain_epochs: Epochs for which the weights are trained before the search;
      inf, or any number above config.train.epochs, stands for that number.
    penalty: Weight of the L1 norm of the BatchNorm scales in network slimming.
    training: 'scratch' (new random weights), 'inherit' (the weights that the
      kept channels had when they were scored), 'rewind' (their first random
      weights), or 'none' (only the structure).
    overrides: Fields of the config, such as the ranking.
  """

  scores: str = 'gates'
  pretrain_epochs: float = 0.0
  penalty: float = 0.0
  training: str = 'scratch'
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def searches(self) -> bool:
    """Whether the arm includes a search of gates."""
    return self.scores in ('gates', 'shuffled')


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
  'seeing': {'search.train_classifier': True},
  'epochs10': {'search.epochs': 10.0},
  'min_share': {'budget.min_share': 0.25},
  'scratch_b': {'train.scratch': 'B'},
  'fine_tune': {'training': 'inherit', 'train.learning_rate': 0.01},
  'rewind': {'training': 'rewind'},
  'structure': {'training': 'none'},
}


def _changes_of_ranking(word: str) -> dict[str, Any]:
  """The changes that a ranking makes; UserError for unknown words."""
  if not rankings.known(word):
    raise errors.UserError(
      f'an arm must be of the words {", ".join(WORDS)} and the rankings '
      f'{rankings.KNOWN} (X: a number), joined by +; got {word!r}.'
    )
  kind, _ = rankings.parse(word)
  change = {'budget.ranking': 'cost1' if word == 'cost' else word}
  scores = {'tilt': 'profile', 'sensitivity': 'probe'}.get(kind)
  return {**change, 'scores': scores} if scores else change


def parse(name: str) -> Arm:
  """The arm that words joined by '+' describe; UserError for unknown words."""
  change: dict[str, Any] = {}
  for word in name.split('+'):
    change |= WORDS[word] if word in WORDS else _changes_of_ranking(word)
  overrides = {k: change.pop(k) for k in list(change) if '.' in k}
  arm = Arm(**change, overrides=overrides)
  weights = ('gates', 'filters', 'scales')
  if arm.training in ('inherit', 'rewind') and arm.scores not in weights:
    raise errors.UserError(f'the arm {name!r} has no weights to start from.')
  return arm
