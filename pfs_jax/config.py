"""The configuration: its fields, their rules, and what follows from them.

`default()` holds every field, with the paper's values for CIFAR-10. A file in
configs/ changes some of them; the command line changes more; `validate` checks
the rules. Derived numbers (steps, budgets) are computed here, after that.
"""

from __future__ import annotations

import dataclasses
import fractions
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict

from pfs_jax import errors

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def default() -> ml_collections.ConfigDict:
  """Every field, locked; the values are those of the paper's CIFAR-10 runs."""
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.dtype = 'float32'  # Of the computation; parameters stay float32.
  c.steps_per_call = 0  # 0: 1 on CPU, 16 on accelerators.
  c.log_steps = 50
  c.checkpoint_steps = 200
  c.model = config_dict.create(
    name='resnet56',
    base_width=0,  # Of the reference network; 0: the family's default.
    width=0,  # Of the searched network; 0: base_width. Wider: expansion.
    multiplier=1.0,  # Widens block outputs of the searched network.
    factory='',  # package.module:callable of your own model, in place of name.
    residual=False,  # With factory: prune what residual sums tie together too.
    gate_site='acting',  # Or 'published': MobileNets, docs/gate_sites.md.
  )
  c.data = config_dict.create(
    name='cifar10',
    data_dir='',  # Prepared sets; '': TFDS's default.
    source_dir='',  # A folder with files that you already have.
    download=True,
    train_examples=0,  # The first so many; 0: all.
    validation_examples=5000,  # The last so many, held out from the search.
    eval_batch_size=500,
    augment=True,
    # Of sets that are streamed (docs/imagenet.md):
    image_size=0,  # 0: the data set's own.
    num_classes=0,  # 0: the data set's own.
    workers=-1,  # Processes that decode; -1: one a core; 0: threads here.
    corrupt='error',  # Or 'skip': leave out files that cannot be decoded.
  )
  c.search = config_dict.create(
    epochs=10.0,
    batch_size=128,
    learning_rate=0.01,
    balance=0.5,  # lambda
    sparsity=0.5,  # r: the mean gate aimed at, a share to keep.
    evaluate_steps=0,  # 0: every epoch.
    crop_scale=0.0,  # Least area of a random resized crop; 0: the set's own.
    colour_jitter=0.0,  # Of brightness, contrast, saturation.
    lighting=0.0,  # Of AlexNet's PCA colours.
  )
  c.budget = config_dict.create(
    keep=(0.5,),  # Shares of the reference network's MACs, a structure each.
    macs=(),  # Absolute MACs, a structure each.
    params=(),  # Absolute parameters, a structure each.
    max_macs=0,  # A ceiling on every structure besides; 0: none.
    max_params=0,
    latency_ms=(),  # Milliseconds of a batch here, a structure each.
    latency_batch=1,  # Images in that batch.
    min_channels=1,
    min_share=0.0,
    round_to=1,
    ranking='global',  # layer_mean or cost: see prune.ranked.
    power=1.0,  # Of a channel's cost, with ranking 'cost'.
  )
  c.train = config_dict.create(
    init='random',  # inherit (fine-tuning) or rewind (lottery ticket).
    wide_epochs=0.0,  # With inherit: of the wide network; 0: epochs.
    structure='',  # A structure file; '': the one in the workdir.
    epochs=160.0,
    scratch='E',  # E: these epochs; B: the reference network's compute.
    batch_size=128,
    learning_rate=0.1,
    scale_rate=False,  # Rate times batch_size / 256.
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,
    decay_rule='all',  # Or 'dense': kernels of dense layers only.
    schedule='step',  # Or 'cosine'.
    decay_at=(0.5, 0.75),
    decay_factor=0.1,
    warmup_share=0.0,
    label_smoothing=0.0,
    crop_scale=0.0,  # As in search.
    colour_jitter=0.0,
    lighting=0.0,
    holdout=False,  # Leave the validation images out and evaluate on them.
    reference=False,  # Train the reference network too, to compare.
  )
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


# Rules: field -> (what it must be, test).
_POSITIVE = ('> 0', lambda v: v > 0)
_COUNT = ('>= 1', lambda v: v >= 1)
_NATURAL = ('>= 0', lambda v: v >= 0)
_SHARE = ('in [0, 1]', lambda v: 0 <= v <= 1)


