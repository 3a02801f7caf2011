"""The stages behind `--mode`: search, prune, train, eval, run, info.

Each reads what the one before left in the workdir, so each can run alone, on
another machine. All that passes from search to train is a structure file.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from pfs_jax import (
  config,
  console,
  data,
  devices,
  errors,
  models,
  prune,
  runs,
)
from pfs_jax import search as search_lib
from pfs_jax import train as train_lib


class Job:
  """A config and a workdir, and what several stages need of them."""

  def __init__(self, c: ml_collections.ConfigDict, workdir: pathlib.Path):
    config.validate(c)
    self.config, self.workdir = c, workdir
    # What the narrow network starts from; None: new random weights.
    self.train_weights: Any = None
    self.spec = data.configured(c.data)
    self.network = models.network(
      c.model.name,
      self.spec.num_classes,
      self.spec.image_size,
      self.spec.channels,
      base_width=c.model.base_width or None,
      width=c.model.width or None,
      multiplier=c.model.multiplier,
      dtype=config.DTYPES[c.dtype],
      gate_site=c.model.gate_site,
    )
    self.budgets = config.budgets(c, self.network.reference_macs)

  @functools.cached_property
  def data(self) -> Any:
    """The data set (see `data.open_set`), read at first use."""
    return data.open_set(self.config, self.workdir)

  @functools.cached_property
  def search_weights(self) -> Any:
    """The variables that the search freezes: random, unless assigned."""
    key = config.key(self.config.seed, 'search weights')
    return models.init(self.network.gated, key, self.image_shape)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (self.spec.image_size, self.spec.image_size, self.spec.channels)

  def plan(self, total_steps: int, evaluate_steps: int) -> train_lib.Plan:
    """The plan of a loop under this config."""
    return train_lib.Plan(
      total_steps=total_steps,
      log_steps=self.config.log_steps,
      evaluate_steps=evaluate_steps,
      checkpoint_steps=self.config.checkpoint_steps,
      steps_per_call=devices.steps_per_call(self.config.steps_per_call),
    )

  def file(self, stem: str, name: str, suffix: str = '') -> pathlib.Path:
    """A file or folder of one budget.

    The first budget that a workdir was cut to has the plain name; every other
    carries its own: structure.json, structure-keep0.3.json.
    """
    first = self.workdir / 'structure.json'
    plain = True
    if first.exists():
      there = prune.Structure.from_json(first.read_text())
      plain = there.source.get('budget') == name
    return self.workdir / (f'{stem}{"" if plain else f"-{name}"}{suffix}')


# Search and cut.


def _note_config(job: Job) -> None:
  """Writes the whole config and the versions beside what they produce."""
  runs.write_json(job.workdir / 'config.json', job.config.to_dict())
  runs.write_json(job.workdir / 'versions.json', runs.versions())


def search(job: Job) -> None:
  """Learns the gates and cuts them to the budgets."""
  for budget in job.budgets:  # Before hours of search, not after.
    prune.check_budget(job.network.cost_model, **budget.ceilings())
  folder = job.workdir / 'search'
  runs.claim(folder, config.identity(job.config, 'search'))
  _note_config(job)
  if not (folder / 'gates.npz').exists():
    _search(job, folder)
  cut(job)


def _search(job: Job, folder: pathlib.Path) -> None:
  c, network = job.config, job.network
  source = job.data.train_source('search', hold_out=True)
  validation = job.data.validation()
  state = search_lib.init(
    network.gated,
    job.search_weights,
    sparsity=c.search.sparsity,
    balance=c.search.balance,
    learning_rate=c.search.learning_rate,
  )

  def evaluate(state, step):
    gates = network.by_layer(jax.device_get(state.gates))
    runs.write_arrays(folder / 'gates' / f'{step:08d}.npz', gates)
    numbers = {
      'gates_mean': float(search_lib.mean_gate(gates)),
      'gates_density': float(search_lib.density(gates)),
    }
    if validation:
      found = train_lib.evaluate(network.gated, state.variables, validation)
      numbers['validation_accuracy'] = found['accuracy']
    return numbers

  total = config.steps(c.search.epochs, source.steps_per_epoch)
  plan = job.plan(total, c.search.evaluate_steps or source.steps_per_epoch)
  if total:
    with source:
      state = train_lib.loop(
        state,
        search_lib.step,
        source,
        plan,
        folder=folder,
        label='search',
        evaluate=evaluate,
      )
  runs.barrier('search')
  _select(job, folder, network.by_layer(jax.device_get(state.gates)))


def _select(job: Job, folder: pathlib.Path, last) -> None:
  """Writes gates.npz: the evaluation that the selection rule takes."""
  step, gates = (
    search_lib.select(runs.read_metrics(folder), job.config.search.sparsity),
    last,
  )
  if step is not None:
    gates = runs.read_arrays(folder / 'gates' / f'{step:08d}.npz')
  runs.write_arrays(folder / 'gates.npz', gates)
  runs.barrier('gates')


def cut(job: Job) -> None:
  """Cuts the gates of a finished search to every budget of the config."""
  path = job.workdir / 'search' / 'gates.npz'
  if not path.exists():
    raise errors.UserError(
      f'{path} does not exist: run --mode=search in this workdir first.'
    )
  runs.claim(path.parent, config.identity(job.config, 'search'))
  gates = runs.read_arrays(path)
  rows = []
  for budget in job.budgets:
    structure = prune.fit(gates, job.network.cost_model, **budget.ceilings())
    structure = dataclasses.replace(
      structure,
      model=job.network.description,
      source={
        'budget': budget.name,
        'seed': job.config.seed,
        'search': config.digest(config.identity(job.config, 'search')),
        'gates_sha256': runs.checksum(gates),
      },
    )
    path = job.file('structure', budget.name, '.json')
    runs.write_text(path, structure.to_json() + '\n')
    kept = prune.kept(gates, structure)
    runs.write_json(
      job.file('kept', budget.name, '.json'),
      {layer: indices.tolist() for layer, indices in kept.items()},
    )
    rows.append(_structure_row(job, budget.name, structure))
    if structure.tie_share > 0.1:
      console.say(
        f'warning: {structure.tie_share:.0%} of the kept channels of '
        f'{budget.name} were chosen among equal gates, not by the search.'
      )
  runs.barrier('structures')
  console.table(
    f'Structures in {job.workdir}',
    ['budget', 'MACs', 'of reference', 'of searched', 'parameters', 'unused'],
    rows,
  )


def _structure_row(job: Job, name: str, structure: prune.Structure):
  model = job.network.cost_model
  searched = model.macs(model.widths)
  unused = ', '.join(f'{n:,} {q}' for q, n in structure.unused.items())
  return [
    name,
    f'{structure.macs:,}',
    f'{structure.macs / job.network.reference_macs:.2%}',
    f'{structure.macs / searched:.2%}',
    f'{structure.params:,}',
    unused,
  ]


# Training and evaluation.


def _structure(job: Job) -> tuple[str, prune.Structure]:
  """(budget name, structure) that `train` and `eval` are about."""
  asked = job.config.train.structure
  if asked:
    path = pathlib.Path(asked)
    if not path.exists():
      named = job.file('structure', asked, '.json')
      path = named if named.exists() else path
  else:
    path = job.file('structure', job.budgets[0].name, '.json')
  if not path.exists():
    there = sorted(p.name for p in job.workdir.glob('structure*.json'))
    found = f' There: {", ".join(there)}.' if there else ''
    raise errors.UserError(
      f'{path} does not exist: run --mode=search or --mode=prune first, or '
      f'give --config.train.structure=PATH.{found}'
    )
  try:
    structure = prune.Structure.from_json(path.read_text())
  except (OSError, UnicodeDecodeError) as e:
    raise errors.UserError(f'{path} cannot be read: {e}.') from e
  _check_structure(job, path, structure)
  return structure.source.get('budget', path.stem), structure


def _check_structure(job: Job, path, structure: prune.Structure) -> None:
  """Refuses a structure that is not of this config's network."""
  model = job.network.cost_model
  if structure.layers != model.layers:
    raise errors.UserError(
      f'{path}: counts must name the layers of {job.config.model.name} in '
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
      f'{structure.params:,}. Correct macs and params to what you mean.'
    )


