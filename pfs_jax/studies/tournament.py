"""A tournament: candidates are cut to one budget, trained briefly, compared.

Successive halving: in each round the remaining candidates are trained by whole,
compressed schedules, with the same seeds and batches for all, and the half of
them with the lowest loss on held-out images goes on to trainings twice as long.
The incumbent, uniform width, takes part in every round. The last challenger
replaces it only if its gain, paired by seed, exceeds the number of standard
errors that the config asks for. No test image is read.
"""

import functools
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from pfs_jax import config, console, errors, prune, runs, stages, storage
from pfs_jax.studies import arms, plan, products

INCUMBENT = 'uniform'
Losses = Mapping[str, Sequence[float]]
DIVERGED = 1e6  # The loss that stands for a training that diverged.
_POLL_SECONDS = 1.0


def rounds(
  challengers: int, epochs: float, seeds: int
) -> list[tuple[int, float, int]]:
  """(challengers, epochs, seeds) of each round; only the last has all seeds.

  >>> rounds(6, 1.0, 3)
  [(6, 1.0, 1), (3, 2.0, 1), (1, 4.0, 3)]
  """
  found = []
  while challengers > 1:
    found.append((challengers, epochs, 1))
    challengers, epochs = challengers // 2, 2 * epochs
  return [*found, (1, epochs, seeds)]


def best(losses: Losses, n: int) -> list[str]:
  """The n challengers with the lowest mean loss, the earlier among equals."""
  challengers = [name for name in losses if name != INCUMBENT]
  return sorted(challengers, key=lambda name: np.mean(losses[name]))[:n]


def decide(losses: Losses, standard_errors: float) -> dict[str, Any]:
  """Chooses the challenger if its paired gain exceeds the standard errors.

  >>> losses = {'uniform': [0.5, 0.6, 0.5], 'tilt1': [0.4, 0.4, 0.5]}
  >>> decide(losses, 1.0)['chosen']
  'tilt1'

  Args:
    losses: {name: loss of each seed} of the incumbent and one challenger, for
      at least two seeds.
    standard_errors: The gain must exceed this number of them, and exceed 0.

  Returns:
    'chosen' and 'challenger' (names), and the challenger's 'gain' (mean) and
    its 'error' (standard error).
  """
  (challenger,) = (name for name in losses if name != INCUMBENT)
  gains = np.subtract(losses[INCUMBENT], losses[challenger])
  gain = float(gains.mean())
  error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
  won = gain > max(0.0, standard_errors * error)
  chosen = challenger if won else INCUMBENT
  return dict(chosen=chosen, challenger=challenger, gain=gain, error=error)


