"""Fields, their rules, the files in configs/, and what follows from fields."""

import ast
import fractions
import importlib
import json
import math
import pathlib
import sys

import jax
import ml_collections
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from pfs_jax import config, errors
from tests import processes

PACKAGE = pathlib.Path(config.__file__).parent
FILES = sorted(p.stem for p in (processes.ROOT / 'configs').glob('*.py'))
NAN, INF = math.nan, math.inf


def _with(**fields):
  c = config.default()
  c.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in fields.items()}
  )
  return c


def _fields(c):
  """Dotted names of all fields."""
  return [name.removeprefix('config.') for name in config.flat(c, *c)]


# Rules.

# Bad values at the ends of the ranges, with the exact message to expect.
BAD = {
  'seed': [-1, 2**32],
  'dtype': ['float16', ''],
  'steps_per_call': [-1],
  'log_steps': [0],
  'checkpoint_steps': [0],
  'model.base_width': [-1],
  'model.width': [-1],
  'model.multiplier': [0.0, -1.0, NAN, INF],
  'model.gate_site': ['', 'other'],
  'data.train_examples': [-1],
  'data.validation_examples': [-1],
  'data.eval_batch_size': [0],
  'data.image_size': [-1],
  'data.num_classes': [-1],
  'data.workers': [-2],
  'data.corrupt': ['', 'ignore'],
  'search.epochs': [-0.5, NAN, INF],
  'search.batch_size': [0],
  'search.learning_rate': [0.0, NAN, INF],
  'search.balance': [-0.1, NAN, INF],
  'search.sparsity': [-0.1, 1.1, NAN],
  'search.evaluate_steps': [-1],
  'search.crop_scale': [-0.1, 1.1, NAN],
  'search.colour_jitter': [-0.1, 1.1, NAN],
  'search.lighting': [-0.1, 1.1, NAN],
  'budget.keep': [(0.0,), (0.5, 1.5), (NAN,), ('half',)],
  'budget.macs': [(0,), (-5,), (1.5,), (INF,), ('many',)],
  'budget.params': [(0,), (100, 1.5), (INF,), (NAN,)],
  'budget.max_macs': [-1],
  'budget.max_params': [-1],
  'budget.min_channels': [0],
  'budget.min_share': [-0.1, 1.5, NAN],
  'budget.round_to': [0],
  'budget.ranking': ['best', ''],
  'budget.power': [0.0, -1.0, NAN],
  'train.epochs': [0.0, -1.0, NAN, INF],
  'train.scratch': ['C', 'e'],
  'train.batch_size': [0],
  'train.learning_rate': [0.0, NAN, INF],
  'train.momentum': [-0.1, 1.0, NAN],
  'train.weight_decay': [-1e-4, NAN, INF],
  'train.decay_rule': ['none'],
  'train.schedule': ['linear'],
  'train.decay_at': [(1.5,), (-0.1, 0.5), (NAN,)],
  'train.decay_factor': [0.0, NAN, INF],
  'train.warmup_share': [-0.1, 1.1, NAN],
  'train.crop_scale': [-0.1, 1.1, NAN],
  'train.colour_jitter': [-0.1, 1.1, NAN],
  'train.lighting': [-0.1, 1.1, NAN],
  'train.label_smoothing': [-0.1, 1.0, NAN],
}


def test_the_default_keeps_its_own_rules():
  config.validate(config.default())
  assert config.default().is_locked


def test_rules_are_about_fields():
  assert set(config.RULES) <= set(_fields(config.default()))


def test_every_number_has_a_rule():
  c = config.default()
  numbers = {
    name
    for name in _fields(c)
    if isinstance(config.get(c, name), int | float | tuple)
    and not isinstance(config.get(c, name), bool)
  }
  assert numbers <= set(config.RULES)


# Of these no rule allows all of a type.
POOL = {
  int: (-(2**40), 2**40, -2, 0),
  float: (-1.0, 0.0, 1.5, NAN, INF),
  str: ('', 'neither'),
  tuple: ((-1,), (0.0,), (1.5,), (NAN,), ('x',)),
}