def _train_identity(job: Job, structure: prune.Structure) -> dict[str, Any]:
  return {
    **config.identity(job.config, 'train'),
    'structure.counts': list(structure.counts),
  }


def train(job: Job) -> None:
  """Trains the narrow network from new random weights and evaluates it."""
  if (job.workdir / 'search').exists() and not job.config.train.structure:
    runs.claim(job.workdir / 'search', config.identity(job.config, 'search'))
  name, structure = _structure(job)
  folder = job.file('train', name)
  runs.claim(folder, _train_identity(job, structure))
  _note_config(job)
  if not job.file('result', name, '.json').exists():
    epochs = job.config.train.epochs
    if job.config.train.scratch == 'B':
      epochs *= job.network.reference_macs / structure.macs
    module = job.network.narrow(structure.counts)
    state = _fit(job, module, folder, 'train', epochs)
    reference = _reference_accuracy(job)
    _write_result(job, name, structure, module, state, folder, reference)
  _show(job, name, structure)


def _fit(job: Job, module, folder: pathlib.Path, label: str, epochs: float):
  """Trains a module by the recipe of the config, or goes on with it."""
  holdout = job.config.train.holdout
  validation = job.data.validation() if holdout else None
  source = job.data.train_source('train', hold_out=holdout)
  total = config.steps(epochs, source.steps_per_epoch)
  state = _initial(job, module, total, label)

  def evaluate(state, step):
    found = train_lib.evaluate(module, state.variables, validation)
    return {f'validation_{k}': v for k, v in found.items()}

  with source:
    return train_lib.loop(
      state,
      train_lib.step,
      source,
      job.plan(total, source.steps_per_epoch),
      folder=folder,
      label=label,
      evaluate=evaluate if validation else None,
    )


