"""Fields, their rules, the files in configs/, and what follows from fields."""

import ast
import dataclasses
import fractions
import importlib
import json
import math
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

from benchmarks import config_page
from pfs_jax import (
  budgets,
  config,
  errors,
  fields,
  models,
  prune,
  rankings,
  runs,
  scores,
)
from tests import processes, small_run

PACKAGE = pathlib.Path(config.__file__).parent
FILES = sorted(p.stem for p in (processes.ROOT / 'configs').glob('*.py'))
NAN, INF = math.nan, math.inf


def _with(**given):
  c = config.default()
  c.update_from_flattened_dict(small_run.dotted(given))
  return c


def _budgets(c, reference_macs):
  return budgets.from_section(c.budget, reference_macs)


# {rule: (values at the ends of what it allows, values just beyond)}.
ENDS = {
  'a text': (['', 'x'], []),  # ml_collections refuses other types.
  'True or False': ([True, False], []),
  '> 0': ([1e-9, 1, 10**6], [0, -1e-9, NAN]),
  '>= 0': ([0, 10**6], [-1, -1e-9, NAN]),
  '>= 1': ([1], [0, -(2**40)]),
  '>= 2': ([2], [1, 0]),
  '>= -1': ([-1], [-2]),
  rankings.RULE: (
    ['cost', 'cost9.9', 'tilt-0.4'],
    ['', 'blend', 'mean', 'tilt10', 'cost1e3'],
  ),
  'texts': ([(), ('a', 'b')], [(1,), ('a', 2.0)]),
  'an integer >= 0': ([0, 2**63 - 1], [-1]),
  'in [0, 1]': ([0.0, 1.0], [-1e-9, 1.1, INF, NAN]),
  'in [0, 10]': ([0.0, 10.0], [-1e-9, 10.1, INF, NAN]),
  'in (0, 10]': ([1e-9, 10.0], [0.0, 10.1, INF, NAN]),
  'in [0, 1)': ([0.0, 0.99], [-1e-9, 1.0, INF, NAN]),
  'in [0, 2**32)': ([0, 2**32 - 1], [-1, 2**32]),
  'numbers > 0': ([(), (1e-9, 3)], [(0.0,), (1.0, -1.0), (NAN,), ('x',)]),
  'integers >= 1': (
    [(), (1, 2.0), (2**63 - 1,)],
    [(0,), (100, 1.5), (INF,), (NAN,), ('many',), (True,)],
  ),
  'shares in (0, 1]': (
    [(1.0,), (1, 0.5)],
    [(0.0,), (0.5, 1.5), (NAN,), (INF,), (True,)],
  ),
  'shares in [0, 1]': ([(), (0.0, 1.0)], [(-0.1,), (1.5,), (NAN,), ('half',)]),
}


def _ends(field):
  if field.rule.startswith('one of '):
    names = field.rule.removeprefix('one of ').split(', ')
    return names, ['', 'neither', names[0].swapcase(), ', '.join(names)]
  return ENDS[field.rule]


def _message(field, value):
  c = config.default()
  try:
    c.update_from_flattened_dict({'model.factory': 'm:f', field.name: value})
    config.validate(c)
  except TypeError:  # ml_collections: a float for an integer field.
    return None
  except errors.UserError as e:
    return str(e)
  return ''


@pytest.mark.parametrize('field', fields.FIELDS, ids=lambda f: f.name)
def test_a_field_takes_what_its_rule_says(field):
  allowed, beyond = _ends(field)
  for value in allowed:
    assert not _message(field, value)
  wanted = f'config.{field.name} must be {field.rule}; got '
  for value in beyond:
    if isinstance(field.default, float):
      value = float(value)
    found = _message(field, value)
    assert found is None or found == f'{wanted}{value!r}.'
  if type(field.default) in (int, float, tuple):
    assert any(_message(field, value) for value in beyond)


@pytest.mark.parametrize(
  'name, value, most',
  [
    ('train.epochs', 1e308, '1000000'),
    ('train.epochs', 1e12, '1000000'),
    ('search.epochs', INF, '1000000'),
    ('train.learning_rate', 1e300, '1000000'),
    ('log_steps', 2**40, '4294967296'),
    ('budget.max_macs', 2**63, '9223372036854775807'),
    ('budget.latency_ms', (1.0, 1e7), '1000000'),
  ],
)
def test_numbers_beyond_sense_are_refused(name, value, most):
  wanted = f'config.{name} must be <= {most}; got {value!r}.'
  assert _message(fields.BY_NAME[name], value) == wanted


