"""Training: state, optimiser, schedule, step, evaluation, and the one loop.

Searches and trainings use the same loop; the step is an argument of it.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from pfs_jax import checkpointing, console, cpu, devices, errors, runs


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes during a training, and its static parts.

  `step` counts the steps made. `rng` is the key data (uint32 [2]) of dropout.
  `label_smoothing` is the share (0..1) of a label spread over all classes.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  rng: jax.Array
  module: nn.Module = flax.struct.field(pytree_node=False)
  optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
  label_smoothing: float = flax.struct.field(pytree_node=False, default=0.0)

  @property
  def variables(self) -> dict[str, Any]:
    """The variables that the module is applied with."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def init(
  module: nn.Module,
  variables: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  label_smoothing: float = 0.0,
  key: jax.Array | None = None,
) -> TrainState:
  """The state before the first step.

  Args:
    module: Any Linen module.
    variables: Its `params` and, if it has BatchNorm, `batch_stats`.
    optimizer: Updates the parameters.
    label_smoothing: Share (0..1) of a label that is spread over all classes.
    key: The key of dropout; None: key 0.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    batch_stats=variables.get('batch_stats', {}),
    opt_state=optimizer.init(variables['params']),
    rng=jax.random.key_data(jax.random.key(0) if key is None else key),
    module=module,
    optimizer=optimizer,
    label_smoothing=label_smoothing,
  )


def schedule(
  recipe: ml_collections.ConfigDict, total_steps: int
) -> optax.Schedule:
  """The learning rate of each step: 'step' or 'cosine', after a warm-up.

  Args:
    recipe: The section `train` of a config. 'step' multiplies the rate by
      `decay_factor` from each share of `decay_at` on. With `scale_rate`,
      `learning_rate` is the rate of a batch of 256.
    total_steps: Steps of the training, including those of the warm-up.
  """
  rate = recipe.learning_rate
  if recipe.scale_rate:
    rate *= recipe.batch_size / 256
  warmup = round(recipe.warmup_share * total_steps)
  if recipe.schedule == 'cosine':
    main = optax.cosine_decay_schedule(rate, max(1, total_steps - warmup))
  else:
    boundaries = {}
    for share in recipe.decay_at:  # Factors at equal boundaries multiply.
      boundary = round(share * total_steps) - warmup
      factor = boundaries.get(boundary, 1.0) * recipe.decay_factor
      boundaries[boundary] = factor
    main = optax.piecewise_constant_schedule(rate, boundaries)
  if not warmup:
    return main
  return optax.join_schedules(
    [optax.linear_schedule(rate / warmup, rate, warmup), main], [warmup]
  )


def decay_mask(rule: str) -> Callable[[Any], Any]:
  """A function from parameters to booleans that say which of them decay.

  With 'all' every parameter decays. With 'dense' only the kernels of dense
  convolutions and linear layers do. Depthwise layers are recognised by their
  names: a dense convolution with one input channel has the same shape.
  """

  def decays(path, _) -> bool:
    names = [entry.key for entry in path]
    return names[-1] == 'kernel' and not any('depthwise' in n for n in names)

  if rule == 'all':
    return lambda params: jax.tree.map(lambda _: True, params)
  return lambda params: jax.tree_util.tree_map_with_path(decays, params)


_OPTIMIZER_FIELDS = """batch_size learning_rate scale_rate momentum nesterov
  weight_decay decay_rule schedule decay_at decay_factor warmup_share""".split()


def optimizer(
  recipe: ml_collections.ConfigDict, total_steps: int
) -> optax.GradientTransformation:
  """SGD with momentum; weight decay is added to the gradient, as in PyTorch.

  The arguments are those of `schedule`. Equal recipes get the same object,
  because jit compares optimisers by identity.
  """
  fields = tuple((name, recipe[name]) for name in _OPTIMIZER_FIELDS)
  return _optimizer(fields, total_steps)


@functools.cache
def _optimizer(fields, total_steps: int) -> optax.GradientTransformation:
  recipe = ml_collections.ConfigDict(dict(fields))
  decayed = decay_mask(recipe.decay_rule)
  rate = schedule(recipe, total_steps)
  return optax.chain(
    optax.add_decayed_weights(recipe.weight_decay, decayed),
    optax.sgd(rate, recipe.momentum, nesterov=recipe.nesterov),
  )


def _cross_entropy(logits, labels, smoothing: float) -> jax.Array:
  if not smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  targets = optax.smooth_labels(one_hot, smoothing)
  return optax.softmax_cross_entropy(logits, targets)


def logits(
  state: Any, trained: Mapping[str, Any], x: jax.Array
) -> tuple[jax.Array, Any]:
  """(logits, batch_stats) of the next step of a search or a training.

  `trained` holds the other collections; x is images [N, H, W, C].

  Raises:
    errors.UserError: The model returns several arrays, or none.
  """
  # The key of all random layers in this step.
  key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  found, updates = state.module.apply(
    {**trained, 'batch_stats': state.batch_stats},
    x,
    train=True,
    mutable=['batch_stats'],
    rngs=dict.fromkeys(('dropout', 'params'), key),
  )
  if not isinstance(found, jax.Array):
    raise errors.UserError(
      f'the model returns a {type(found).__name__}: to search or train it, '
      'give surgery.discover a call= (config.model.call) that returns logits.'
    )
  return as_float32(found), updates.get('batch_stats', {})


def as_float32(logits: Any) -> Any:
  """Logits of 16 bits as float32, in which losses are computed."""
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@jax.jit
def step(
  state: TrainState, x: jax.Array, y: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of training.

  Args:
    state: The state before the step.
    x: Normalised, augmented images, float [N, H, W, C].
    y: Labels, int [N].

  Returns:
    The next state, and the batch's {'loss', 'accuracy'} before the step.
  """

  def loss(params):
    found, batch_stats = logits(state, {'params': params}, x)
    value = _cross_entropy(found, y, state.label_smoothing).mean()
    return value, (found, batch_stats)

  gradient = jax.value_and_grad(loss, has_aux=True)
  (value, (found, batch_stats)), grads = gradient(state.params)
  updates, opt_state = state.optimizer.update(
    grads, state.opt_state, state.params
  )
  state = state.replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    batch_stats=batch_stats,
    opt_state=opt_state,
  )
  accuracy = (found.argmax(-1) == y).mean()
  return state, {'loss': value, 'accuracy': accuracy}