def run(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Chooses a structure for `--mode=train`; processes share the work."""
  job = stages.Job(c, workdir)
  with runs.giving_back(workdir):
    sections = ('search', 'train', 'probe')
    name = {'budget': job.budgets[0].name}
    claimed, done = (workdir / n for n in ('tournament', 'tournament.json'))
    if claimed.exists() or not done.exists():  # An older one has no claim.
      runs.claim(claimed, config.identity(c, *sections) | name)
    while True:
      try:
        found = choose(job, workdir)
        chosen = scored(job, found['chosen'], workdir).scores
        break
      except products.Busy:
        time.sleep(_POLL_SECONDS)  # Other processes do all the rest.
  budget = job.budgets[0]
  source = {name: found[name] for name in ('chosen', 'gain', 'error', 'share')}
  with storage.locked(workdir, wait=lambda: None):
    structure = job.cut_plain(chosen)
    stages.write(job, budget, structure, chosen, {'tournament': source})
    job.note_config()
    storage.write_json(workdir / 'tournament.json', found, sealed=True)
  title = f'Loss on held-out images, {budget.name}, {workdir}'
  console.table(title, found['columns'], found['rows'])
  console.say(found['sentence'])


def choose(job: stages.Job, root: pathlib.Path) -> dict[str, Any]:
  """The content of tournament.json, after the work for it that remains.

  Args:
    job: The run; the candidates are cut to its budget.
    root: The folder under which searches, probes and trainings are shared.

  Raises:
    products.Busy: If other processes do all the work that remains.
    errors.UserError: If the config does not allow a tournament.
  """
  c = job.config
  sections = ('search', 'train', 'probe', 'tournament', 'budget')
  fields = plan.changed(c, *sections)
  folder = products.folder(root, 'tournament', fields)
  path = folder / 'tournament.json'
  if runs.agreed(path.exists()):
    return storage.read_json(path)
  check(job)
  tasks = {n: functools.partial(scored, job, n, root) for n in candidates(c)}
  entries = all_of(tasks)
  structures = {n: job.cut_plain(e.scores) for n, e in entries.items()}
  # Another set of candidates has the same trainings.
  trained = products.folder(root, 'short', plan.changed(c, 'train'))
  seconds: dict[str, float] = {}
  for entry in entries.values():
    seconds |= entry.seconds
  names, log = list(structures), []
  for challengers, epochs, seeds in _rounds(c):
    trainings = {}
    for i, n in [(i, n) for i in range(seeds) for n in names]:
      args = (job.reseeded(i + 1), structures[n], epochs, trained)
      trainings[n, i] = functools.partial(_training, *args)
    done = all_of(trainings)
    products.forget_programs()  # Each round has other schedules.
    losses = {n: [done[n, i]['loss'] for i in range(seeds)] for n in names}
    if DIVERGED in losses[INCUMBENT]:
      raise errors.UserError(
        f'the training of uniform width for {epochs:g} epochs diverged: lower '
        'config.train.learning_rate.'
      )
    log.append({'epochs': epochs, 'losses': losses})
    seconds |= {t['name']: t['seconds'] for t in done.values()}
    names = [INCUMBENT, *best(losses, challengers // 2)]
  one_training = done[INCUMBENT, 0]['seconds'] / _share(job, epochs)
  found = {
    **decide(losses, c.tournament.standard_errors),
    'rounds': log,
    'layers': list(job.network.cost_model.layers),
    'counts': {name: list(s.counts) for name, s in structures.items()},
    'macs': {name: s.macs for name, s in structures.items()},
    'seconds': round(sum(seconds.values()), 1),
    'share': round(sum(seconds.values()) / one_training, 3),
  }
  chance = math.log(job.spec.num_classes)
  found |= _result_summary(found, job.budgets[0].name, chance)
  storage.write_json(path, found, sealed=True)
  return found


def candidates(c: ml_collections.ConfigDict) -> list[str]:
  """The names of the candidates, the incumbent first, each once."""
  joined = ','.join(c.tournament.candidates)  # A flag gives a,b as one text.
  names = [name.strip() for name in joined.split(',')]
  return list(dict.fromkeys([INCUMBENT, *filter(None, names)]))


def _rounds(c: ml_collections.ConfigDict) -> list[tuple[int, float, int]]:
  fields = c.tournament
  return rounds(len(candidates(c)) - 1, fields.epochs, fields.seeds)


def scored(job: stages.Job, name: str, root: pathlib.Path) -> products.Scored:
  """The scores of a candidate: those of its arm; '#i' takes another seed.

  Raises:
    products.Busy: If another process does its search or probe.
  """
  return products.scored(_cell(job, name), job, root)


def _cell(job: stages.Job, name: str) -> plan.Cell:
  """The candidate as a cell of a study, with only the ranking of its arm."""
  arm, _, number = name.partition('#')
  seed = config.other_seed(job.config.seed, int(number or 0))
  return plan.cell(job.config, arm, seed, {'budget.ranking': 'global'})


def all_of(tasks: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
  """Does each task; raises Busy at the end if another process does one."""
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
  """{name, loss, seconds} of one training, which equal structures share."""
  counts = config.digest({'counts': list(structure.counts)})
  folder = folder / f'{counts}-{epochs:g}epochs-seed{job.config.seed}'
  path = folder / 'loss.json'

  def train() -> None:
    module = job.network.narrow(structure.counts)
    loss = DIVERGED
    try:
      stages.fit(job, module, folder, 'tournament', epochs, hold_out=True)
      loss = runs.read_metrics(folder)[-1]['validation_loss']
    except errors.Diverged as e:
      console.note(f'counts {structure.counts}, {e}')
    found = {'loss': loss, 'seconds': runs.Clock(folder).seconds()}
    storage.write_json(path, {'name': folder.name, **found}, sealed=True)
    runs.barrier('loss')

  products.make(path, folder, train)
  return storage.read_json(path)


def _loss_text(losses: Sequence[float]) -> str:
  return 'diverged' if DIVERGED in losses else f'{np.mean(losses):.4f}'


def _result_summary(
  found: Mapping[str, Any], budget: str, chance: float
) -> dict[str, Any]:
  """The table and the sentences of the result, from tournament.json so far.

  The name of the budget may be that of another ranking. `chance` is the loss of
  chance: ln of the number of classes.
  """
  log, rows = found['rounds'], []
  for name, macs in found['macs'].items():
    losses = [r['losses'].get(name) for r in log]
    cells = ['' if v is None else _loss_text(v) for v in losses]
    mark = 'chosen' if name == found['chosen'] else ''
    rows.append([name, *cells, f'{macs:,}', mark])
  last = log[-1]['losses']
  who = f'{found["challenger"]} beats uniform width'
  if found['chosen'] == INCUMBENT:
    who = f'Uniform width stays: {found["challenger"]} does not clearly beat it'
  sentence = (
    f'{who} (gain in loss {found["gain"]:+.4f}, standard error '
    f'{found["error"]:.4f}, n = {len(last[INCUMBENT])}). It took '
    f'{console.duration(found["seconds"])}, {found["share"]:.2g} times as long '
    f'as one training. The structure {budget} has the widths of '
    f'{found["chosen"]}.'
  )
  if min(map(min, last.values())) > stages.CHANCE * chance:
    sentence += (
      f' Warning: the losses are at chance ({chance:.3f}), so they say nothing '
      'about the widths. Raise config.tournament.epochs.'
    )
  epochs = [f'{r["epochs"]:g} epochs' for r in log]
  columns = ['candidate', *epochs, 'MACs', '']
  return {'columns': columns, 'rows': rows, 'sentence': sentence}


def check(job: stages.Job) -> None:
  """Refuses a config without a possible tournament, before any training."""
  c, names = job.config, candidates(job.config)

  def require(holds: bool, field: str, rule: str, got: object) -> None:
    if not holds:
      raise errors.UserError(f'config.{field} must {rule}; got {got}.')

  rule = 'be searches, rankings, uniform or random, with #i for seed i'
  for name in names:
    fits = _is_candidate(name)
    require(fits, 'tournament.candidates', rule, repr(name))
  budgets = [b.name for b in job.budgets]
  rule = 'name exactly one budget for a tournament'
  require(len(budgets) == 1, 'budget', rule, ', '.join(budgets))
  new = not (job.folder(budgets[0]) / 'train').exists()
  rule = 'name a budget that is not trained yet in this workdir'
  require(new, 'budget', rule, budgets[0])
  stages.check_budget(job, job.budgets[0])
  held_out = c.data.validation_examples
  rule = 'be >= 1 for a tournament'
  require(held_out > 0, 'data.validation_examples', rule, held_out)
  rule = f'name one besides {INCUMBENT}'
  given = c.tournament.candidates
  require(len(names) > 1, 'tournament.candidates', rule, given)
  epochs, longest = c.tournament.epochs, _rounds(c)[-1][1]
  rule = (
    f'be <= {c.train.epochs * epochs / longest:.3g}, so that the last round is '
    f'no longer than the training of {c.train.epochs:g} epochs'
  )
  require(longest <= c.train.epochs, 'tournament.epochs', rule, epochs)
  share = cost(job)
  rule = (
    f'be >= {math.ceil(100 * share) / 100:g}, the cost of {len(names)} '
    f'candidates as a share of a training of {c.train.epochs:g} epochs (or '
    'take fewer)'
  )
  most = c.tournament.share
  require(share <= most, 'tournament.share', rule, most)


def _is_candidate(name: str) -> bool:
  """Whether an arm can take part in a tournament; refuses unknown words."""
  words, sign, number = name.partition('#')
  arm = arms.parse(words)
  allowed = ('search.', 'budget.ranking')
  return (
    arm.scores in ('gates', 'equal', 'random', 'profile', 'probe')
    and arm.training == 'scratch'
    and not arm.pretrain_epochs
    and all(field.startswith(allowed) for field in arm.overrides)
    and re.fullmatch(r'(#\d{1,10})?', sign + number) is not None
  )


def _share(job: stages.Job, epochs: float) -> float:
  """Epochs without the held-out images, as a share of a whole training."""
  size = job.config.train.batch_size
  held_out, every = (
    len(job.data.chosen('train', out)) // size for out in (True, False)
  )
  return epochs * held_out / (job.config.train.epochs * every)


def cost(job: stages.Job) -> float:
  """What a tournament costs, as a share of one training of a candidate.

  By steps and MACs: a step of a search, which needs no gradients of weights,
  counts as two thirds of a training step of the wide network.
  """
  c, model = job.config, job.network.cost_model
  epochs = sum((n + 1) * seeds * epochs for n, epochs, seeds in _rounds(c))
  cells = [_cell(job, name) for name in candidates(c)]
  wide = model.macs(model.widths) / job.uniform().macs
  searched = [cell.wide for cell in cells if cell.arm.searches]
  searches = {one.to_json(): one.search.epochs for one in searched}
  epochs += 2 / 3 * wide * sum(searches.values())
  probed = {cell.seed for cell in cells if cell.arm.scores == 'probe'}
  probes = len(probed) * stages.probe_cost(job) if probed else 0.0
  return _share(job, epochs) + probes
