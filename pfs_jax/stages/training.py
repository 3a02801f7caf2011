"""The train and eval stages: the narrow network, and the reference network."""

import copy
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

from pfs_jax import (
  checkpointing,
  config,
  console,
  devices,
  errors,
  latency,
  models,
  norms,
  prune,
  runs,
  storage,
  train,
)
from pfs_jax.stages import cutting, searching, showing
from pfs_jax.stages.job import Job

_MISTAKES = 12  # Misclassified images that are kept.
_chain = functools.cache(optax.chain)  # jit compares them by identity.


def _identity(job: Job, structure: prune.Structure) -> dict[str, Any]:
  return {
    **config.identity(job.config, 'train'),
    'structure.counts': list(structure.counts),
  }


def run(job: Job, weights: Mapping[str, Any] | None = None) -> None:
  """Trains the narrow network and evaluates it on the test set.

  Its first weights are those given, or those that `config.train.init` says.
  """
  if (job.workdir / 'search').exists() and not job.config.train.structure:
    searched = config.identity(job.config, 'search')
    runs.claim_part(job.workdir / 'search', searched)
  name, structure = cutting.read(job)
  job.note_budget(name)
  folder = job.folder(name)
  trained, path = folder / 'train', folder / 'result.json'
  if path.exists() and not (trained / 'config.json').exists():
    raise errors.UserError(f'{trained} is gone; delete {path} to train again.')
  runs.claim(trained, _identity(job, structure))
  if not path.exists():
    job.note_config()
    epochs = job.config.train.epochs
    if job.config.train.scratch == 'B':
      epochs *= job.network.reference_macs / structure.macs
    module = job.network.narrow(structure.counts)
    weights = weights or _initial_weights(job, folder / 'kept.json', structure)
    state = fit(job, module, trained, 'train', epochs, weights)
    exam = examine(module, state.variables, job.data.test())
    if not math.isfinite(exam.loss):
      raise errors.UserError(
        f'the loss of the trained network on the test images is {exam.loss}; a '
        f'lower learning rate may help. Delete {trained} to train again.'
      )
    if exam.mistakes:
      storage.write_arrays(trained / 'mistakes.npz', exam.mistakes, sealed=True)
    result = _result(job, name, structure, exam)
    result['steps'] = int(state.step)
    storage.write_json(path, result, sealed=True)
    runs.barrier('result')
  missing = runs.read_result(path)['reference_test_accuracy'] is None
  if job.config.train.reference and missing:
    _add_reference(job, path)
  showing.show(job, name, structure)


def check(job: Job) -> None:
  """Refuses a training that cannot start, before the search for it."""
  job.data.chosen('train', job.config.train.holdout)
  if job.config.train.structure not in ('', *(b.name for b in job.budgets)):
    cutting.read(job)


def _initial_weights(job: Job, path: pathlib.Path, structure: prune.Structure):
  """The narrow network's first weights by `config.train.init`; None: random.

  The wide network starts from the weights that the search froze. 'inherit'
  trains it first (in wide/) and takes the kept channels of the trained weights;
  'rewind' takes those of the first weights, as a lottery ticket does.
  """
  if job.config.train.init == 'random':
    return None
  seed = structure.source.get('seed', job.config.seed)
  if seed != job.config.seed:
    raise errors.UserError(
      f'config.seed must be {seed}, that of the structure, with '
      f'config.train.init={job.config.train.init}; got {job.config.seed}.'
    )
  kept = storage.read_json(path, dict[str, list[int]])
  lengths = {layer: len(indices) for layer, indices in kept.items()}
  if lengths != dict(zip(structure.layers, structure.counts, strict=True)):
    raise errors.UserError(
      f'{path} does not belong to the structure: it keeps other counts. Run '
      '--mode=prune again.'
    )
  first = job.ungated_weights
  if job.config.train.init == 'inherit':
    folder = job.workdir / 'wide'
    job = _wide_job(job)
    runs.claim(folder, config.identity(job.config, 'train'))
    wide = job.network.narrow(job.network.cost_model.widths)
    epochs = job.config.train.epochs
    first = fit(job, wide, folder, 'wide', epochs, first).variables
  return job.network.table.slice_variables(jax.device_get(first), kept)


