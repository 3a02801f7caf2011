"""The cut: ceilings, ties, floors, the published halving, a brute oracle."""

import json

import numpy as np
import pytest

from pfs_jax import errors, models, prune, scores

CASES = [('resnet20', 8), ('vgg16', 8)]


def cost_model(name, width):
  return models.cost_model(name, 10, 16, 3, width)


def random_gates(model, seed, levels=0):
  """Gates in 0..1; with few levels there are many ties."""
  rng = np.random.default_rng(seed)
  gates = {}
  for layer, width in zip(model.layers, model.widths, strict=True):
    g = rng.random(width).astype(np.float32)
    gates[layer] = np.floor(g * levels) / levels if levels else g
  return gates


def ranking(gates):
  """(layer, channel), best first, by the rule that prune.fit documents."""
  rows = []
  for i, g in enumerate(gates.values()):
    for c, value in enumerate(g):
      tied = [k for k, other in enumerate(g) if other == value]
      key = (tied.index(c) + 0.5) / len(tied)
      rows.append((-float(value), key, i, c))
  return [(i, c) for _, _, i, c in sorted(rows)]


def oracle(gates, model, max_macs, max_params, least, cost=None):
  """A linear scan over every prefix, then the fill, one channel at a time."""
  cost = cost or (lambda c: (model.macs(c), model.params(c)))

  def fits(counts):
    macs, params = cost(counts)
    return macs <= max_macs and params <= max_params

  order, best = ranking(gates), 0
  taken = [[0] * len(model.layers)]
  for i, _ in order:
    taken.append(list(taken[-1]))
    taken[-1][i] += 1
  prefixes = [np.maximum(t, least) for t in taken]
  best = max(k for k, counts in enumerate(prefixes) if fits(counts))
  counts = prefixes[best].copy()
  for k in range(best, len(order)):
    i = order[k][0]
    if taken[k + 1][i] <= counts[i]:
      continue  # Already kept, as part of the minimum width.
    counts[i] += 1
    if not fits(counts):
      counts[i] -= 1
      # The channels behind it in this layer wait for it: ranks are in order.
      taken = [
        [n - (j == i and m > k) for j, n in enumerate(t)]
        for m, t in enumerate(taken)
      ]
  return tuple(int(c) for c in counts)


@pytest.mark.parametrize('name,width', CASES)
@pytest.mark.parametrize('levels', [0, 3])
def test_fit_equals_a_linear_scan(name, width, levels):
  model = cost_model(name, width)
  full = model.macs(model.widths), model.params(model.widths)
  for seed, share in enumerate((0.3, 0.5, 0.8, 1.0)):
    gates = random_gates(model, seed, levels)
    least = prune.Budget(min_channels=1 + seed % 2).least(model)
    ceilings = (
      max(int(share * full[0]), model.macs(least)),
      max(int(share * full[1]), model.params(least)),
    )
    found = prune.fit(gates, model, *ceilings, min_channels=1 + seed % 2)
    assert found.counts == oracle(gates, model, *ceilings, least)
    assert found.macs <= ceilings[0] and found.params <= ceilings[1]


@pytest.mark.parametrize(
  'name,width,off', [('resnet20', 16, 2), ('vgg16', 32, 1.5)]
)
@pytest.mark.parametrize('value', [0.0, 0.37])
def test_equal_gates_give_near_uniform_widths(name, width, off, value):
  model = cost_model(name, width)
  gates = {layer: ones * value for layer, ones in scores.equal(model).items()}
  full, floor = model.macs(model.widths), model.macs((1,) * len(model.widths))
  for share in (0.1, 0.25, 0.5, 0.75):
    found = prune.fit(gates, model, int(floor + share * (full - floor)))
    # One share for all: each count is within a channel or two of it.
    widths = np.array(model.widths)
    uniform = np.median(found.counts / widths) * widths
    assert np.abs(found.counts - uniform).max() <= off, found.counts
    assert found.unused['macs'] < scores.channel_costs(model).max()
    assert found.tie_share == 1.0


