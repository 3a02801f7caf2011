"""A tournament: candidates are cut to one budget, trained briefly, compared.

Successive halving: in each round the remaining candidates are trained by whole,
compressed schedules, with the same seeds and batches for all, and the half of
them with the lowest loss on held-out images goes on to trainings twice as long.
The incumbent, uniform width, takes part in every round. The last challenger
replaces it only if its gain, paired by seed, is larger than so many standard
errors as the config says. No test image is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from pfs_jax import (
  config,
  console,
  errors,
  prune,
  runs,
  scores,
  stages,
  storage,
)
from pfs_jax.studies import arms, plan, products, scoring

INCUMBENT = 'uniform'
Losses = Mapping[str, Sequence[float]]
_POLL_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Round:
  """Candidates besides the incumbent, epochs of each training, and seeds."""

  challengers: int
  epochs: float
  seeds: int


def rounds(challengers: int, epochs: float, seeds: int) -> list[Round]:
  """The rounds of a tournament; the last one has one challenger and all seeds.

  >>> [(r.challengers, r.epochs, r.seeds) for r in rounds(6, 1.0, 3)]
  [(6, 1.0, 1), (3, 2.0, 1), (1, 4.0, 3)]
  """
  found = []
  while challengers > 1:
    found.append(Round(challengers, epochs, 1))
    challengers, epochs = challengers // 2, 2 * epochs
  return [*found, Round(1, epochs, seeds)]


def best(losses: Losses, n: int) -> list[str]:
  """The n challengers with the lowest mean loss, the earlier among equals."""
  challengers = [name for name in losses if name != INCUMBENT]
  return sorted(challengers, key=lambda name: np.mean(losses[name]))[:n]


@dataclasses.dataclass(frozen=True)
class Decision:
  """Who is chosen, and the challenger's gain: mean and standard error."""

  chosen: str
  challenger: str
  gain: float
  error: float


def decide(losses: Losses, standard_errors: float) -> Decision:
  """The challenger if its paired gain exceeds so many standard errors.

  >>> losses = {'uniform': [0.5, 0.6, 0.5], 'tilt1': [0.4, 0.4, 0.5]}
  >>> decision = decide(losses, 1.0)
  >>> decision.chosen, round(decision.gain, 3), round(decision.error, 3)
  ('tilt1', 0.1, 0.058)

  Args:
    losses: {name: loss of each seed} of the incumbent and one challenger; of
      two seeds at least.
    standard_errors: The gain must be larger than so many, and larger than 0.
  """
  (challenger,) = (name for name in losses if name != INCUMBENT)
  gains = np.subtract(losses[INCUMBENT], losses[challenger])
  gain = float(gains.mean())
  error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
  won = gain > max(0.0, standard_errors * error)
  return Decision(challenger if won else INCUMBENT, challenger, gain, error)


# The mode.


