"""Loads the trained network of a finished workdir."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections
from flax import linen as nn
from flax import traverse_util

from pfs_jax import config as configs
from pfs_jax import errors, fields, prune, runs, stages, storage

# Fields that name code, which is imported and called.
_CODE = tuple(f.name for f in fields.FIELDS if 'package.module' in f.doc)


def load(
  workdir: str | pathlib.Path,
  budget: str = '',
  config: ml_collections.ConfigDict | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
  """The narrow network that a run trained, with its weights.

  `module.apply(variables, x)` maps normalised images [N, H, W, C] to logits
  [N, classes].

  Args:
    workdir: The folder of a run with result.json.
    budget: The name of one of its budgets, such as 'keep0.3'; if empty, the
      budget whose result.json is in the workdir itself.
    config: The config of the run; if None, the one that result.json holds. For
      a model of your own (config.model.factory) it must be given: no code is
      imported only because a file names it.

  Returns:
    (module, variables), with the collections 'params' and 'batch_stats'.

  Raises:
    errors.UserError: If no training has finished there, a file is damaged, or
      the config is that of another run.
  """
  root = storage.expanded(workdir)
  path = root / budget / 'result.json'
  if not path.exists():  # The first budget's files are in the workdir itself.
    path = root / 'result.json'
  result = runs.read_result(path)
  if budget not in ('', result['budget']):
    raise errors.UserError(f'{root}: no training of {budget} has finished.')
  job = stages.Job(config or _config(path, result), root)
  names, counts = tuple(result['counts']), tuple(result['counts'].values())
  structure = prune.Structure(names, counts, result['macs'], result['params'])
  if names != job.network.cost_model.layers:
    raise errors.UserError(
      f'{path}: counts must name the layers of {job.model_name}, in order.'
    )
  _, _, module, state = stages.restore(job, result['budget'], structure)
  return module, dict(state.variables)


def _config(
  path: pathlib.Path, result: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """The config in result.json, checked; one that names code is refused."""
  c = configs.default()  # A field newer than the file stays at its default.
  there = traverse_util.flatten_dict(result.get('config', {}), sep='.')
  for name in there.keys() & fields.BY_NAME.keys():
    value = there[name]
    value = tuple(value) if isinstance(value, list) else value
    try:
      c.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as e:
      raise errors.UserError(f'{path}: config.{name} is wrong: {e}') from e
  configs.validate(c)
  for name in _CODE:
    if there.get(name):
      raise errors.UserError(
        f'{path} names code of your own (config.{name}): give the config, as '
        'in load(workdir, config=...). No code runs because a file names it.'
      )
  return c