def _all(rule, test):
  return (rule, lambda values: all(test(v) for v in values))


def _one_of(*names):
  return (f'one of {", ".join(names)}', lambda v: v in names)


RULES = {
  'seed': ('in [0, 2**32)', lambda v: 0 <= v < 2**32),
  'dtype': _one_of(*DTYPES),
  'steps_per_call': _NATURAL,
  'log_steps': _COUNT,
  'checkpoint_steps': _COUNT,
  'model.base_width': _NATURAL,
  'model.width': _NATURAL,
  'model.multiplier': _POSITIVE,
  'model.gate_site': _one_of('acting', 'published'),
  'data.train_examples': _NATURAL,
  'data.validation_examples': _NATURAL,
  'data.eval_batch_size': _COUNT,
  'data.image_size': _NATURAL,
  'data.num_classes': _NATURAL,
  'data.workers': ('>= -1', lambda v: v >= -1),
  'data.corrupt': _one_of('error', 'skip'),
  'search.epochs': _NATURAL,
  'search.batch_size': _COUNT,
  'search.learning_rate': _POSITIVE,
  'search.balance': _NATURAL,
  'search.sparsity': _SHARE,
  'search.evaluate_steps': _NATURAL,
  'search.crop_scale': _SHARE,
  'search.colour_jitter': _SHARE,
  'search.lighting': _SHARE,
  'budget.keep': _all('shares in (0, 1]', lambda v: 0 < v <= 1),
  'budget.macs': _all('integers >= 1', lambda v: v >= 1 and v == int(v)),
  'budget.params': _all('integers >= 1', lambda v: v >= 1 and v == int(v)),
  'budget.max_macs': _NATURAL,
  'budget.max_params': _NATURAL,
  'budget.latency_ms': _all('numbers > 0', lambda v: v > 0),
  'budget.latency_batch': _COUNT,
  'budget.min_channels': _COUNT,
  'budget.min_share': _SHARE,
  'budget.round_to': _COUNT,
  'budget.ranking': _one_of('global', 'layer_mean', 'cost'),
  'budget.power': _POSITIVE,
  'train.epochs': _POSITIVE,
  'train.init': _one_of('random', 'inherit', 'rewind'),
  'train.wide_epochs': _NATURAL,
  'train.scratch': _one_of('E', 'B'),
  'train.batch_size': _COUNT,
  'train.learning_rate': _POSITIVE,
  'train.momentum': ('in [0, 1)', lambda v: 0 <= v < 1),
  'train.weight_decay': _NATURAL,
  'train.decay_rule': _one_of('all', 'dense'),
  'train.schedule': _one_of('step', 'cosine'),
  'train.decay_at': _all('shares in [0, 1]', lambda v: 0 <= v <= 1),
  'train.decay_factor': _POSITIVE,
  'train.warmup_share': _SHARE,
  'train.crop_scale': _SHARE,
  'train.colour_jitter': _SHARE,
  'train.lighting': _SHARE,
  'train.label_smoothing': ('in [0, 1)', lambda v: 0 <= v < 1),
}


def get(config: ml_collections.ConfigDict, field: str) -> Any:
  """The value of a dotted field."""
  for name in field.split('.'):
    config = config[name]
  return config


