"""The configuration: a config made of the table of fields, and its checks.

`default()` holds every field of `fields`. A file in configs/ changes some of
them, the command line changes more, and `validate` then checks the rules.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from pfs_jax import errors, fields

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def default() -> ml_collections.ConfigDict:
  """Every field at its default, locked.

  >>> default().search.sparsity
  0.5
  """
  c = ml_collections.ConfigDict()
  for field in fields.FIELDS:
    section, _, name = field.name.rpartition('.')
    if section and section not in c:
      c[section] = ml_collections.ConfigDict()
    (c[section] if section else c)[name] = field.default
  return c.lock()


# Variants that every CIFAR-10 config has.
CIFAR_VARIANTS = {
  'full': {},
  'r0.2': {'search.sparsity': 0.2},
  'scratch_b': {'train.scratch': 'B'},
  'smoke': {
    'data.name': 'digits',
    'data.validation_examples': 300,
    'search.epochs': 0.2,
    'train.epochs': 0.2,
  },
}


def imagenet(name: str) -> ml_collections.ConfigDict:
  """The paper's ImageNet runs, with the training of its MobileNets.

  Args:
    name: Of the model.
  """
  c = default()
  c.model.name = name
  c.data.name = 'imagenet2012'
  c.data.validation_examples = 50000
  c.search.epochs = 1.0
  c.search.batch_size = 100
  c.search.balance = 0.05
  c.search.evaluate_steps = 500
  c.search.crop_scale = 0.25
  c.train.epochs = 150.0
  c.train.batch_size = 256
  c.train.learning_rate = 0.05
  c.train.scale_rate = True
  c.train.nesterov = True
  c.train.weight_decay = 4e-5
  c.train.decay_rule = 'dense'
  c.train.schedule = 'cosine'
  c.train.label_smoothing = 0.1
  c.train.crop_scale = 0.25
  c.train.colour_jitter = 0.4
  c.train.lighting = 0.1
  c.steps_per_call = 1  # Batches come from the host.
  c.log_steps = 100
  c.checkpoint_steps = 1000
  return c


# What `smoke` changes in every ImageNet config: it draws its JPEG files itself.
IMAGENET_SMOKE = {
  'data.name': 'shapes',
  'data.validation_examples': 80,
  'data.eval_batch_size': 80,
  'data.workers': 1,
  'model.base_width': 8,
  'search.epochs': 1.0,
  'search.batch_size': 32,
  'search.evaluate_steps': 0,
  'budget.keep': (0.8,),  # So narrow a network has a floor of 2/3.
  'train.epochs': 4.0,
  'train.batch_size': 32,
  'train.learning_rate': 0.8,
  'log_steps': 15,
}


def with_variant(
  c: ml_collections.ConfigDict,
  variant: str,
  known: Mapping[str, Mapping[str, Any]],
) -> ml_collections.ConfigDict:
  """The config with the overrides of a variant; unknown ones list the known.

  Args:
    c: The config.
    variant: What stands after the colon of `--config configs/x.py:variant`.
    known: {variant: {'search.epochs': value, ...}}.
  """
  if variant not in known:
    raise errors.UserError(
      f'the variant must be one of {", ".join(known)}; got {variant!r}.'
    )
  c.update_from_flattened_dict(dict(known[variant]))
  return c


def get(config: ml_collections.ConfigDict, field: str) -> Any:
  """The value of a dotted field."""
  for name in field.split('.'):
    config = config[name]
  return config


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks every rule; raises UserError naming the field, rule and value."""
  given = [name.removeprefix('config.') for name in flat(config, *config)]
  for name in [*fields.BY_NAME, *given]:  # A section may be given whole.
    if name not in given or name not in fields.BY_NAME:
      known = 'missing' if name in fields.BY_NAME else 'not a field'
      raise errors.UserError(f'config.{name} is {known}.')
  for field in fields.FIELDS:
    value = get(config, field.name)
    rule = field.broken(value)
    if rule:
      raise errors.UserError(
        f'config.{field.name} must be {rule}; got {value!r}.'
      )
  kinds = ('keep', 'macs', 'params', 'latency_ms')
  if not any(config.budget[kind] for kind in kinds):
    raise errors.UserError(
      'config.budget must name at least one budget; '
      f'{", ".join(kinds)} are all empty.'
    )
  if config.train.holdout and not config.data.validation_examples:
    raise errors.UserError(
      'config.data.validation_examples must be >= 1 with config.train.holdout; '
      'got 0.'
    )


def flat(config: ml_collections.ConfigDict, *names: str) -> dict[str, Any]:
  """{'config.a.b': value} of these fields and sections."""
  found = {}
  for field in names:
    value = get(config, field)
    if isinstance(value, ml_collections.ConfigDict):
      found.update(flat(config, *(f'{field}.{name}' for name in value)))
    else:
      found[f'config.{field}'] = value
  return found


def identity(
  config: ml_collections.ConfigDict, *sections: str
) -> dict[str, Any]:
  """The fields that a result depends on; sections such as 'search', 'train'."""
  found = flat(config, 'seed', 'dtype', 'model', 'data', *sections)
  return {
    name: value
    for name, value in found.items()
    if fields.BY_NAME[name.removeprefix('config.')].result
  }


def digest(values: Mapping[str, Any]) -> str:
  """A hash of named values, the same on every machine and in every process."""
  text = json.dumps(dict(values), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(seed: int, purpose: str) -> jax.Array:
  """The PRNG key of one purpose ('search weights', 'train data', ...)."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def other_seed(seed: int, i: int) -> int:
  """The i-th seed beside a run's own, which is number 0.

  Far from the small numbers that people take, so that runs with other seeds do
  not share it.
  """
  return (seed + 1_000_003 * i) % 2**32


def steps(epochs: float, steps_per_epoch: int) -> int:
  """Epochs to steps, rounded; at least one step unless epochs is 0.

  Raises:
    errors.UserError: If there are more steps than an int32 can count.

  >>> steps(0.5, 391), steps(0.001, 10)
  (196, 1)
  """
  found = max(1, round(epochs * steps_per_epoch)) if epochs else 0
  if found >= 2**31:
    raise errors.UserError(
      f'{epochs:g} epochs of {steps_per_epoch} steps are too many: at most '
      '2**31 - 1 steps can be counted.'
    )
  return found
