"""Configs: built from the table of fields, changed by a file, and checked."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import traverse_util

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


def with_variant(
  c: ml_collections.ConfigDict,
  variant: str,
  known: Mapping[str, Mapping[str, Any]],
) -> ml_collections.ConfigDict:
  """The config with the overrides {'search.epochs': value, ...} of a variant.

  A variant is the text after the colon in `--config configs/x.py:variant`; one
  that is not known is refused.
  """
  if variant not in known:
    raise errors.UserError(
      f'the variant must be one of {", ".join(known)}; got {variant!r}.'
    )
  c.update_from_flattened_dict(dict(known[variant]))
  return c


def validate(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError with field, rule and value if a rule is broken."""
  given = flat(config)
  known = {f'config.{field.name}': field for field in fields.FIELDS}
  for name in [*known, *given]:  # A config may replace a section.
    if name not in given or name not in known:
      problem = 'missing' if name in known else 'not a field'
      raise errors.UserError(f'{name} is {problem}.')
  for name, field in known.items():
    rule = field.broken(given[name])
    if rule:
      raise errors.UserError(f'{name} must be {rule}; got {given[name]!r}.')
  for name in ('residual', 'leave', 'call', 'norm', 'conv'):
    if config.model[name] and not config.model.factory:
      raise errors.UserError(
        f'config.model.{name} needs config.model.factory; got '
        f'{config.model[name]!r}.'
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


def flat(config: ml_collections.ConfigDict, *sections: str) -> dict[str, Any]:
  """{'config.a.b': value} of the fields of some sections, by default of all."""
  found = traverse_util.flatten_dict(config.to_dict(), sep='.')
  return {
    f'config.{name}': value
    for name, value in found.items()
    if not sections or name.partition('.')[0] in sections
  }


def identity(
  config: ml_collections.ConfigDict, *sections: str
) -> dict[str, Any]:
  """The fields that the results of sections such as 'search' depend on."""
  found = flat(config, 'seed', 'dtype', 'model', 'data', *sections)
  found = {
    name: value
    for name, value in found.items()
    if fields.BY_NAME[name.removeprefix('config.')].result
  }
  if 'probe' in sections:  # A draw is a batch of the evaluation.
    found['config.data.eval_batch_size'] = config.data.eval_batch_size
  return found


def search_identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The fields that a search depends on; its evaluations choose the step."""
  chosen = {'config.train.statistics': config.train.statistics}
  return identity(config, 'search') | chosen


def digest(values: Mapping[str, Any]) -> str:
  """A hash of named values, which is the same on every machine."""
  text = json.dumps(dict(values), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(seed: int, purpose: str) -> jax.Array:
  """The PRNG key of one purpose ('search weights', 'train data', ...)."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def other_seed(seed: int, i: int) -> int:
  """The i-th seed of a run; for i = 0 it is the run's own seed.

  The seeds are far apart, so that runs with small seeds do not share them.
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
