"""The cut stage: cuts gates to structure files, and reads structure files."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pfs_jax import (
  budgets,
  config,
  console,
  errors,
  latency,
  models,
  prune,
  rankings,
  runs,
  scores,
  storage,
)
from pfs_jax.stages.job import FOLDERS, Job


def cut(job: Job) -> None:
  """Cuts the network to every budget of the config, by gates if need be."""
  (gates, source), rows = _gates(job), []
  for budget in job.budgets:
    check_budget(job, budget)
    check_choice(job, budget)
    ranked, by = scored(job, budget, gates)
    structure = job.cut(ranked, budget)
    structure = write(job, budget, structure, ranked, source | by)
    rows.append(_row(job, budget.name, structure))
    if budget.max_latency_ms is not None:
      _show_latency(job, structure)
    if structure.tie_share > 0.1 and rankings.needs_search(budget.ranking):
      console.say(
        f'warning: {structure.tie_share:.0%} of the kept channels of '
        f'{budget.name} were chosen among equal gates, not by the search.'
      )
    if structure.counts == job.network.cost_model.widths:
      console.say(
        f'warning: {budget.name} removes no channel: the searched network '
        'itself meets the budget.'
      )
    unused = structure.unused.get('macs', 0) / (budget.max_macs or 1)
    binds = structure.binding == 'params' and budget.ranking != 'tilt'
    if binds and unused > 0.1:
      console.say(
        f'{budget.name}: the ceiling on parameters leaves {unused:.0%} of the '
        'MACs unused; config.budget.ranking=tilt uses more of them.'
      )
  if not source:
    job.note_config()
  runs.barrier('structures')
  costs = ['MACs', 'of reference', 'of searched', 'parameters', 'unused']
  columns = ['budget', *costs, 'binding']
  console.table(f'Structures in {job.workdir}', columns, rows)


def _gates(job: Job) -> tuple[Mapping[str, Any], dict[str, str]]:
  """(gates, their source) of the search; equal gates, {} if none is needed."""
  path, model = job.workdir / 'search' / 'gates.npz', job.network.cost_model
  if not path.exists():
    if any(rankings.needs_search(budget.ranking) for budget in job.budgets):
      raise errors.UserError(
        f'{path} does not exist: run --mode=search in this workdir first.'
      )
    return scores.equal(model), {}
  identity = config.identity(job.config, 'search')
  runs.claim_part(path.parent, identity)
  shapes = {n: (w,) for n, w in zip(model.layers, model.widths, strict=True)}
  gates = storage.read_arrays(path, shapes)
  checksum = storage.checksum(gates)
  return gates, {'search': config.digest(identity), 'gates_sha256': checksum}


def scored(job: Job, budget: prune.Budget, gates: Any) -> tuple[Any, Any]:
  """(scores, source) of a ranking of more than gates; else (gates, {})."""
  kind, _ = rankings.parse(budget.ranking)
  if kind == 'random':
    return scores.random(job.network.cost_model, job.config.seed), {}
  if kind != 'sensitivity':
    return gates, {}
  path = job.workdir / 'probe.json'
  if not path.exists():
    raise errors.UserError(
      f'{path} does not exist: run --mode=probe in this workdir first.'
    )
  runs.claim_part(job.workdir / 'probe', config.identity(job.config))
  found = storage.read_json(path, scores.Probe)
  layers = set(job.network.cost_model.layers)
  if not layers == set(found['mean']) == set(found['before']):
    raise errors.UserError(f'{path} is the probe of another network.')
  ranked = job.widened(scores.probed(found, budget.ranking), gates, budget)
  return ranked, {'probe': config.digest(found)}


def write(
  job: Job,
  budget: prune.Budget,
  structure: prune.Structure,
  ranked: Mapping[str, Any],
  source: Mapping[str, Any],
) -> prune.Structure:
  """Writes a structure and the channels that it keeps.

  `ranked` are the scores by which it was cut. `source` says where they come
  from; the budget and the seed are added. Returns the structure, or the one in
  the file if a user has edited its counts: an edited file is kept.
  """
  structure = dataclasses.replace(
    structure,
    model=job.network.description,
    source={'budget': budget.name, 'seed': job.config.seed, **source},
  )
  job.note_budget(budget.name)
  path = job.folder(budget.name) / 'structure.json'
  edited = _edited(job, path, structure)
  if edited is None:
    known = {'structure.counts': list(structure.counts)}
    known |= config.identity(job.config)
    runs.claim_part(path.with_name('train'), known)
    storage.write_text(path, structure.to_json() + '\n')
  else:
    timed = 'max_latency_ms' in structure.budget
    why = 'is trained' if timed else 'was edited'
    console.say(f'{path} {why} and is kept; delete it to cut again.')
    structure = edited
  kept = prune.kept(ranked, structure).items()
  lists = {layer: indices.tolist() for layer, indices in kept}
  storage.write_json(path.with_name('kept.json'), lists, sealed=True)
  return structure


def _edited(job: Job, path: pathlib.Path, fresh) -> prune.Structure | None:
  """The structure in a file if a user has edited its counts, else None.

  Its gates and its budget are those of the new structure `fresh`. The cut to a
  budget in milliseconds changes with the measurement: there, the structure
  counts if it is trained.
  """
  timed = fresh.budget.get('max_latency_ms') is not None
  if not path.exists() or (timed and not path.with_name('train').exists()):
    return None
  there = prune.Structure.from_json(storage.read_text(path), path)
  # The hash of the gates identifies them.
  ours, theirs = ({**s.source, 'search': ''} for s in (fresh, there))
  if ours != theirs or there.counts == fresh.counts:
    return None
  _check_structure(job, path, there)
  return there


def check_choice(job: Job, budget: prune.Budget) -> None:
  """Refuses to replace the choice of a tournament by a cut."""
  path = job.folder(budget.name) / 'structure.json'
  if not path.exists():
    return
  there = prune.Structure.from_json(storage.read_text(path), path)
  if 'tournament' in there.source:
    raise errors.UserError(
      f'{path} is the choice of a tournament: give another --workdir, or '
      'delete it to cut here.'
    )


def check_budget(job: Job, budget: prune.Budget) -> None:
  """Refuses a budget below the floor, and a network with uncounted MACs."""
  uncounted = job.network.table.uncounted
  if uncounted and not job.config.budget.uncounted:
    raise errors.UserError(
      'config.budget.uncounted must be True for a model with operations whose '
      f'MACs cannot be counted: {", ".join(uncounted)}.'
    )
  try:
    budget.check(job.network.cost_model, job.latency_of(budget))
  except prune.Infeasible as e:
    hints = '; '.join(_alternatives(job, budget, e))
    raise errors.UserError(f'{budget.name}: {e}\nPossible: {hints}.') from e


def _fits(budget: prune.Budget, model, **change) -> bool:
  try:
    dataclasses.replace(budget, **change).check(model)
  except prune.Infeasible:
    return False
  return True


def _alternatives(
  job: Job, budget: prune.Budget, e: prune.Infeasible
) -> Iterator[str]:
  """What can be met instead: another budget, multiple or searched width."""
  share = math.ceil(1000 * e.floor / job.network.reference_macs) / 1000
  yield {
    'macs': f'a budget of {e.floor:,} MACs, {share:.3f} of the reference '
    'network',
    'params': f'a budget of {e.floor:,} parameters',
    'latency_ms': f'a budget of {e.floor:.3g} ms',
  }[e.quantity]
  if budget.max_latency_ms is not None:
    return
  for multiple in (budget.round_to // 2**i for i in range(1, 64)):
    if multiple and _fits(budget, job.network.cost_model, round_to=multiple):
      yield f'multiples of {multiple} (round_to)'
      break
  c = job.network.description
  if 'name' not in c or 'counts' in c:
    return
  given = [c[k] for k in ('name', 'num_classes', 'image_size', 'channels')]
  for eighths in range(7, 0, -1):
    width = max(1, c['width'] * eighths // 8)
    if _fits(budget, models.cost_model(*given, width, c['multiplier'])):
      yield f'a search at base width {width} (config.model.width)'
      return


def _show_latency(job: Job, structure: prune.Structure) -> None:
  """Shows the time of the whole narrow network, and its use of matrix units."""
  batch = job.config.budget.latency_batch
  module = job.network.narrow(structure.counts)
  key = config.key(job.config.seed, 'latency')
  variables = models.init(module, key, job.image_shape)
  median, least = latency.measure(module, variables, batch, job.image_shape)
  assert structure.latency_ms is not None
  gap = least / structure.latency_ms - 1
  console.say(
    f'predicted {structure.latency_ms:.3f} ms a batch of {batch} (sum of '
    f'layers); the whole network: least {least:.3f} ms ({gap:+.0%}), median '
    f'{median:.3f} ms on {runs.hardware()}'
  )
  model, counts = job.network.cost_model, structure.counts
  use = [latency.padding_use(model, counts, m) for m in (8, 128)]
  console.table(
    'Useful MACs over MACs with channels padded to multiples',
    ['layer', 'ms', 'of 8', 'of 128'],
    [
      [path, f'{ms:.3f}', f'{use[0][path]:.0%}', f'{use[1][path]:.0%}']
      for path, ms in job.latency_model.layers(counts).items()
    ],
  )


def _row(job: Job, name: str, structure: prune.Structure) -> list[str]:
  model = job.network.cost_model
  unused = ', '.join(
    f'{n:{",.4g" if q == "latency_ms" else ","}} {budgets.UNITS[q]}'
    for q, n in structure.unused.items()
  )
  return [
    name,
    f'{structure.macs:,}',
    f'{structure.macs / job.network.reference_macs:.2%}',
    f'{structure.macs / model.macs(model.widths):.2%}',
    f'{structure.params:,}',
    unused,
    structure.binding or '-',
  ]


def read(job: Job) -> tuple[str, prune.Structure]:
  """(budget name, structure) for the stages `train`, `eval` and `export`.

  `config.train.structure` chooses it: it is a path, the name of a budget, or,
  if it is empty, stands for the first budget of the config.
  """
  asked = job.config.train.structure
  there, path, name = job.budget_folders(), pathlib.Path(asked), ''
  if not asked or (asked in there and not path.is_file()):
    name = asked or job.budgets[0].name
    path = job.folder(name) / 'structure.json'
  if not path.exists():
    found = f' Budgets there: {", ".join(there)}.' if there else ''
    raise errors.UserError(
      f'{path} does not exist: run --mode=search or --mode=prune first, or '
      f'give --config.train.structure=PATH.{found}'
    )
  text = storage.read_text(path)
  if text.lstrip().startswith('['):  # The list of the published code.
    counts = storage.decode(text, list[int], path)
    structure = models.structure_from_list(job.network, counts)
  else:
    structure = prune.Structure.from_json(text, path)
  _check_structure(job, path, structure)
  if not name:  # The file may come from a stranger: its name must be no path.
    stem = re.sub(r'[^\w.-]', '-', path.stem)
    name = str(structure.source.get('budget', stem))
    if not re.fullmatch(r'\w[\w.-]*', name) or name in FOLDERS:
      raise errors.UserError(
        'the name of a budget must be letters, digits, ".", "-" and "_", and '
        f'not one of {", ".join(FOLDERS)}; got {name!r}.'
      )
  return name, structure


def _check_structure(job: Job, path, structure: prune.Structure) -> None:
  """Refuses a structure of another network than this config's."""
  model = job.network.cost_model
  if structure.layers != model.layers:
    raise errors.UserError(
      f'{path}: counts must name the layers of {job.model_name} in '
      f'forward order ({model.layers[0]}, ..., {model.layers[-1]}).'
    )
  for name, wanted in job.network.description.items():
    there = structure.model.get(name, wanted)
    if there != wanted:
      raise errors.UserError(
        f'{path}: model.{name} is {there!r}; this config has {wanted!r}.'
      )
  costs_now = (model.macs(structure.counts), model.params(structure.counts))
  if costs_now != (structure.macs, structure.params):
    raise errors.UserError(
      f'{path}: counts cost {costs_now[0]:,} MACs and {costs_now[1]:,} '
      f'parameters; the file says {structure.macs:,} and '
      f'{structure.params:,}. Correct the counts, or macs and params.'
    )
