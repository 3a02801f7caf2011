"""A study's config, and the cells that follow from it.

    cells = seeds x values of one varied field x arms,

seed by seed, so that comparisons paired by seed are possible early. Cells that
would do the same work are one cell: uniform width, for example, does not depend
on the length of searches.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from pfs_jax import config, errors, rankings
from pfs_jax.studies import arms

# Part of the hash of cells and of what they share. Raise it when a new default
# of the config, or new code, changes the result of a cell with the same fields.
# 2: gradients on CPU without YNN (`cpu.compiler_options`).
REVISION = 2
_PRETRAINED = 'arm.pretrain_epochs'
# Scores whose cells depend on the fields of the wide network's training.
_WIDE = ('filters', 'scales', 'probe', 'tournament')


def default(
  name: str,
  base: ml_collections.ConfigDict,
  *,
  arms: Sequence[str],
  seeds: Sequence[int],
  field: str = '',
  values: Sequence[float] = (),
  baseline: str = '',
) -> ml_collections.ConfigDict:
  """A study, locked.

  Args:
    name: The name of the study and of its file in `results_dir`.
    base: The config of one run; each arm and value changes some of its fields.
    arms: Names of arms, see `arms.WORDS`.
    seeds: The seeds; each gives one run.
    field: The field that is varied, such as 'search.epochs', or
      'arm.pretrain_epochs'; '' for none.
    values: The values of that field.
    baseline: The arm, or the label of an arm at one value ('searched, epochs
      2'), that the others are compared with, paired by seed.
  """
  return ml_collections.ConfigDict(
    {
      'study': name,
      'base': base,
      'arms': tuple(arms),
      'seeds': tuple(seeds),
      'field': field,
      'values': tuple(values),
      'baseline': baseline,
      'results_dir': '',  # Where <study>.json is kept; '': in the workdir.
      'report_only': False,  # Print the tables of what there is, run nothing.
    }
  ).lock()


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study.

  Attributes:
    name: The arm's name.
    arm: The arm's properties.
    seed: The seed.
    variation: {field: value} if the varied field changes the work, else {}.
    config: The whole config of the run.
    wide: The config of all work before the cut. Of the arm's changes it has
      only those in fields of the search.
  """

  name: str
  arm: arms.Arm
  seed: int
  variation: Mapping[str, float]
  config: ml_collections.ConfigDict
  wide: ml_collections.ConfigDict

  @functools.cached_property
  def identity(self) -> dict[str, Any]:
    """The fields on which the cell's result depends, if not at their default.

    Fields at their default are left out, so that a field that is added later,
    with a default that changes nothing, keeps the hashes of finished cells.
    The ranking is in fields of the arm, as it is in the committed results.
    """
    arm = self.arm
    sections = ['search'] if arm.searches else []
    if arm.training != 'none':
      sections += ['train']
    if arm.scores in ('probe', 'tournament'):
      sections += ['train', 'probe']
    if arm.scores == 'tournament':
      sections += ['search', 'tournament']
    fields = changed(self.config, *sections, 'budget')
    if arm.pretrain_epochs or arm.scores in _WIDE:
      wide = changed(self.wide, 'train')
      fields |= {k.replace('config.', 'wide.'): v for k, v in wide.items()}
    ranking = fields.pop('config.budget.ranking', 'global')
    kind, power = rankings.parse(ranking)
    is_cost = kind == 'cost'
    return {
      **fields,
      'arm.scores': arm.scores,
      'arm.ranking': kind if is_cost else ranking,
      'arm.power': power if is_cost else 0.0,
      'arm.pretrain_epochs': arm.pretrain_epochs,
      'arm.penalty': arm.penalty,
      'arm.training': arm.training,
    }

  @functools.cached_property
  def hash(self) -> str:
    """12 hexadecimal digits of the identity; the name of the cell's folder."""
    return config.digest({**self.identity, 'revision': REVISION})

  @property
  def label(self) -> str:
    """The arm's name and the varied field with its value."""
    varied = [f'{k.split(".")[-1]} {v:g}' for k, v in self.variation.items()]
    return ', '.join([self.name, *varied])


def changed(c: ml_collections.ConfigDict, *sections: str) -> dict[str, Any]:
  """The seed, and the fields of `config.identity` that are not the default."""
  plain = config.identity(config.default(), *sections)
  found = config.identity(c, *sections)
  fields = {k: v for k, v in found.items() if v != plain[k]}
  return {'config.seed': c.seed, **fields}


def cell(
  base: ml_collections.ConfigDict,
  name: str,
  seed: int,
  variation: Mapping[str, Any] | None = None,
) -> Cell:
  """The cell of an arm: `base`, changed by the arm and by {field: value}.

  Raises:
    errors.UserError: If the arm or a field is unknown.
  """
  arm, variation = arms.parse(name), variation or {}
  wide = base.copy_and_resolve_references()
  fields = {'train.structure': '', 'train.reference': False, **variation}
  pretrained = fields.pop(_PRETRAINED, arm.pretrain_epochs)
  if 'budget.keep' in fields:
    fields['budget.keep'] = (float(fields['budget.keep']),)
  try:
    wide.update_from_flattened_dict({**fields, 'seed': seed})
  except (TypeError, ValueError) as e:
    raise errors.UserError(
      f'config.values do not fit {", ".join(variation)}: {e}.'
    ) from e
  if wide.model.width == wide.model.base_width:
    wide.model.width = 0  # The same network is the same cell.
  searched = {k: v for k, v in arm.overrides.items() if 'search.' in k}
  wide.update_from_flattened_dict(searched)
  c = wide.copy_and_resolve_references()
  c.update_from_flattened_dict(dict(arm.overrides))
  if arm.scores == 'full':  # This is always the reference network.
    c.update_from_flattened_dict(
      {
        'model.width': 0,
        'model.multiplier': 1.0,
        'budget.keep': (1.0,),
        'budget.max_macs': 0,
        'budget.max_params': 0,
        'budget.round_to': 1,
      }
    )
  epochs = min(pretrained, wide.train.epochs) if arm.searches else 0
  whole = epochs >= 0 and epochs == int(epochs)
  if not whole and epochs != wide.train.epochs:
    raise errors.UserError(
      f'{_PRETRAINED} must be a whole number of epochs, or all; got {epochs:g}.'
    )
  arm = dataclasses.replace(arm, pretrain_epochs=float(epochs))
  return Cell(name, arm, seed, variation, c, wide)


def _check(study: ml_collections.ConfigDict) -> None:
  def require(holds: bool, message: str) -> None:
    if not holds:
      raise errors.UserError(f'config.{message}')

  for field in ('arms', 'seeds'):
    given = study[field]
    require(given, f'{field} must not be empty.')
    distinct = len(set(given)) == len(given)
    require(distinct, f'{field} must name each once; got {given}.')
  for field, types, wanted in (
    ('seeds', (int,), 'integers'),
    ('values', (int, float), 'numbers'),
  ):
    odd = [v for v in study[field] if type(v) not in types]
    require(not odd, f'{field} must be {wanted}; got {odd and odd[0]!r}.')
  require(
    not study.base.model.factory,
    "base.model.factory must be '': the arms know only the registry's models.",
  )
  require(
    study.base.budget.ranking == 'global',
    "base.budget.ranking must be 'global': the arms say the ranking "
    '(searched+layer_mean, searched+cost1).',
  )
  budget = study.base.budget
  named = [*budget.keep, *budget.macs, *budget.params, *budget.latency_ms]
  require(
    len(named) == 1, f'base.budget must name one budget; it names {len(named)}.'
  )
  require(
    bool(study.field) == bool(study['values']),
    'field and config.values must be given together.',
  )
  known = ['', _PRETRAINED, *config.flat(study.base)]
  require(
    study.field in known or f'config.{study.field}' in known,
    f'field must be a field of config.base or {_PRETRAINED}; '
    f'got {study.field!r}.',
  )
  require(all(map(math.isfinite, study['values'])), 'values must be finite.')


def cells(study: ml_collections.ConfigDict) -> list[Cell]:
  """The cells of a study, seed by seed, each once.

  Raises:
    errors.UserError: If a field of the study or of a cell's config is wrong.
  """
  _check(study)
  variations = [{study.field: v} for v in study['values']] or [{}]
  found: dict[str, Cell] = {}
  for seed in study.seeds:
    for variation in variations:
      for name in study.arms:
        one = cell(study.base, name, seed, variation)
        config.validate(one.config)
        if one.hash not in found:
          found[one.hash] = one
        elif found[one.hash].name == name:  # The field has no effect here.
          found[one.hash] = dataclasses.replace(found[one.hash], variation={})
  known = dict.fromkeys([*study.arms, *(c.label for c in found.values())])
  if study.baseline and study.baseline not in known:
    raise errors.UserError(
      f'config.baseline must be one of {"; ".join(known)}; '
      f'got {study.baseline!r}.'
    )
  return list(found.values())