def weighted_sum(values: jax.Array, weight: jax.Array) -> jax.Array:
  """The sum of values [N] by weights; a weight of 0 also hides a NaN."""
  return jnp.where(weight > 0, values * weight, 0).sum()


@functools.cache
def evaluation_step(module: nn.Module, augmentation: Any) -> Callable[..., Any]:
  """A jitted function that evaluates one batch.

  It maps (variables, images, labels, weights) to the weighted sums of the loss
  and of the correct answers, and to the predicted classes (int [N]).
  """

  def evaluate_batch(variables, images, labels, weight):
    x = augmentation.test(images)
    logits = as_float32(module.apply(variables, x, train=False))
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    predicted = logits.argmax(-1)
    correct = predicted == labels
    return weighted_sum(ce, weight), (correct * weight).sum(), predicted

  return jax.jit(evaluate_batch, out_shardings=devices.replicated())


def evaluate(
  module: nn.Module, variables: Mapping[str, Any], batches: Any
) -> dict[str, float]:
  """The mean {'loss', 'accuracy'} over all images.

  Args:
    module: The module; it uses running statistics.
    variables: Its variables.
    batches: Yields (images, labels, weights), such as
      `pipeline.ArrayEvaluation`. Its `.augmentation.test` normalises images and
      its `.size` is the number of images.
  """
  call = evaluation_step(module, batches.augmentation)
  sums = [call(variables, *batch) for batch in batches]
  return {
    'loss': sum(float(ce) for ce, _, _ in sums) / batches.size,
    'accuracy': sum(float(correct) for _, correct, _ in sums) / batches.size,
  }


@functools.cache
def compiled_call(step_fn: Callable, draw: Callable) -> Callable:
  """A jitted function that makes k steps and returns the metrics of each.

  It maps (state, resident, chunk) to (state, metrics), where `chunk` holds what
  `draw` needs and its arrays, like the metrics, have the leading axis k. A
  single step is not put into a loop, because XLA's gradient convolutions are
  far slower in loops on CPU. The state is donated: the caller must not use it
  again.
  """

  def one(state, resident, item):
    return step_fn(state, *draw(resident, item))

  def call(state, resident, chunk):
    if jax.tree.leaves(chunk)[0].shape[0] == 1:
      item = jax.tree.map(lambda x: x[0], chunk)
      state, metrics = one(state, resident, item)
      return state, jax.tree.map(lambda m: m[None], metrics)
    return jax.lax.scan(lambda s, item: one(s, resident, item), state, chunk)

  return jax.jit(
    call,
    donate_argnums=0,
    out_shardings=devices.replicated(),
    compiler_options=cpu.compiler_options(),
  )


