"""The probe: dropped channels, and a network whose useless layer is known."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pfs_jax import costs, scores, surgery, train
from pfs_jax import probe as probe_lib
from pfs_jax.data import pipeline
from tests import own_models

LAYERS = ('first', 'useless', 'last')


class Toy(nn.Module):
  """Two layers in a row, and one beside them that nothing depends on."""

  @nn.compact
  def __call__(self, x, train=False):
    def block(name, x):
      x = nn.Conv(8, (3, 3), use_bias=False, name=name)(x)
      x = nn.BatchNorm(not train, momentum=0.9, name=f'{name}_bn')(x)
      return nn.relu(x)

    x = block('first', x)
    beside, x = block('useless', x), block('last', x)
    x = jnp.concatenate([0.0 * beside, x], axis=-1).mean((1, 2))
    return nn.Dense(4)(x)


def images(n, seed):
  """One bright quadrant of four in noise; its number is the label."""
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 120, (n, 8, 8, 1), dtype=np.uint8)
  y = rng.integers(0, 4, n).astype(np.int32)
  for image, label in zip(x, y, strict=True):
    row, column = 4 * (label // 2), 4 * (label % 2)
    # A pattern that differs between the quadrants, so that filters see it.
    image[row : row + 4, column : column + 4, 0] = 30 * label + 40
    image[row : row + 4 : 1 + label % 2, column : column + 4] += 90
  return x, y


@pytest.fixture(scope='module')
def toy():
  """(module, cost model, trained variables, held-out batches)."""
  x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  network = surgery.network(Toy(), x)
  module, model = network.gated, network.cost_model
  assert model.layers == LAYERS
  augmentation = pipeline.Augmentation(mean=(0.3,), std=(0.3,))
  variables = dict(module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
  del variables['gates']
  state = train.init(
    probe_lib.ChannelDropout(module, 0.05), variables, optax.adam(0.01)
  )
  x, y = images(1024, 0)
  for i in range(80):
    batch = slice(64 * (i % 16), 64 * (i % 16 + 1))
    state, metrics = train.step(state, augmentation.test(x[batch]), y[batch])
  assert metrics['accuracy'] > 0.7
  held_out = pipeline.ArrayEvaluation(
    *images(256, 1), batch_size=128, augmentation=augmentation
  )
  return module, model, state.variables, held_out


def test_the_useless_layer_is_found(toy):
  module, model, variables, held_out = toy
  rng = np.random.default_rng(0)
  found = probe_lib.rises(module, variables, model, held_out, 8, rng)
  assert found.shape == (8, 3)
  np.testing.assert_allclose(found[:, 1], 0, atol=1e-3)
  finding = probe_lib.finding(LAYERS, found[None])
  assert finding.wide == ('useless',)
  assert 'useless is too wide' in finding.sentence
  assert min(finding.losses['first'], finding.losses['last']) > 0.1


def test_rises_are_those_of_the_loss_by_hand(toy):
  """One draw, one layer, by the plain module with gates written out."""
  module, model, variables, held_out = toy
  found = probe_lib.rises(
    module, variables, model, held_out, 1, np.random.default_rng(3)
  )
  rng = np.random.default_rng(3)
  numbers = probe_lib.dropped(model)
  x, y, _ = next(iter(held_out))
  x = held_out.augmentation.test(x)

  def loss(gates):
    gates = jax.tree.map(lambda g: jnp.broadcast_to(g, (128, 8)), gates)
    logits = module.apply({**variables, 'gates': gates}, x)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return float(ce.mean())

  plain = loss(module.unit_gates())
  for j, layer in enumerate(LAYERS):
    off = probe_lib.drawn(8, numbers[j], 128, rng)
    gates = {**module.unit_gates(), layer: {'gate': jnp.asarray(off)}}
    macs = numbers[j] * scores.channel_costs(model)[j] / 1e6
    expected = (loss(gates) - plain) / macs
    assert found[0, j] == pytest.approx(expected, abs=1e-3)


def test_dropped_channels_cost_about_equal_macs():
  model = costs.CostModel(
    ('a', 'b'),
    (40, 100),
    [
      costs.Layer('a', 'conv', 10, 40, 4, makes=((0, 1),)),
      costs.Layer('b', 'conv', 10, 100, 1, makes=((1, 1),)),
    ],
  )
  # A channel of a costs 40 MACs, of b 10: a quarter of b is 250 MACs.
  assert probe_lib.dropped(model).tolist() == [6, 25]


def test_draws_drop_so_many_channels_of_each_image():
  gates = probe_lib.drawn(10, 3, 400, np.random.default_rng(0))
  assert ((gates == 0).sum(axis=1) == 3).all()
  np.testing.assert_allclose(gates.sum(axis=1), 10, rtol=1e-6)
  times = (gates == 0).sum(axis=0)  # 120 each, 9 is one standard deviation.
  assert 80 < times.min() and times.max() < 160


def test_channel_dropout_is_off_in_evaluation_and_keeps_the_mean(toy):
  module, _, variables, held_out = toy
  dropout = probe_lib.ChannelDropout(module, 0.25)
  gates = dropout.gates(jax.random.key(0), 200)
  values = np.concatenate([g.ravel() for g in jax.tree.leaves(gates)])
  assert set(np.unique(values)) == {0.0, np.float32(1 / 0.75)}
  assert values.mean() == pytest.approx(1, abs=0.04)  # 4 standard errors.
  x = held_out.augmentation.test(next(iter(held_out))[0])
  gated = {**variables, 'gates': module.unit_gates()}
  assert (dropout.apply(variables, x) == module.apply(gated, x)).all()
  training = {'train': True, 'mutable': ['batch_stats']}
  rngs = {'dropout': jax.random.key(1)}
  noisy, _ = dropout.apply(variables, x, rngs=rngs, **training)
  still, _ = module.apply(gated, x, **training)
  assert not np.allclose(noisy, still)


def test_channel_dropout_follows_images_that_are_folded():
  x = np.ones((2, 8, 8, 3), np.float32)
  model = own_models.Folded()
  dropout = probe_lib.ChannelDropout(surgery.network(model, x).gated, 0.25)
  variables, rngs = own_models.drawn(model, x), {'dropout': jax.random.key(1)}
  mutable = ['batch_stats']
  logits, _ = dropout.apply(variables, x, True, rngs=rngs, mutable=mutable)
  assert logits.shape == (2, 3)


def test_what_a_finding_says():
  flat = np.full((1, 4, 3), 2.0) + np.linspace(-0.1, 0.1, 4)[None, :, None]
  even = probe_lib.finding(LAYERS, flat)
  assert not even.wide and not even.narrow
  assert even.slope == pytest.approx(0, abs=1e-6)
  gentle = probe_lib.finding(LAYERS, flat * [0.3, 1, 3]).sentence
  assert 'No layer is' in gentle and 'is 10 times the lowest' in gentle
  steep = probe_lib.finding(LAYERS, flat * np.array([0.1, 1, 10]))
  assert (steep.wide, steep.narrow) == (('first',), ('last',))
  assert steep.slope == pytest.approx(np.log(100))
  # A network that has learnt nothing does not care what is dropped.
  rng = np.random.default_rng(0)
  blind = probe_lib.finding(LAYERS, rng.normal(size=(1, 8, 3)))
  assert blind.sentence.startswith('The probe cannot tell')
  # What differs by chance alone is not called out of proportion.
  noisy = flat * [0.1, 1, 10] * np.array([0.01, 0.01, 0.01, 3.97])[:, None]
  assert not probe_lib.finding(LAYERS, noisy).narrow
