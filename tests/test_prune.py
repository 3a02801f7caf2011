"""The cut: ceilings, ties, floors, the published halving, width profiles."""

import json

import numpy as np
import pytest

from pfs_jax import models, prune, rankings, scores

# Layers of 3 to 24 channels.
CASES = [('resnet20', 5), ('vgg16', 3)]


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
  """The layer of each channel, best first, by the rule of `prune.fit`."""
  rows = []
  for i, g in enumerate(gates.values()):
    for c, value in enumerate(g):
      tied = [k for k, other in enumerate(g) if other == value]
      key = (tied.index(c) + 0.5) / len(tied)
      rows.append((-float(value), key, i, c))
  return [i for _, _, i, _ in sorted(rows)]


def oracle(gates, ceilings, least, costs):
  """A linear scan over every prefix, then the fill, one channel at a time."""

  def fits(counts):
    return all(
      n <= most for n, most in zip(costs(counts), ceilings, strict=True)
    )

  order = ranking(gates)
  channels = np.eye(len(gates), dtype=int)[order]
  taken = np.cumsum([0 * channels[0], *channels], axis=0)
  best = max(k for k, n in enumerate(taken) if fits(np.maximum(n, least)))
  counts = np.maximum(taken[best], least)
  for k in range(best, len(order)):
    # Others were kept as part of the minimum width.
    new = taken[k + 1][order[k]] > counts[order[k]]
    if new and fits(counts + channels[k]):
      counts += channels[k]
  return counts