@pytest.mark.parametrize('field', config.RULES)
def test_every_rule_refuses_something_by_name(field):
  refused = []
  for value in POOL[type(config.get(config.default(), field))]:
    c = config.default()
    c.update_from_flattened_dict({field: value})
    try:
      config.validate(c)
    except errors.UserError as e:
      assert str(e).startswith(f'config.{field} must be ')
      assert str(e).endswith(f'; got {value!r}.')
      refused.append(value)
  assert refused
  if isinstance(config.get(config.default(), field), float):
    assert refused[-1] == INF  # And never lets NaN or infinity through.
    assert any(v != v for v in refused)


@pytest.mark.parametrize(
  'field, value', [(field, v) for field, values in BAD.items() for v in values]
)
def test_a_bad_value_is_refused_by_name(field, value):
  c = config.default()
  c.update_from_flattened_dict({field: value})
  with pytest.raises(errors.UserError) as e:
    config.validate(c)
  message = str(e.value)
  rule = config.RULES[field][0]
  assert message == f'config.{field} must be {rule}; got {value!r}.'


@pytest.mark.parametrize(
  'field, value',
  [
    ('search.sparsity', 0.0),
    ('search.sparsity', 1.0),
    ('search.epochs', 0.0),
    ('budget.keep', (1.0,)),
    ('budget.keep', (1, 0.5)),
    ('train.momentum', 0.0),
    ('train.decay_at', ()),
    ('seed', 2**32 - 1),
  ],
)
def test_the_ends_of_the_ranges_are_allowed(field, value):
  c = config.default()
  c.update_from_flattened_dict({field: value})
  config.validate(c)


def test_some_budget_is_needed():
  with pytest.raises(errors.UserError, match='at least one budget'):
    config.validate(_with(budget__keep=()))
  config.validate(_with(budget__keep=(), budget__params=(1000,)))


def test_a_holdout_needs_validation_images():
  with pytest.raises(errors.UserError, match='data.validation_examples must'):
    config.validate(_with(train__holdout=True, data__validation_examples=0))
  config.validate(_with(data__validation_examples=0))
  config.validate(_with(train__holdout=True))


# Overriding.


@pytest.fixture
def from_command_line(tmp_path, monkeypatch):
  """arguments -> config, as main.py has it."""
  path = tmp_path / 'c.py'
  path.write_text('from pfs_jax import config\nget_config = config.default\n')

  def load(*arguments):
    argv = ['main.py', f'--config={path}', *arguments]
    monkeypatch.setattr(sys, 'argv', argv)  # ml_collections looks there.
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
      'config', flag_values=values, lock_config=True
    )
    values(argv)
    return holder.value

  return load


def test_fields_are_overridden_one_by_one(from_command_line):
  c = from_command_line(
    '--config.search.sparsity=0.25', '--config.budget.keep=0.5,0.25'
  )
  config.validate(c)
  assert c.search.sparsity == 0.25 and c.budget.keep == (0.5, 0.25)
  assert c.search.balance == config.default().search.balance


def test_a_part_given_whole_is_refused(from_command_line):
  c = from_command_line("--config.search={'epochs': 1.0}")
  with pytest.raises(
    errors.UserError, match=r'^config\.search\.\w+ is missing\.$'
  ):
    config.validate(c)


def test_a_field_that_is_none_of_ours_is_refused():
  c = config.default()
  with c.unlocked():
    c.search.sparsty = 0.2
  with pytest.raises(
    errors.UserError, match=r'^config\.search\.sparsty is not a field\.$'
  ):
    config.validate(c)


# The files.


def _module(name):
  return importlib.import_module(f'configs.{name}')


def test_there_are_configs():
  assert 'digits' in FILES and 'resnet56' in FILES


@pytest.mark.parametrize('name', FILES)
def test_a_config_file_is_valid_in_all_variants(name):
  module = _module(name)
  assert 'full' in module.VARIANTS
  seen = []
  for variant in module.VARIANTS:
    c = module.get_config(variant)
    assert c.is_locked
    config.validate(c)
    assert config.budgets(c, 10**9)
    seen.append(c.to_json(sort_keys=True))
  assert len(set(seen)) == len(seen)  # Every variant changes something.
  assert module.get_config() == module.get_config('full')


@pytest.mark.parametrize('name', FILES)
def test_a_config_file_says_how_it_is_run(name):
  assert f'--config configs/{name}.py' in _module(name).__doc__


@pytest.mark.parametrize('name', FILES)
def test_an_unknown_variant_lists_the_known(name):
  with pytest.raises(errors.UserError) as e:
    _module(name).get_config('nope')
  for variant in _module(name).VARIANTS:
    assert variant in str(e.value)
  assert "'nope'" in str(e.value)