@pytest.mark.parametrize(
  ('sizes', 'layers', 'positions'),
  [
    # Keys 1/4, 3/4 and 1/8, 3/8, 5/8, 7/8.
    ((2, 4), [1, 0, 1, 1, 0, 1], [0, 0, 1, 2, 1, 3]),
    # Equal keys go to the earlier layer.
    ((3, 3), [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]),
  ],
)
def test_ties_order(sizes, layers, positions):
  layer, position = prune._order([np.ones(n) for n in sizes])
  assert layer.tolist() == layers and position.tolist() == positions


def test_tie_share():
  model = cost_model('resnet20', 4)
  distinct = random_gates(model, 0)
  half = model.macs(model.widths) * 2 // 3
  assert prune.fit(distinct, model, half).tie_share == 0.0
  # Gates of 0 and 0.5: every 0.5 is kept, some of the zeros are.
  gates = random_gates(model, 0, levels=2)
  found = prune.fit(gates, model, half)
  indices = prune.kept(gates, found)
  kept = np.concatenate([gates[layer][indices[layer]] for layer in gates])
  assert (kept == 0.5).sum() == sum((g == 0.5).sum() for g in gates.values())
  assert found.tie_share == pytest.approx((kept == 0).mean())
  assert found.tie_share > 0


def test_infeasible_names_the_floor():
  model = cost_model('resnet20', 8)
  gates = random_gates(model, 0)
  floor = model.macs((1,) * 9)
  with pytest.raises(prune.Infeasible, match=f'{floor:,}') as e:
    prune.fit(gates, model, max_macs=floor - 1)
  assert (e.value.floor, e.value.quantity) == (floor, 'macs')
  assert prune.fit(gates, model, max_macs=floor).counts == (1,) * 9
  floor = model.params((3,) * 9)
  with pytest.raises(prune.Infeasible) as e:
    prune.fit(gates, model, max_params=floor - 1, min_channels=3)
  assert (e.value.floor, e.value.quantity) == (floor, 'params')


def test_wide_residual_stream_has_a_floor_above_the_reference():
  """ResNet-56 at width 48, multiples of 8: 0.91."""
  model = models.cost_model('resnet56', 10, 32, 3, 48)
  reference = models.cost_model('resnet56', 10, 32, 3)
  least = prune.Budget(round_to=8).least(model)
  share = model.macs(least) / reference.macs(reference.widths)
  assert share == pytest.approx(0.91, abs=0.005)


def test_published_counts(golden):
  """Every case, count for count; a clear error where it crashed."""
  cases = json.loads((golden / 'bisection.json').read_text())
  arrays = np.load(golden / 'bisection.npz')
  assert len(cases) == 11
  for i, case in enumerate(cases):
    name = case['arch'].replace('_bn', '')
    large = name in ('mobilenet_v1', 'mobilenet_v2', 'resnet50')
    classes, size = (1000, 224) if large else (10, 32)
    width = case['expanded_inchannel']
    model = models.cost_model(name, classes, size, width=width)
    assert list(model.widths) == case['gate_sizes']
    parts = np.split(arrays[f'gates_{i:02d}'], np.cumsum(model.widths)[:-1])
    gates = dict(zip(model.layers, parts, strict=True))
    arguments = (gates, model, case['ratio'], case['full_macs'])
    if 'fails' in case:
      message = f'0 channels at iteration {case["fails"].split()[-1]}'
      with pytest.raises(errors.UserError, match=message):
        prune.published(*arguments)
    else:
      found = prune.published(*arguments)
      assert list(found.counts) == case['counts']
      assert (found.macs, found.params) == (case['macs'], case['params'])
      assert found.budget['iterations'] == case['iters']
      assert sum(found.counts) == case['kept']
    # The exact cut is never over the budget and leaves less than one channel.
    budget = int(case['full_macs'] * (1 - case['ratio']))
    exact = prune.fit(gates, model, budget)
    assert exact.macs <= budget
    for layer in range(len(model.layers)):
      wider = np.array(exact.counts)
      wider[layer] += 1
      if wider[layer] <= model.widths[layer]:
        assert model.macs(wider) > budget