@pytest.mark.parametrize('name,width', CASES)
@pytest.mark.parametrize('levels', [0, 1, 3])
@pytest.mark.parametrize('round_to', [1, 4])
def test_a_cut_with_ties_is_a_linear_scan(name, width, levels, round_to):
  """With `round_to` each layer's best so many channels, by their mean gate."""
  model = cost_model(name, width)
  steps = np.minimum(round_to, model.widths)

  def costs(blocks):
    return model.macs(blocks * steps), model.params(blocks * steps)

  for seed, shares in enumerate(((0.3, 0.9), (0.9, 0.3), (0.5, 0.5), (1, 1))):
    gates = random_gates(model, seed, levels)
    conditions = {'min_channels': 1 + seed % 2, 'min_share': seed / 8}
    conditions['round_to'] = round_to
    budget = prune.Budget(**conditions)
    least, most = budget.least(model), budget.most(model)
    for low, high, full in zip(least, most, model.widths, strict=True):
      assert seed / 8 * full <= low <= high <= full
      assert low % round_to == 0 or low == full < round_to
    blocks = {
      k: np.sort(np.float64(g))[::-1][: len(g) // n * n].reshape(-1, n).mean(1)
      for (k, g), n in zip(gates.items(), steps, strict=True)
    }
    floor, whole = np.array(least) // steps, np.array(most) // steps
    ceilings = np.maximum(np.multiply(shares, costs(whole)), costs(floor))
    ceilings = ceilings.astype(int).tolist()
    found = prune.fit(gates, model, *ceilings, **conditions)
    wanted = oracle(blocks, ceilings, floor, costs)
    assert found.counts == tuple(wanted * steps)
    assert found.macs <= ceilings[0] and found.params <= ceilings[1]
    assert bool(found.binding) == (min(shares) < 1)


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


def test_published_counts(golden, refused):
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
      refused(message, prune.published, *arguments)
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


def test_structure_survives_json(refused):
  model = cost_model('resnet20', 8)
  half = model.macs(model.widths) // 2
  found = prune.fit(random_gates(model, 0), model, half)
  assert prune.Structure.from_json(found.to_json()) == found
  assert found.unused == {'macs': found.budget['max_macs'] - found.macs}
  refused('^x.json: Object missing', prune.Structure.from_json, '{}', 'x.json')


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
def test_an_edited_structure_is_refused_by_field(changes, message, refused):
  refused(message, prune.Structure.from_json, _file(**changes))


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


# Width profiles, and rankings by name.


@pytest.fixture(scope='module')
def small():
  """VGG16 with 2, 4, 8 and 16 channels: every budget can be tried."""
  return models.cost_model('vgg16', 10, 8, 1, 2)


def thresholded(weights, model, least):
  """[(MACs, counts)] of a profile at every threshold, the narrowest first."""
  widths = np.array(model.widths)
  wanted = np.array([weights[k] for k in model.layers]) * widths
  thresholds = {
    n / (i + 0.5)
    for n, width in zip(wanted, widths, strict=True)
    for i in range(width)
  }
  found = [np.array(least)]
  for theta in sorted(thresholds, reverse=True):
    # The k-th channel is kept where w * C / (k - 0.5) >= theta.
    kept = np.floor(wanted / theta + 0.5 + 1e-9).astype(int)
    found.append(np.clip(kept, least, widths))
  return [(model.macs(counts), counts) for counts in found]


@pytest.mark.parametrize('slope', [0.0, 1.0, -0.4, 2.5])
@pytest.mark.parametrize('least', [1, 2])
def test_a_profile_is_cut_in_proportion_at_every_budget(small, slope, least):
  weights = scores.tilt(small.layers, slope)
  profile = prune.profile_scores(weights, scores.equal(small))
  floor = prune.Budget(min_channels=least).least(small)
  dearest = int(scores.channel_costs(small).max())
  narrower = thresholded(weights, small, floor)
  top = small.macs(small.widths)
  for budget in range(small.macs(floor), top + 1, max(1, top // 40)):
    found = prune.fit(profile, small, budget, min_channels=least)
    expected = [counts for macs, counts in narrower if macs <= budget][-1]
    # The prefix of the ranking may end among channels of one threshold, and
    # the channels behind it that still fit are taken too.
    assert (np.array(found.counts) >= expected).all()
    assert found.macs <= budget
    if found.counts != small.widths:
      assert budget - found.macs < dearest


@pytest.mark.parametrize(
  'name,width,step', [('vgg16', 6, 1), ('resnet20', 5, 1), ('resnet8', 16, 4)]
)
def test_equal_weights_are_uniform_width_at_every_budget(name, width, step):
  """The same counts as equal gates; so is a tilt if only rounding binds."""
  model = models.cost_model(name, 10, 16, 3, width)
  equal, ones = scores.equal(model), dict.fromkeys(model.layers, 1.0)
  profile = prune.profile_scores(ones, equal)
  ways = [(equal, 'global'), (profile, 'global'), (equal, 'tilt')]
  floor = model.macs(prune.Budget(round_to=step).least(model))
  for budget in np.linspace(floor, model.macs(model.widths), 60).astype(int):
    found = {
      prune.fit(gates, model, budget, round_to=step, ranking=name).counts
      for gates, name in ways
    }
    assert len(found) == 1


def test_channels_of_a_layer_keep_the_order_of_the_gates(small):
  gates = scores.random(small, 3)
  found = prune.profile_scores(scores.tilt(small.layers, 1.0), gates)
  for layer, gate in gates.items():
    assert (np.argsort(-found[layer]) == np.argsort(-gate)).all()


def test_guarded_channels_come_first(small):
  weights = scores.tilt(small.layers, 8.0)  # The first layers get nothing,
  half = tuple(n // 2 for n in small.widths)  # but for these.
  guarded = dict(zip(small.layers, half, strict=True))
  profile = prune.profile_scores(weights, scores.equal(small), guarded)
  budget = small.macs(half)
  assert prune.fit(profile, small, budget).counts == half
  plain = prune.profile_scores(weights, scores.equal(small))
  assert prune.fit(plain, small, budget).counts[0] == 1


def test_survivors_count_gates_above_zero():
  gates = {'a': np.array([0.0, 0.5, 0.1, 0.0]), 'b': np.zeros(8)}
  assert scores.survivors(gates) == {'a': 0.5, 'b': 1 / 8}


def test_damped_weights_by_hand():
  """Losses 1, 4, 16: mean 4; their powers of 1/2 over it are 1/2, 1, 2."""
  losses = {'a': 1.0, 'b': 4.0, 'c': 16.0}
  found = scores.damped(losses, 0.5)
  assert found == pytest.approx({'a': 0.5, 'b': 1.0, 'c': 2.0})
  again = scores.damped(losses, 0.5, found)
  assert again == pytest.approx({'a': 0.25, 'b': 1.0, 'c': 4.0})


def test_every_ranking_cuts(small):
  gates = scores.random(small, 0)
  half = small.macs(small.widths) // 2
  names = 'global layer_mean cost cost0.5 uniform survivors tilt1'.split()
  found = {
    name: prune.fit(gates, small, half, ranking=name).counts
    for name in [*names, 'blend0', 'blend0.5', 'blend1']
  }
  given = {'random', 'sensitivity'}  # Whoever cuts by these makes the scores.
  kinds = {rankings.parse(name)[0] for name in found}
  named = set(rankings.KNOWN.replace('X', '').replace('[]', '').split(', '))
  assert kinds == named - given
  for name in given:
    assert scores.ranked(gates, small, name) == gates
  assert found['survivors'] == found['uniform'] == found['blend0']
  shares = {k: np.array(v) / small.widths for k, v in found.items()}
  slack = 1.5 / np.array(small.widths)
  ends = shares['blend1'], shares['uniform']
  assert (shares['blend0.5'] >= np.minimum(*ends) - slack).all()
  assert (shares['blend0.5'] <= np.maximum(*ends) + slack).all()
  # With the exponent 1 the blend is the shares of the gates, but for rounding.
  assert (np.abs(shares['blend1'] - shares['global']) <= 2 * slack).all()


def test_a_tilt_without_number_is_the_weakest_that_uses_the_macs():
  model = models.cost_model('vgg16', 10, 32, 3, 16)
  half, ones = model.macs(model.widths) // 2, scores.equal(model)

  def cut(params, ranking='tilt'):
    return prune.fit(ones, model, half, params, ranking=ranking)

  for divisor in (0.5, 1, 2, 40):  # Two do not bind; for 40 no tilt is enough.
    params = int(cut(None, 'uniform').params / divisor)
    found = {i: cut(params, f'tilt{i / 10:g}').macs for i in range(-20, 21)}
    enough = [i for i, macs in found.items() if macs >= 0.97 * half]
    best = min(enough or [max(found, key=found.__getitem__)], key=abs)
    assert cut(params).macs == found[best] and (best < 0) == (divisor > 1)


def test_the_number_of_cost_is_its_power(small):
  gates = scores.random(small, 0)
  half = scores.over_cost(gates, small, 0.5)
  for name, power in (('cost0.5', 1.0), ('cost', 0.5)):
    for layer, score in scores.ranked(gates, small, name, power).items():
      assert (score == half[layer]).all()


@pytest.mark.parametrize(
  'name', ['', 'blend', 'tiltx', 'tiltnan', 'tilt1e999', 'global2', 'mean']
)
def test_unknown_rankings_list_the_known(name, refused):
  e = refused(r'survivors.*tilt\[X\]', rankings.parse, name)
  assert repr(name) in str(e) and '\n' not in str(e)
  assert not rankings.known(name) and rankings.known('tilt-0.4')
