"""Width profiles: scores against brute force, and rankings by name."""

import numpy as np
import pytest

from pfs_jax import errors, models, prune, rankings, scores


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
def test_unknown_rankings_list_the_known(name):
  with pytest.raises(errors.UserError, match=r'survivors.*tilt\[X\]') as e:
    rankings.parse(name)
  assert repr(name) in str(e.value) and '\n' not in str(e.value)
  assert not rankings.known(name) and rankings.known('tilt-0.4')