@dataclasses.dataclass(frozen=True)
class Plan:
  """How many steps a loop makes, and how often it logs, evaluates and saves.

  The last step is always logged, evaluated and saved. `steps_per_call` steps
  are compiled into one call.
  """

  total_steps: int
  log_steps: int
  evaluate_steps: int
  checkpoint_steps: int
  steps_per_call: int = 1

  def next_stop(self, step: int) -> int:
    """The step at which the next call of the compiled program ends."""
    every = (self.log_steps, self.evaluate_steps, self.checkpoint_steps)
    stops = [(step // n + 1) * n for n in every]
    return min(*stops, step + self.steps_per_call, self.total_steps)

  def is_due(self, every: int, step: int) -> bool:
    """Whether what is done every so many steps is done after this one."""
    return step % every == 0 or step == self.total_steps


def loop(
  state: Any,
  step_fn: Callable,
  source: Any,
  plan: Plan,
  *,
  folder: pathlib.Path,
  label: str,
  evaluate: Callable[[Any, int], dict[str, float]] | None = None,
  finish: Callable[[Any], Any] | None = None,
) -> Any:
  """Makes the remaining steps of a plan and returns the last state.

  Args:
    state: The state at step 0. The newest checkpoint in `folder` replaces it.
    step_fn: (state, x, y) -> (state, metrics), such as `step`.
    source: Gives the batch of each step, such as `pipeline.ArraySource`.
    plan: The number of steps and the intervals.
    folder: Receives checkpoints and metrics.
    label: The name of the work in progress lines.
    evaluate: (state, step) -> numbers for the log.
    finish: state -> state, once, before the last evaluation and checkpoint.

  Raises:
    errors.Interrupted: A signal came, and the state is saved.
    errors.Diverged: A metric in a record or before a checkpoint is not finite.
  """
  state = devices.replicate(state)
  call = compiled_call(step_fn, source.draw)
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    checkpoints = enter(checkpointing.Checkpoints(folder))
    done, state, values = checkpoints.restore(state) or (0, state, {})
    log, stop = enter(runs.MetricsLog(folder, done)), enter(runs.StopSignal())
    progress = enter(console.Progress(label, plan.total_steps, done))
    recent, clock = [values] if values else [], runs.Clock(folder)
    while done < plan.total_steps:
      k = plan.next_stop(done) - done
      state, metrics = call(state, source.resident, source.chunk(done, k))
      jax.block_until_ready(recent[-1:])  # At most two calls in flight.
      recent.append(metrics)
      done += k
      progress.update(done)
      record = {}
      if plan.is_due(plan.log_steps, done):
        record, recent = _means(recent), []
      if done == plan.total_steps and finish:
        state = finish(state)
      if evaluate and plan.is_due(plan.evaluate_steps, done):
        record |= evaluate(state, done)
      if record:
        _check_finite(record, label, done)
        log.write(done, **record, seconds=clock.seconds())
        progress.line(done, **record)
      number = stop.number or checkpoints.preempting_signal(done)
      if plan.is_due(plan.checkpoint_steps, done) or number:
        _check_finite(_means(recent), label, done)  # Save only finite ones.
        checkpoints.save(done, state, _values(recent))
      if number:
        raise errors.Interrupted(number, f'{label} step {done}')
  return state


def _values(recent) -> dict[str, list[float]]:
  """The metrics of each step since the last record."""
  host = jax.device_get(recent)
  return {
    name: [float(v) for metrics in host for v in metrics[name]]
    for name in (host[0] if host else ())
  }


def _means(recent) -> dict[str, float]:
  values = _values(recent)
  return {name: math.fsum(v) / len(v) for name, v in values.items()}


def _check_finite(record: Mapping[str, float], label: str, done: int) -> None:
  for name, value in record.items():
    if not math.isfinite(value):
      raise errors.Diverged(
        f'{label}: {name} is {value} at step {done}; a lower learning rate may '
        'help. The last checkpoint is kept.'
      )