def test_a_variant_of_an_unknown_field_does_not_pass():
  with pytest.raises(KeyError):
    config.with_variant(config.default(), 'x', {'x': {'search.epoch': 1.0}})


# Every field is read.


def _names_read(source, skip=()):
  """Names that occur as attributes read or as whole strings."""
  tree = ast.parse(source)
  tree.body = [
    statement
    for statement in tree.body
    if not (
      skip
      and (
        isinstance(statement, ast.Assign | ast.Expr)
        or getattr(statement, 'name', '') in skip
      )
    )
  ]
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      yield node.attr
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
      yield node.value


def _all_names_read():
  found = set()
  for path in PACKAGE.rglob('*.py'):
    # Where config.py defines and checks a field, it does not use it.
    skip = ('default', 'validate', 'identity') if path.stem == 'config' else ()
    found.update(_names_read(path.read_text(), skip))
  return found


def _dead_fields(c):
  read = _all_names_read()
  return [f for f in _fields(c) if f.rpartition('.')[2] not in read]


def test_every_field_is_read_somewhere():
  assert _dead_fields(config.default()) == []


def test_a_dead_field_would_be_found():
  c = config.default()
  with c.unlocked():
    c.search.temperture = 1.0
  assert _dead_fields(c) == ['search.temperture']


# Budgets.


def _shares_and_references():
  rng = np.random.default_rng(0)
  for share in (0.1, 0.29, 0.3, 0.6, 0.7, 0.9):
    for reference in rng.integers(1, 10**8, 100):  # Products are integers.
      yield share, 100 * int(reference)
  for digits in rng.integers(1, 10, 300):
    share = round(rng.uniform(0.1, 1), digits)
    yield share, int(rng.integers(1, 10**12))


def test_a_share_allows_the_floor_of_the_exact_product():
  below = 0
  for share, reference in _shares_and_references():
    (budget,) = config.budgets(_with(budget__keep=(share,)), reference)
    # The decimal that was written, not the binary number next to it.
    exact = math.floor(fractions.Fraction(str(share)) * reference)
    assert (share, reference, budget.max_macs) == (share, reference, exact)
    assert budget.max_params is None
    below += math.floor(share * reference) != exact
  assert below > 0  # The plain product would have failed.


def test_known_products_just_below_an_integer():
  # 0.29 * 100 is 28.999999999999996 in binary, 0.7 * 10 is 7.0.
  assert 0.29 * 100 < 29
  for share, reference, expected in (
    (0.29, 100, 29),
    (0.7, 10, 7),
    (0.3, 125_485_706, 37_645_711),  # 37,645,711.8
    (1.0, 7, 7),
    (0.4999999999, 10_000, 4_999),  # 4,999.999999
  ):
    (budget,) = config.budgets(_with(budget__keep=(share,)), reference)
    assert budget.max_macs == expected


def test_one_budget_an_entry_in_order():
  c = _with(budget__keep=(0.5, 0.25), budget__macs=(7,), budget__params=(9, 8))
  found = [(b.name, b.max_macs, b.max_params) for b in config.budgets(c, 1000)]
  assert found == [
    ('keep0.5', 500, None),
    ('keep0.25', 250, None),
    ('macs7', 7, None),
    ('params9', None, 9),
    ('params8', None, 8),
  ]


@pytest.mark.parametrize('max_macs', [0, 300, 600])
@pytest.mark.parametrize('max_params', [0, 30, 60])
def test_a_ceiling_besides_takes_the_lower(max_macs, max_params):
  c = _with(
    budget__keep=(0.5,),
    budget__params=(40,),
    budget__max_macs=max_macs,
    budget__max_params=max_params,
  )
  by_share, by_params = config.budgets(c, 1000)
  assert by_share.max_macs == min(500, max_macs or 500)
  assert by_share.max_params == (max_params or None)
  assert by_params.max_macs == (max_macs or None)
  assert by_params.max_params == min(40, max_params or 40)