def test_more_steps_than_can_be_counted_are_refused(refused):
  assert config.steps(1e6, 2147) == 2_147_000_000
  refused('at most 2[*]{2}31 - 1 steps', config.steps, 1e6, 2148)


def test_the_default_is_valid_and_locked():
  c = config.default()
  config.validate(c)
  assert c.is_locked
  defaults = {f'config.{f.name}': f.default for f in fields.FIELDS}
  assert config.flat(c) == defaults


def test_the_page_of_fields_is_that_of_the_table():
  """Else: python -m benchmarks.config_page > docs/config.md."""
  text = (processes.ROOT / 'docs' / 'config.md').read_text()
  assert text == config_page.page()
  assert all(f.doc.endswith('.') for f in fields.FIELDS)


def test_fields_that_need_each_other(refused):
  config.validate(_with(budget__keep=(), budget__params=(1000,)))
  config.validate(_with(data__validation_examples=0))
  config.validate(_with(train__holdout=True))
  config.validate(_with(model__factory='m:f', model__residual=True))
  lists = json.loads(json.dumps(config.default().to_dict()))
  for c, message in (
    (ml_collections.ConfigDict(lists), 'model.counts must be a tuple of'),
    (_with(budget__keep=()), 'at least one budget'),
    (_with(model__residual=True), 'residual needs config.model.factory; got T'),
    (_with(model__leave=('a',)), r"leave needs .*factory; got \('a',\)"),
    (
      _with(train__holdout=True, data__validation_examples=0),
      'data.validation_examples must',
    ),
  ):
    refused(message, config.validate, c)


def test_a_field_that_is_none_of_ours_is_refused(refused):
  c = config.default()
  with c.unlocked():
    c.search.sparsty = 0.2
  refused(r'sparsty is not a field\.$', config.validate, c)


@pytest.mark.parametrize('name', FILES)
def test_a_config_file(name, refused):
  """All variants are valid and differ; the docstring says how it is run."""
  module = importlib.import_module(f'configs.{name}')
  assert f'--config configs/{name}.py' in module.__doc__
  assert 'full' in module.VARIANTS
  seen = set()
  for variant in module.VARIANTS:
    c = module.get_config(variant)
    assert c.is_locked
    config.validate(c)
    assert _budgets(c, 10**9)
    seen.add(c.to_json(sort_keys=True))
  assert len(seen) == len(module.VARIANTS)
  assert module.get_config() == module.get_config('full')
  e = refused("'nope'", module.get_config, 'nope')
  assert all(variant in str(e) for variant in module.VARIANTS)


def test_a_variant_of_an_unknown_field_does_not_pass():
  with pytest.raises(KeyError):
    config.with_variant(config.default(), 'x', {'x': {'search.epoch': 1.0}})


SECTIONS = {f.name.split('.')[0] for f in fields.FIELDS if '.' in f.name}
# Parameters and attributes that hold a section, or the whole config.
HOLDERS = {
  'recipe': {'train'},
  'section': {'budget'},
  'fields': {'data'},
  **dict.fromkeys(('c', 'config', '_config'), {''}),
}


def _sections(node, names):
  """The sections that an expression may stand for; '' is the whole config."""
  if isinstance(node, ast.IfExp):
    return _sections(node.body, names)
  if isinstance(node, ast.Subscript):  # config[stage]
    return {'search', 'train'} if _sections(node.value, names) else set()
  if isinstance(node, ast.Name):
    return names.get(node.id, set())
  if isinstance(node, ast.Attribute):
    if node.attr in SECTIONS and _sections(node.value, names) == {''}:
      return {node.attr}
    return HOLDERS.get(node.attr, set())
  return set()


def _reads(tree):
  """Dotted names of the fields that a piece of code reads."""
  names = dict(HOLDERS)
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign):
      targets, values = node.targets[0], node.value
      pairs = [(targets, values)]
      if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple):
        pairs = zip(targets.elts, values.elts, strict=True)
      for target, value in pairs:
        if isinstance(target, ast.Name) and _sections(value, names):
          names[target.id] = _sections(value, names)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      for section in _sections(node.value, names):
        yield f'{section}.{node.attr}'.removeprefix('.')


def _all_reads():
  found = set()
  for path in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef) and (
        path.stem != 'config' or node.name != 'validate'
      ):
        found.update(_reads(node))
  return found