def _wide_job(job: Job) -> Job:
  """The job of the wide network's training, with its own epochs and rate."""
  wide = copy.copy(job)
  wide.config = job.config.copy_and_resolve_references()
  recipe = wide.config.train
  recipe.init = 'random'
  recipe.epochs = recipe.wide_epochs or recipe.epochs
  recipe.learning_rate = recipe.wide_learning_rate or recipe.learning_rate
  recipe.wide_epochs = recipe.wide_learning_rate = 0.0
  wide.data = job.data.under(wide.config)  # The images are read once.
  return wide


def fit(
  job: Job,
  module: Any,
  folder: pathlib.Path,
  label: str,
  epochs: float,
  weights: Any = None,
  *,
  hold_out: bool | None = None,
  penalty: optax.GradientTransformation | None = None,
  watch: Callable[[Any, float], None] | None = None,
) -> train.TrainState:
  """Trains a module by the recipe of the config, or continues its training.

  Args:
    job: Config and data.
    module: The module.
    folder: Receives checkpoints and metrics.
    label: The label of progress lines, and of the key of new random weights.
    epochs: The length of the training.
    weights: The first weights; None: new random ones.
    hold_out: Whether the validation images are left out; None: as configured.
    penalty: A change to the gradients, before the optimiser of the recipe.
    watch: (state, epochs done) -> None, called after each epoch and at the end.

  Returns:
    The state after the last step.
  """
  c = job.config
  hold_out = c.train.holdout if hold_out is None else hold_out
  validation = job.data.validation() if hold_out else None
  source = job.data.train_source('train', hold_out=hold_out)
  per_epoch = source.steps_per_epoch
  total = config.steps(epochs, per_epoch)
  state = _initial_state(job, module, total, label, weights, penalty)
  own = bool(c.model.factory)
  refreshed = norms.refresher(c.train.statistics, own, state, source)

  def evaluate(state, step):
    if watch is not None:
      watch(state, step / per_epoch)
    if validation is None:
      return {}
    variables = refreshed(state, step).variables
    found = train.evaluate(module, variables, validation)
    return {f'validation_{k}': v for k, v in found.items()}

  with source:
    return train.loop(
      state,
      train.step,
      source,
      job.plan(total, per_epoch),
      folder=folder,
      label=label,
      evaluate=evaluate,
      finish=lambda state: refreshed(state, total),
    )


def _initial_state(job: Job, module, total, label, weights=None, penalty=None):
  """The state at step 0, from new random weights unless some are given."""
  if weights is None:
    key = config.key(job.config.seed, f'{label} weights')
    weights = models.init(module, key, job.image_shape)
  optimizer = train.optimizer(job.config.train, total)
  return train.init(
    module,
    weights,
    optimizer if penalty is None else _chain(penalty, optimizer),
    job.config.train.label_smoothing,
    config.key(job.config.seed, f'{label} dropout'),
  )


def _add_reference(job: Job, result: pathlib.Path) -> None:
  """Adds the reference network's accuracy and time to a result.json.

  It is trained as the network is whose weights the narrow one inherits.
  """
  runs.barrier('reference is missing')  # Before the first process adds it.
  folder = job.workdir / 'reference'
  recipe = job.config.train
  other = recipe.wide_epochs or recipe.wide_learning_rate
  if recipe.init == 'inherit' and other:
    job = _wide_job(job)
  runs.claim(folder, config.identity(job.config, 'train'))
  path = folder / 'result.json'
  if not path.exists():
    module = job.network.reference
    state = fit(job, module, folder, 'reference', job.config.train.epochs)
    exam = examine(module, state.variables, job.data.test())
    found = {
      'test_accuracy': exam.accuracy,
      'batch': exam.batch,
      'batch_ms': exam.milliseconds,
    }
    storage.write_json(path, found, sealed=True)
    runs.barrier('reference')
  found = storage.read_json(path, dict[str, float])
  content = storage.read_json(result, dict[str, Any])
  content['reference_test_accuracy'] = found['test_accuracy']
  times = content.setdefault('latency', {})
  if found.get('batch', times.get('batch')) == times.get('batch'):
    times['reference_ms'] = found['batch_ms']
  storage.write_json(result, content, sealed=True)
  runs.barrier('result with reference')


class Exam(NamedTuple):
  """The results of a network on the test images.

  Attributes:
    accuracy: The share of the images that it classifies correctly.
    loss: The mean cross-entropy.
    images: The number of images.
    batch: The number of images in a batch.
    milliseconds: The least time of three runs of a batch.
    mistakes: The first images that it misclassifies: images uint8 [n, H, W, C],
      labels and predicted [n]. None are kept where several processes share the
      images.
  """

  accuracy: float
  loss: float
  images: int
  batch: int
  milliseconds: float
  mistakes: dict[str, np.ndarray]