def test_names_tell_conditions_apart():
  """The name is a file's name: two cuts must not share one."""
  base = {'budget__keep': (0.5,)}
  variants = [
    {},
    {'budget__keep': (0.1234567,)},
    {'budget__keep': (0.1234568,)},
    {'budget__macs': (20_000_000,), 'budget__keep': ()},
    {'budget__params': (20_000_000,), 'budget__keep': ()},
    {'budget__max_macs': 20_000_000},
    {'budget__max_macs': 20_000_001},
    {'budget__max_params': 20_000_000},
    {'budget__min_channels': 2},
    {'budget__min_share': 0.1},
    {'budget__round_to': 8},
    {'budget__round_to': 8, 'budget__min_channels': 2},
  ]
  names = []
  for variant in variants:
    (budget,) = config.budgets(_with(**{**base, **variant}), 1000)
    names.append(budget.name)
    assert not set('/ +:') & set(budget.name)
  assert len(set(names)) == len(names)
  assert names[0] == 'keep0.5' and names[10] == 'keep0.5-roundto8'


def test_the_arguments_of_the_cut_are_all_but_the_name():
  c = _with(budget__round_to=8, budget__min_share=0.1, budget__min_channels=3)
  (budget,) = config.budgets(c, 1000)
  assert budget.ceilings() == {
    'max_macs': 500,
    'max_params': None,
    'max_latency_ms': None,
    'min_channels': 3,
    'min_share': 0.1,
    'round_to': 8,
  }


@pytest.mark.parametrize(
  'fields', [{'budget__keep': (0.5, 0.5)}, {'budget__macs': (5, 6, 5)}]
)
def test_the_same_budget_twice_is_refused(fields):
  with pytest.raises(errors.UserError, match='the same budget twice'):
    config.budgets(_with(**fields), 1000)


# Identity, keys, steps.

# A change of these does not change what a stage produces.
NOT_IDENTITY = {
  'data.data_dir',
  'data.source_dir',
  'data.download',
  'data.eval_batch_size',
  'data.workers',
  'train.structure',
  'train.reference',
}


def _changed(value):
  if isinstance(value, bool):
    return not value
  if isinstance(value, str):
    return value + 'x'
  if isinstance(value, tuple):
    return (*value, 0.125)
  return value + 1


@pytest.mark.parametrize('stage', ['search', 'train'])
def test_identity_is_every_field_that_changes_the_result(stage):
  c = config.default()
  before = config.digest(config.identity(c, stage))
  own = ('seed', 'dtype', 'model', 'data', stage)
  for field in _fields(c):
    other = config.default()
    value = _changed(config.get(c, field))
    other.update_from_flattened_dict({field: value})
    changes = config.digest(config.identity(other, stage)) != before
    counts = field.split('.')[0] in own and field not in NOT_IDENTITY
    assert (field, changes) == (field, counts)


def test_identity_survives_json():
  identity = config.identity(config.default(), 'train')
  assert config.digest(json.loads(json.dumps(identity))) == config.digest(
    identity
  )


def test_the_digest_is_the_same_in_every_process():
  code = """
    from pfs_jax import config
    print(config.digest(config.identity(config.default(), 'search')))
    """
  found = {
    processes.output(code, env={'PYTHONHASHSEED': seed}) for seed in '12'
  }
  here = config.digest(config.identity(config.default(), 'search'))
  assert found == {here}


def test_keys_differ_by_seed_and_purpose():
  purposes = ('search weights', 'search data', 'train weights', 'train data')
  keys = {
    tuple(jax.random.key_data(config.key(seed, purpose)).tolist())
    for seed in (0, 1, 2**32 - 1)
    for purpose in purposes
  }
  assert len(keys) == 12
  again = jax.random.key_data(config.key(1, 'train data')).tolist()
  assert tuple(again) in keys


@pytest.mark.parametrize(
  'epochs, steps_per_epoch, expected',
  [
    (0.0, 100, 0),
    (1e-6, 100, 1),  # Something was asked for.
    (0.5, 391, 196),  # 195.5, half to even.
    (160.0, 391, 62_560),
    (0.3, 10, 3),
    (2.0, 1, 2),
  ],
)
def test_epochs_become_steps(epochs, steps_per_epoch, expected):
  found = config.steps(epochs, steps_per_epoch)
  assert found == expected and isinstance(found, int)


def test_flat_and_get_agree():
  c = config.default()
  for field in _fields(c):
    assert config.flat(c, *c)[f'config.{field}'] == config.get(c, field)
    assert not isinstance(config.get(c, field), ml_collections.ConfigDict)