def run(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Chooses a structure for `--mode=train`; processes share the work."""
  job = stages.Job(c, workdir)
  while True:
    try:
      found = choose(job, workdir)
      chosen = scored(job, found['chosen'], workdir).scores
      break
    except products.Busy:
      time.sleep(_POLL_SECONDS)  # Other processes are at all that is left.
  with storage.locked(workdir, wait=lambda: None):
    job.note_config()
    storage.write_json(workdir / 'tournament.json', found)
    structure = dataclasses.replace(
      job.cut_plain(chosen),
      model=job.network.description,
      source=source(job, found),
    )
    stages.write(job, job.budgets[0], structure, chosen)
  console.table(
    f'Loss on held-out images, {job.budgets[0].name}, {workdir}',
    found['columns'],
    found['rows'],
  )
  console.say(found['sentence'])


def source(job: stages.Job, found: Mapping[str, Any]) -> dict[str, Any]:
  """Where a structure of a tournament comes from."""
  names = ('chosen', 'gain', 'error', 'share')
  return {
    'budget': job.budgets[0].name,
    'seed': job.config.seed,
    'tournament': {name: found[name] for name in names},
  }


def choose(job: stages.Job, root: pathlib.Path) -> dict[str, Any]:
  """The content of tournament.json; does what is left of the work for it.

  Args:
    job: The run; the candidates are cut to its first budget.
    root: The folder under which searches, probes and trainings are shared.

  Raises:
    products.Busy: If other processes are at all that is left.
    errors.UserError: If the config does not allow a tournament.
  """
  c = job.config
  fields = plan.changed(c, 'search', 'train', 'probe', 'tournament')
  fields |= plan.differing(c, 'budget')
  folder = products.folder(root, 'tournament', fields)
  path = folder / 'tournament.json'
  if path.exists():
    return storage.read_json(path)
  check(job)
  structures: dict[str, prune.Structure] = {}
  made: dict[str, float] = {}
  entries = {n: functools.partial(scored, job, n, root) for n in candidates(c)}
  for name, entry in all_of(entries).items():
    structures[name] = job.cut_plain(entry.scores)
    made |= entry.seconds
  names, log = list(structures), []
  for round_ in _rounds(c):
    seeds = range(round_.seeds)
    done = all_of(
      {
        (n, i): functools.partial(
          _training, job.reseeded(i + 1), structures[n], round_.epochs, folder
        )
        for i in seeds
        for n in names
      }
    )
    losses = {n: [done[n, i]['loss'] for i in seeds] for n in names}
    log.append({'epochs': round_.epochs, 'losses': losses})
    made |= {t['name']: t['seconds'] for t in done.values()}
    last = done[INCUMBENT, 0]
    names = [INCUMBENT, *best(losses, round_.challengers // 2)]
  whole = last['seconds'] / _cost_of_training(job, round_.epochs)
  decision = decide(losses, c.tournament.standard_errors)
  found = _facts(job, decision, log, structures, sum(made.values()), whole)
  storage.write_json(path, found)
  return found


def candidates(c: ml_collections.ConfigDict) -> list[str]:
  """The names of the candidates, the incumbent first, each once."""
  return list(dict.fromkeys([INCUMBENT, *c.tournament.candidates]))


def _rounds(c: ml_collections.ConfigDict) -> list[Round]:
  fields = c.tournament
  return rounds(len(candidates(c)) - 1, fields.epochs, fields.seeds)


def scored(job: stages.Job, name: str, root: pathlib.Path) -> scoring.Scored:
  """The scores of a candidate: an arm, with '#i' those of another seed.

  Raises:
    products.Busy: If another process is at its search or probe.
  """
  return scoring.scored(_cell(job, name), job, root)


def _cell(job: stages.Job, name: str) -> plan.Cell:
  """The candidate as a cell of a study, with nothing ranked after its arm."""
  arm, _, number = name.partition('#')
  plain = {'budget.ranking': 'global'}
  return plan.cell(
    job.config, arm, config.other_seed(job.config.seed, int(number or 0)), plain
  )


def all_of(tasks: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
  """Does each task; raises Busy at the end if another process is at one."""
  found, busy = {}, None
  for name, task in tasks.items():
    try:
      found[name] = task()
    except products.Busy as e:
      busy = e
  if busy is not None:
    raise busy
  return found


def _training(
  job: stages.Job,
  structure: prune.Structure,
  epochs: float,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """{name, loss, seconds} of one training; equal structures share it."""
  counts = config.digest({'counts': list(structure.counts)})
  folder = folder / f'{counts}-{epochs:g}epochs-seed{job.config.seed}'
  path = folder / 'loss.json'

  def train() -> None:
    module = job.network.narrow(structure.counts)
    stages.fit(job, module, folder, 'tournament', epochs, hold_out=True)
    last = runs.read_metrics(folder)[-1]
    found = {'loss': last['validation_loss'], 'seconds': last['seconds']}
    storage.write_json(path, {'name': folder.name, **found})
    products.forget_programs()

  products.make(path, folder, train)
  return storage.read_json(path)


# Checks and costs.


def check(job: stages.Job) -> None:
  """Refuses what cannot be a tournament, before anything is trained."""
  c = job.config
  if len(job.budgets) > 1:
    raise errors.UserError(
      f'config.budget must name one budget for a tournament; '
      f'got {", ".join(b.name for b in job.budgets)}.'
    )
  stages.check_budget(job, job.budgets[0])
  if not c.data.validation_examples:
    raise errors.UserError(
      'config.data.validation_examples must be >= 1 for a tournament; got 0.'
    )
  for name in candidates(c):
    arms.check_candidate(name)
  if len(candidates(c)) < 2:
    raise errors.UserError(
      f'config.tournament.candidates must name one besides {INCUMBENT}; '
      f'got {c.tournament.candidates!r}.'
    )
  last = _rounds(c)[-1]
  if last.epochs > c.train.epochs:
    most = c.train.epochs * c.tournament.epochs / last.epochs
    raise errors.UserError(
      f'config.tournament.epochs must be <= {most:.3g}, so that the last of '
      f'{len(_rounds(c))} rounds is no longer than the training of '
      f'{c.train.epochs:g} epochs; got {c.tournament.epochs:g}.'
    )
  share = cost(job)
  if share > c.tournament.share:
    raise errors.UserError(
      f'config.tournament.share must be >= {math.ceil(100 * share) / 100:g}, '
      f'what {len(candidates(c))} candidates cost of a training of '
      f'{c.train.epochs:g} epochs; got {c.tournament.share:g}. Take fewer '
      'candidates, seeds or epochs.'
    )


def _cost_of_training(job: stages.Job, epochs: float) -> float:
  """Epochs without the held-out images, as a share of one whole training."""
  held_out, every = (
    job.data.train_source('train', hold_out=out).steps_per_epoch
    for out in (True, False)
  )
  return epochs * held_out / (job.config.train.epochs * every)


def cost(job: stages.Job) -> float:
  """What a tournament costs, as a share of one training of a candidate.

  By steps and MACs: a step of a search, which needs no gradients of weights,
  counts as two thirds of a training step of the wide network.
  """
  c, model = job.config, job.network.cost_model
  total = sum(
    _cost_of_training(job, (r.challengers + 1) * r.seeds * r.epochs)
    for r in _rounds(c)
  )
  cells = [_cell(job, name) for name in candidates(c)]
  if any(cell.arm.scores == 'probe' for cell in cells):
    total += stages.probe_cost(job)
  wide = model.macs(model.widths) / job.cut_plain(scores.equal(model)).macs
  searches = {
    cell.wide.to_json(): cell.wide.search.epochs
    for cell in cells
    if cell.arm.searches
  }
  return total + sum(
    _cost_of_training(job, 2 / 3 * wide * epochs)
    for epochs in searches.values()
  )


# What is told.


def _facts(job, decision, log, structures, seconds, whole) -> dict[str, Any]:
  """The content of tournament.json."""
  columns = ['candidate', *(f'{r["epochs"]:g} epochs' for r in log), 'MACs', '']
  rows = []
  for name, structure in structures.items():
    cells = [
      f'{np.mean(r["losses"][name]):.4f}' if name in r['losses'] else ''
      for r in log
    ]
    mark = 'chosen' if name == decision.chosen else ''
    rows.append([name, *cells, f'{structure.macs:,}', mark])
  n = len(log[-1]['losses'][INCUMBENT])
  numbers = (
    f'{decision.gain:+.4f}, standard error {decision.error:.4f}, n = {n}'
  )
  if decision.chosen == INCUMBENT:
    sentence = (
      f'Uniform width stays: the best challenger, {decision.challenger}, does '
      f'not beat it clearly (gain in loss {numbers}).'
    )
  else:
    sentence = (
      f'{decision.chosen} beats uniform width (gain in loss {numbers}).'
    )
  share = seconds / whole
  return {
    'chosen': decision.chosen,
    'challenger': decision.challenger,
    'gain': decision.gain,
    'error': decision.error,
    'rounds': log,
    'layers': list(job.network.cost_model.layers),
    'counts': {name: list(s.counts) for name, s in structures.items()},
    'seconds': round(seconds, 1),
    'share': round(share, 3),
    'columns': columns,
    'rows': rows,
    'sentence': f'{sentence} It took {console.duration(seconds)}, '
    f'{share:.0%} of one training.',
  }