def test_every_field_is_read_somewhere():
  # `budgets.from_section` takes the fields of a Budget by name.
  named = {f'budget.{f.name}' for f in dataclasses.fields(prune.Budget)}
  assert set(fields.BY_NAME) - _all_reads() - named == set()


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
    (budget,) = _budgets(_with(budget__keep=(share,)), reference)
    # The decimal that was written, not the binary number next to it.
    exact = math.floor(fractions.Fraction(str(share)) * reference)
    assert (share, reference, budget.max_macs) == (share, reference, exact)
    assert budget.max_params is None
    below += math.floor(share * reference) != exact
  assert below > 0  # The plain product would have failed.


def test_one_budget_an_entry_in_order():
  c = _with(budget__keep=(0.5, 0.25), budget__macs=(7,), budget__params=(9, 8))
  timed = _with(budget__latency_ms=(2.5,), budget__latency_batch=4)
  *_, last = _budgets(timed, 1001)
  assert last.name.endswith('-latencybatch4') and last.max_macs is None
  assert last.max_latency_ms == 2.5
  found = [(b.name, b.max_macs, b.max_params) for b in _budgets(c, 1000)]
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
  by_share, by_params = _budgets(c, 1000)
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
    *({'budget__max_macs': 20_000_000 + i} for i in (0, 1)),
    {'budget__max_params': 20_000_000},
    {'budget__min_channels': 2},
    {'budget__min_share': 0.1},
    {'budget__round_to': 8},
    {'budget__round_to': 8, 'budget__min_channels': 2},
  ]
  names = []
  for variant in variants:
    (budget,) = _budgets(_with(**{**base, **variant}), 1000)
    names.append(budget.name)
    assert not set('/ +:') & set(budget.name)
  assert len(set(names)) == len(names)
  assert names[0] == 'keep0.5' and names[10] == 'keep0.5-roundto8'


def test_a_budget_holds_all_conditions():
  given = {'round_to': 8, 'min_share': 0.1, 'min_channels': 3, 'power': 0.5}
  given['ranking'] = 'cost'
  c = _with(**{f'budget__{name}': value for name, value in given.items()})
  (budget,) = _budgets(c, 1000)
  name = 'keep0.5-minchannels3-minshare0.1-roundto8-cost0.5'
  assert budget == prune.Budget(name=name, max_macs=500, **given)


@pytest.mark.parametrize(
  'given', [{'budget__keep': (0.5, 0.5)}, {'budget__macs': (5, 6, 5)}]
)
def test_the_same_budget_twice_is_refused(given, refused):
  refused('the same budget twice', _budgets, _with(**given), 1000)


# A change of these does not change what a stage produces.
NOT_IDENTITY = """
  data.data_dir data.source_dir data.download data.workers data.eval_batch_size
  data.corrupt train.structure train.reference""".split()


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
  for field, entry in fields.BY_NAME.items():
    other, value = config.default(), _changed(entry.default)
    other.update_from_flattened_dict({field: value})
    changes = config.digest(config.identity(other, stage)) != before
    counts = field.split('.')[0] in own and field not in NOT_IDENTITY
    assert (field, changes) == (field, counts)


def test_a_workdir_may_be_older_than_a_field(tmp_path):
  """What its config.json lacks counts as the default."""
  identity = config.identity(config.default(), 'train')
  older = {k: v for k, v in identity.items() if 'decay_at' not in k}
  runs.claim(tmp_path, older)
  runs.claim(tmp_path, identity)
  with pytest.raises(errors.UserError, match='config.train.decay_at'):
    runs.claim(tmp_path, {**identity, 'config.train.decay_at': (0.9,)})


def test_digests_and_cuts_are_the_same_in_every_process():
  """Also with another order of sets: a new interpreter, another hash seed."""
  code = """
    from pfs_jax import config, models, prune, scores
    print(config.digest(config.identity(config.default(), 'search')))
    model = models.cost_model('resnet8', 10, 8, 1, 6)
    half = model.macs(model.widths) // 2
    print(*prune.fit(scores.random(model, 0), model, half).counts)
    """
  env = {'PYTHONHASHSEED': '1'}
  found, counts = processes.output(code, env=env, fresh=True).splitlines()
  identity = config.identity(config.default(), 'search')
  assert found == config.digest(identity)
  model = models.cost_model('resnet8', 10, 8, 1, 6)
  half = model.macs(model.widths) // 2
  expected = prune.fit(scores.random(model, 0), model, half).counts
  assert tuple(map(int, counts.split())) == expected
  assert found == config.digest(json.loads(json.dumps(identity)))


def test_keys_differ_by_seed_and_purpose():
  purposes = ('search weights', 'search data', 'train weights', 'train data')
  keys = {
    tuple(jax.random.key_data(config.key(seed, purpose)).tolist())
    for seed in (0, 1, 2**32 - 1)
    for purpose in purposes
  }
  assert len(keys) == 12


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