def examine(module: nn.Module, variables: Mapping[str, Any], test: Any) -> Exam:
  """Evaluates a network as `train.evaluate` does, by the same program."""
  call = train.evaluation_step(module, test.augmentation)
  loss = correct = 0.0
  found: dict[str, list] = {'images': [], 'labels': [], 'predicted': []}
  for batch in test:
    ce, right, predicted = call(variables, *batch)
    loss, correct = loss + float(ce), correct + float(right)
    if jax.process_count() == 1 and len(found['labels']) < _MISTAKES:
      images, labels, weights = map(np.asarray, batch)
      predicted = np.asarray(predicted)
      wrong = (predicted != labels) & (weights > 0)
      for name, values in zip(found, (images, labels, predicted), strict=True):
        found[name].extend(values[wrong])
  times = latency.milliseconds(3, call, variables, *batch)
  mistakes = {k: np.array(v[:_MISTAKES]) for k, v in found.items() if v}
  n = test.size
  return Exam(correct / n, loss / n, n, len(batch[1]), min(times), mistakes)


def _result(job: Job, name, structure, exam: Exam) -> dict[str, Any]:
  """The content of result.json but for its steps; warns on stderr, too."""
  c, network = job.config, job.network
  folder = job.folder(name) / 'train'
  foreign = pathlib.Path(c.train.structure).is_file()
  search = {} if foreign else searching.summary(job)
  warnings = search.pop('warnings', [])
  records = runs.read_metrics(folder)
  last = [r['accuracy'] for r in records if 'accuracy' in r][-1:]
  if last and (odd := norms.warning(last[0], exam.accuracy)):
    warnings.append(odd)
    if storage.is_first_process():
      console.note(f'warning: {odd}')
  return {
    'test_accuracy': exam.accuracy,
    'test_loss': exam.loss,
    'reference_test_accuracy': None,
    'test_examples': exam.images,
    'latency': {'batch': exam.batch, 'narrow_ms': exam.milliseconds},
    'macs': structure.macs,
    'params': structure.params,
    'reference_macs': network.reference_macs,
    'reference_params': network.reference_params,
    'searched_macs': network.cost_model.macs(network.cost_model.widths),
    'macs_share': structure.macs / network.reference_macs,
    'counts': dict(zip(structure.layers, structure.counts, strict=True)),
    'model': dict(network.description),
    'class_names': list(job.data.spec.class_names),
    'mean': list(job.data.spec.mean),
    'std': list(job.data.spec.std),
    'budget': name,
    'warnings': warnings,
    'seed': c.seed,
    'seconds': runs.Clock(folder).seconds(),
    'search': search,
    'versions': runs.versions(),
    'config': c.to_dict(),
  }


def restore(
  job: Job, name: str, structure: prune.Structure
) -> tuple[pathlib.Path, int, nn.Module, train.TrainState]:
  """(folder, step, module, state) of the trained narrow network.

  Raises:
    errors.UserError: The training has not finished, or the state after its last
      step cannot be read. No other state is used instead.
  """
  folder = job.folder(name) / 'train'
  path = job.folder(name) / 'result.json'
  step = runs.read_result(path)['steps']
  runs.claim_part(folder, _identity(job, structure))
  module = job.network.narrow(structure.counts)
  shapes = jax.eval_shape(lambda: _initial_state(job, module, 1, 'train'))
  state = jax.tree.map(
    lambda leaf: leaf.update(sharding=devices.replicated()), shapes
  )
  with checkpointing.Checkpoints(folder, read_only=True) as checkpoints:
    try:
      state = checkpoints.restore_step(state, step)
    except errors.UserError as e:
      raise errors.UserError(
        f'{e}\nDelete {path} and run --mode=train: it goes on from the newest '
        'checkpoint that is good.'
      ) from e
  return folder, step, module, state


def evaluate(job: Job) -> None:
  """Restores the trained narrow network and evaluates it on the test set."""
  folder, step, module, state = restore(job, *cutting.read(job))
  exam = examine(module, state.variables, job.data.test())
  right = round(exam.accuracy * exam.images)
  console.say(
    f'{folder} at step {step}: test accuracy {exam.accuracy:.2%} '
    f'({right} of {exam.images} images)'
  )