_BUDGET_KINDS = ('keep', 'macs', 'params', 'latency_ms')


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks every rule; raises UserError naming the field, rule and value."""
  plain = flat(default(), *default())
  given = flat(config, *config)
  for field in [*plain, *given]:  # A sub-dict given whole replaces the other.
    if field not in given or field not in plain:
      known = 'missing' if field in plain else 'not a field'
      raise errors.UserError(f'{field} is {known}.')
  for field, (rule, test) in RULES.items():
    value = get(config, field)
    try:
      holds = test(value)
      if isinstance(value, float):
        holds = holds and math.isfinite(value)
    except (TypeError, ValueError, OverflowError):
      holds = False
    if not holds:
      raise errors.UserError(f'config.{field} must be {rule}; got {value!r}.')
  budget = config.budget
  if not any(budget[kind] for kind in _BUDGET_KINDS):
    raise errors.UserError(
      'config.budget must name at least one budget; '
      f'{", ".join(_BUDGET_KINDS)} are all empty.'
    )
  if config.train.holdout and not config.data.validation_examples:
    raise errors.UserError(
      'config.data.validation_examples must be >= 1 with config.train.holdout; '
      'got 0.'
    )


def flat(config: ml_collections.ConfigDict, *fields: str) -> dict[str, Any]:
  """{'config.a.b': value} of these fields and all fields below them."""
  found = {}
  for field in fields:
    value = get(config, field)
    if isinstance(value, ml_collections.ConfigDict):
      found.update(flat(config, *(f'{field}.{name}' for name in value)))
    else:
      found[f'config.{field}'] = value
  return found


# Where files are found or how fast the work goes does not change a result.
_DATA_PLACES = (
  'data_dir',
  'source_dir',
  'download',
  'eval_batch_size',
  'workers',
)


def identity(config: ml_collections.ConfigDict, stage: str) -> dict[str, Any]:
  """The fields on which the result of 'search' or 'train' depends."""
  fields = flat(config, 'seed', 'dtype', 'model', 'data', stage)
  without = [f'config.data.{name}' for name in _DATA_PLACES]
  without += ['config.train.structure', 'config.train.reference']
  return {k: v for k, v in fields.items() if k not in without}


def digest(fields: Mapping[str, Any]) -> str:
  """A hash of fields, the same on every machine and in every process."""
  text = json.dumps(dict(fields), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(seed: int, purpose: str) -> jax.Array:
  """The PRNG key of one purpose ('search weights', 'train data', ...)."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def steps(epochs: float, steps_per_epoch: int) -> int:
  """Epochs to steps, rounded; at least one step unless epochs is 0."""
  return max(1, round(epochs * steps_per_epoch)) if epochs else 0


@dataclasses.dataclass(frozen=True)
class Budget:
  """Ceilings of one structure and the name that its files carry.

  Attributes:
    name: Such as 'keep0.5', 'macs20000000', 'params100000' or 'latency2.5ms',
      with '-roundto8' and the like where the cut has more conditions.
    max_macs: Ceiling on MACs, or None.
    max_params: Ceiling on parameters, or None.
    max_latency_ms: Ceiling on the predicted milliseconds of a batch, or None.
    min_channels: See `prune.fit`.
    min_share: See `prune.fit`.
    round_to: See `prune.fit`.
  """

  name: str
  max_macs: int | None
  max_params: int | None
  max_latency_ms: float | None
  min_channels: int
  min_share: float
  round_to: int

  def ceilings(self) -> dict[str, Any]:
    """The arguments of `prune.fit`."""
    fields = dataclasses.asdict(self)
    del fields['name']
    return fields


def budgets(
  config: ml_collections.ConfigDict, reference_macs: int
) -> tuple[Budget, ...]:
  """One budget for each entry of keep, macs, params, latency_ms, in this order.

  A share allows floor(share * reference_macs) MACs.
  """
  c = config.budget
  asked = [
    # A share such as 0.3 is meant exactly, not as the binary float below it.
    (
      f'keep{share:.12g}',
      math.floor(fractions.Fraction(str(share)) * reference_macs),
      None,
      None,
    )
    for share in c.keep
  ]
  asked += [(f'macs{int(n)}', int(n), None, None) for n in c.macs]
  asked += [(f'params{int(n)}', None, int(n), None) for n in c.params]
  asked += [
    (f'latency{ms:.12g}ms', None, None, float(ms)) for ms in c.latency_ms
  ]
  suffix = ''
  for field, plain in (
    ('latency_batch', 1),
    ('max_macs', 0),
    ('max_params', 0),
    ('min_channels', 1),
    ('min_share', 0.0),
    ('round_to', 1),
  ):
    if c[field] != plain:
      suffix += f'-{field.replace("_", "")}{c[field]:.12g}'
  if c.ranking != 'global':
    suffix += f'-{c.ranking.replace("_", "")}'
    suffix += f'{c.power:.12g}' if c.ranking == 'cost' else ''

  def lower(ceiling, besides):
    given = [n for n in (ceiling, besides or None) if n is not None]
    return min(given, default=None)

  found = tuple(
    Budget(
      name + suffix,
      lower(macs, c.max_macs),
      lower(params, c.max_params),
      latency_ms,
      c.min_channels,
      c.min_share,
      c.round_to,
    )
    for name, macs, params, latency_ms in asked
  )
  if len({b.name for b in found}) < len(found):
    raise errors.UserError('config.budget names the same budget twice.')
  return found