def _initial(job: Job, module, total: int, label: str):
  weights = job.train_weights if label == 'train' else None
  if weights is None:
    key = config.key(job.config.seed, f'{label} weights')
    weights = models.init(module, key, job.image_shape)
  return train_lib.init(
    module,
    weights,
    train_lib.optimizer(job.config.train, total),
    job.config.train.label_smoothing,
  )


def _test(job: Job, module, state) -> tuple[float, int]:
  """(accuracy, images) of the one reading of the test set."""
  test = job.data.test()
  accuracy = train_lib.evaluate(module, state.variables, test)['accuracy']
  return accuracy, test.size


def _reference_accuracy(job: Job) -> float | None:
  """Test accuracy of the reference network, where the config wants it."""
  if not job.config.train.reference:
    return None
  folder = job.workdir / 'reference'
  runs.claim(folder, config.identity(job.config, 'train'))
  result = folder / 'result.json'
  if not result.exists():
    module = job.network.reference
    state = _fit(job, module, folder, 'reference', job.config.train.epochs)
    accuracy, _ = _test(job, module, state)
    runs.write_json(result, {'test_accuracy': accuracy})
    runs.barrier('reference')
  return runs.read_json(result)['test_accuracy']


def _write_result(job, name, structure, module, state, folder, reference):
  c, network = job.config, job.network
  searched = network.cost_model.macs(network.cost_model.widths)
  accuracy, examples = _test(job, module, state)
  result = {
    'test_accuracy': accuracy,
    'reference_test_accuracy': reference,
    'test_examples': examples,
    'macs': structure.macs,
    'params': structure.params,
    'reference_macs': network.reference_macs,
    'reference_params': network.reference_params,
    'searched_macs': searched,
    'macs_share': structure.macs / network.reference_macs,
    'counts': dict(zip(structure.layers, structure.counts, strict=True)),
    'model': dict(network.description),
    'budget': name,
    'seed': c.seed,
    'steps': int(state.step),
    'seconds': runs.Clock(folder).seconds(),
    'versions': runs.versions(),
    'config': c.to_dict(),
  }
  runs.write_json(job.file('result', name, '.json'), result)
  runs.barrier('result')


def evaluate(job: Job) -> None:
  """Restores the trained narrow network and evaluates it on the test set."""
  name, structure = _structure(job)
  folder = job.file('train', name)
  if not (folder / 'checkpoints').exists():
    raise errors.UserError(
      f'{folder} holds no checkpoint: run --mode=train in this workdir first.'
    )
  runs.claim(folder, _train_identity(job, structure))
  module = job.network.narrow(structure.counts)
  state = devices.replicate(_initial(job, module, 1, 'train'))
  with runs.Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(state)
  if found is None:
    raise errors.UserError(f'{folder} holds no checkpoint yet.')
  step, state = found
  accuracy, n = _test(job, module, state)
  console.say(
    f'{folder} at step {step}: test accuracy {accuracy:.2%} '
    f'({round(accuracy * n)} of {n} images)'
  )