def test_kept_channels():
  model = cost_model('vgg16', 4)
  gates = random_gates(model, 3, levels=4)
  found = prune.fit(gates, model, model.macs(model.widths) // 2)
  kept = prune.kept(gates, found)
  for (layer, indices), count in zip(kept.items(), found.counts, strict=True):
    assert len(indices) == count
    assert (np.diff(indices) > 0).all()
    dropped = np.setdiff1d(np.arange(len(gates[layer])), indices)
    if len(dropped):
      assert gates[layer][indices].min() >= gates[layer][dropped].max()


def test_structure_survives_json():
  model = cost_model('resnet20', 8)
  half = model.macs(model.widths) // 2
  found = prune.fit(random_gates(model, 0), model, half)
  assert prune.Structure.from_json(found.to_json()) == found
  assert found.unused == {'macs': found.budget['max_macs'] - found.macs}


DAMAGE = [
  ({'schema': 'other'}, r"Invalid enum value 'other' - at `\$.schema`"),
  ({'counts': [1]}, r'Expected `object`, got `array` - at `\$.counts`'),
  ({'counts': {'stem': 0}}, r"counts\['stem'\] must be an integer >= 1 .* 0"),
  ({'counts': {'stem': 1.5}}, r'got 1.5\.$'),
  ({'counts': {'stem': True}}, r'got True\.$'),
  ({'counts': {'stem': 2**31}}, r'< 2\*\*31; got 2147483648'),
  ({'macs': 'many'}, r'Expected `int`, got `str` - at `\$.macs`'),
  ({'macs': 2**70}, r'<= 9223372036854775807` - at `\$.macs`|- at `\$.macs`'),
  ({'macs': -1}, r'>= 0 - at `\$.macs`'),
  ({'maks': 1}, 'unknown field `maks`'),
  ({'budget': {'max_macs': 'x'}}, 'of budget is no number'),
  ({'source': json.loads('{"a":' * 700 + '1' + '}' * 700)}, 'nested deeply'),
]


def _file(**changes):
  model = cost_model('resnet20', 8)
  data = json.loads(prune.fit(random_gates(model, 0), model).to_json())
  return json.dumps({**data, **changes})


@pytest.mark.parametrize('changes, message', DAMAGE)
def test_an_edited_structure_is_refused_by_field(changes, message):
  with pytest.raises(errors.UserError, match=message):
    prune.Structure.from_json(_file(**changes))


@pytest.mark.parametrize(
  'text',
  [
    '',
    '[',
    '\x00\x01',
    '{}',
    '[' * 10**5,
    _file().replace('"binding"', '"unknown"'),
    _file().replace('"source": {', '"source": {"a": ' + '{"b":' * 10**5),
    _file(macs=7).replace('"macs": 7,', f'"macs": {"9" * 5000},'),
  ],
  ids=range(8),
)
def test_what_is_no_structure_is_refused_in_one_line(text):
  with pytest.raises(errors.UserError) as e:
    prune.Structure.from_json(text, 'x.json')
  assert str(e.value).startswith('x.json: ')
  assert len(str(e.value)) < 200 and '\n' not in str(e.value)


def test_gates_must_be_those_of_the_model():
  model = cost_model('resnet20', 8)
  gates = random_gates(model, 0)
  with pytest.raises(ValueError, match='in forward order'):
    prune.fit(dict(reversed(gates.items())), model)
  with pytest.raises(ValueError, match=r'must have shape \(8,\)'):
    prune.fit({**gates, 'stage1_block0/conv1': np.ones(9)}, model)
  gates['stage1_block0/conv1'][3] = np.nan
  with pytest.raises(ValueError, match='must be finite'):
    prune.fit(gates, model)
