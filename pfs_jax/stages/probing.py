"""The probe stage: which layers of the network are too wide or too narrow."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from pfs_jax import (
  config,
  console,
  costs,
  errors,
  models,
  probe,
  runs,
  scores,
  storage,
)
from pfs_jax.stages import cutting, training
from pfs_jax.stages.job import Job


def run(job: Job) -> None:
  """Probes uniform width at the first budget; writes and prints probe.json."""
  path = job.workdir / 'probe.json'
  found = measure(job, job.workdir / 'probe')
  storage.write_json(path, found, sealed=True)
  title = f'Rise of the loss for each million MACs, {found["budget"]}, {path}'
  console.table(title, found['columns'], found['rows'])
  console.say(found['sentence'])


def measure(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """The probe of the first budget, made or read from the folder.

  Raises:
    errors.UserError: The probe costs more than config.probe.share of a
      training, or no images are held out.
  """
  budget = job.budgets[0]
  cutting.check_budget(job, budget)
  fields = config.identity(job.config, 'train', 'probe')
  runs.claim(folder, {**fields, 'budget': budget.name})
  path = folder / 'probe.json'
  if not path.exists():
    cost(job)  # It may refuse the probe, before anything is trained.
    storage.write_json(path, _measure(job, folder), sealed=True)
    runs.barrier('probe')
  return storage.read_json(path)


def cost(job: Job) -> float:
  """What a probe costs, as a share of one training of the narrow network.

  A step of training counts as three forward passes.

  Raises:
    errors.UserError: No images are held out, or the cost is more than allowed.
  """
  c, field = job.config.probe, 'config.data.validation_examples'
  if not job.config.data.validation_examples:
    raise errors.UserError(f'{field} must be >= 1 for a probe; got 0.')
  batch_size, epochs = job.config.train.batch_size, job.config.train.epochs
  epoch, every = (
    len(job.data.chosen('train', out)) // batch_size * batch_size
    for out in (True, False)
  )
  batch = min(job.config.data.eval_batch_size, job.data.validation().size)
  layers = len(job.network.cost_model.layers) + 1
  each = 3 * c.epochs * epoch + layers * c.draws * batch
  share = c.seeds * c.steps * each / (3 * epochs * every)
  if share > c.share:
    raise errors.UserError(
      f'config.probe.share must be >= {math.ceil(100 * share) / 100:g}, the '
      f'cost of the probe as a share of a training of {epochs:g} epochs; got '
      f'{c.share:g}.'
    )
  return share


def _measure(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """The content of probe.json, after steps of probing and widening."""
  c, model = job.config.probe, job.network.cost_model
  after = dict.fromkeys(model.layers, 1.0)
  seconds = 0.0
  for step in range(c.steps):
    before = after
    counts = job.cut_plain(job.widened(before)).counts
    values = []
    for i in range(c.seeds):
      part = folder / f'step{step}-seed{i}'
      found = _rises(job.reseeded(i), counts, part)
      values.append(found['rises'])
      seconds += float(found.get('seconds', 0))  # An older file lacks it.
    findings = probe.finding(model.layers, np.stack(values))
    after = scores.damped(findings.losses, c.damping, before)
  rows = []
  for layer, count in zip(model.layers, counts, strict=True):
    loss = f'{findings.losses[layer]:.4g}'
    error = f'{findings.errors[layer]:.2g}'
    verdict = 'too wide' if layer in findings.wide else ''
    verdict = 'too narrow' if layer in findings.narrow else verdict
    weight = f'{after[layer]:.2f}'
    rows.append([layer, str(count), loss, error, verdict, weight])
  return {
    'budget': job.budgets[0].name,
    'layers': list(model.layers),
    'counts': list(counts),
    'losses': np.concatenate(values).T.tolist(),
    'mean': findings.losses,
    'error': findings.errors,
    'slope': findings.slope,
    'wide': list(findings.wide),
    'narrow': list(findings.narrow),
    'before': before,
    'damping': c.damping,
    'sentence': findings.sentence,
    'seconds': round(seconds, 3),
    'columns': ['layer', 'channels', 'loss', 'standard error', '', 'weight'],
    'rows': rows,
  }


def _rises(
  job: Job, counts: Sequence[int], folder: pathlib.Path
) -> dict[str, np.ndarray]:
  """{'rises': [n, L], 'seconds': the time that they took, also before a stop}.

  The rises of the loss of a narrow network trained with channel dropout; read
  from a file of the folder if they are already there.
  """
  path = folder / 'rises.npz'
  if path.exists():
    return storage.read_arrays(path)
  c, wide = job.config, job.network.cost_model
  module = job.network.narrow(counts, gated=True)
  key = config.key(c.seed, 'probe weights')
  variables = dict(models.init(module, key, job.image_shape))
  del variables['gates']
  state = training.fit(
    job,
    probe.ChannelDropout(module, c.probe.dropout),
    folder,
    'probe',
    c.probe.epochs,
    variables,
    hold_out=True,
  )
  clock = runs.Clock(folder)  # It goes on from the training's last record.
  rises = probe.rises(
    module,
    state.variables,
    costs.CostModel(wide.layers, counts, wide.ops),
    job.data.validation(),
    c.probe.draws,
    scores.generator(c.seed, 'probe draws'),
  )
  found = {'rises': rises, 'seconds': np.array(clock.seconds())}
  storage.write_arrays(path, found, sealed=True)
  runs.barrier('rises')
  return found