def run(job: Job) -> None:
  """Search, prune, train and evaluate."""
  search(job)
  train(job)


def _show(job: Job, name: str, structure: prune.Structure) -> None:
  """The closing tables."""
  result = runs.read_json(job.file('result', name, '.json'))
  network, model = job.network, job.network.cost_model
  searched = (model.macs(model.widths), model.params(model.widths))
  reference = (network.reference_macs, network.reference_params)

  def row(label, macs, params, accuracy):
    shown = '-' if accuracy is None else f'{accuracy:.2%}'
    share = f'{macs / network.reference_macs:.1%}'
    return [label, f'{macs:,}', share, f'{params:,}', shown]

  console.table(
    f'Channels kept ({name})',
    ['layer', 'searched', 'kept', 'share'],
    [
      [layer, str(width), str(count), f'{count / width:.0%}']
      for layer, width, count in zip(
        model.layers, model.widths, structure.counts, strict=True
      )
    ],
  )
  console.table(
    f'{job.workdir}: {job.config.model.name} on {job.config.data.name}, seed '
    f'{job.config.seed}, {console.duration(result["seconds"])} of training',
    ['network', 'MACs', 'of reference', 'parameters', 'test accuracy'],
    [
      row('reference', *reference, result['reference_test_accuracy']),
      row('searched', *searched, None),
      row('narrow', result['macs'], result['params'], result['test_accuracy']),
    ],
  )


# Info.


def info(job: Job) -> None:
  """Layers, MACs, parameters and floors; reads no data, trains nothing."""
  network, model = job.network, job.network.cost_model
  total = model.macs(model.widths)
  gated = set(model.layers)
  rows = []
  for op in model.ops:
    if op.kind == 'norm':
      continue
    inputs, outputs = op.channels(model.widths)
    rows.append(_info_row(op, model, total, gated, inputs, outputs))
  console.table(
    f'{job.config.model.name}, searched network',
    ['layer', 'kind', 'output', 'channels', 'MACs', 'share', 'gate'],
    rows,
  )
  _info_totals(job, network, model, total)


def _info_row(op, model, total, gated, inputs, outputs):
  sized = np.append(np.array(model.widths, np.int64), 1)
  macs = sum(
    int(v * sized[i] * sized[j]) for (i, j), v in op.macs_terms().items()
  )
  site = op.path.rpartition('/')[0]
  return [
    op.path,
    op.kind,
    'x'.join(map(str, op.output_size)) or '1',
    f'{inputs} -> {outputs}',
    f'{macs:,}',
    f'{macs / total:.1%}',
    'yes' if site in gated else '',
  ]


def _info_totals(job: Job, network, model, total: int) -> None:
  rows = [
    [
      'reference network',
      f'{network.reference_macs:,}',
      '100.0%',
      f'{network.reference_params:,}',
    ]
  ]

  def row(label, counts):
    macs, params = model.macs(counts), model.params(counts)
    share = f'{macs / network.reference_macs:.1%}'
    return [label, f'{macs:,}', share, f'{params:,}']

  rows.append(row('searched network', model.widths))
  for multiple in (1, 8, 16):
    least = prune.minimum(model, round_to=multiple)
    rows.append(row(f'floor, multiples of {multiple}', least))
  for budget in job.budgets:
    try:
      prune.check_budget(model, **budget.ceilings())
      rows.append([f'budget {budget.name}', 'can be met', '', ''])
    except prune.Infeasible as e:
      rows.append([f'budget {budget.name}', f'floor {e.floor:,}', '', ''])
  console.table('Totals', ['', 'MACs', 'of reference', 'parameters'], rows)


def execute(mode: str, job: Job) -> None:
  """Runs one mode; all but info hold the workdir."""
  if mode == 'info':
    info(job)
    return
  with runs.locked(job.workdir):
    MODES[mode](job)


MODES = {
  'search': search,
  'prune': cut,
  'train': train,
  'eval': evaluate,
  'run': run,
  'info': info,
}
