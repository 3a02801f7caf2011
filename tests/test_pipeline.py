"""Batches: their order, their augmentation, and evaluation's one pass.

What holds for batches of arrays holds for batches of streamed files, too.
"""

import dataclasses
import functools
import io
import itertools
import threading
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pfs_jax import train
from pfs_jax.data import loading, pipeline

PLAIN = pipeline.Augmentation(mean=(0.5,), std=(0.25,))
AUGMENTED = dataclasses.replace(PLAIN, padding=2, flip=True)


def _images(n, size=8, channels=1):
  rng = np.random.default_rng(0)
  return rng.integers(1, 256, (n, size, size, channels), np.uint8)


# The label is the index, so that a batch tells which images it holds.


def _arrays(n=23, batch_size=5, seed=0, augmentation=AUGMENTED):
  return pipeline.ArraySource(
    _images(n),
    np.arange(n),
    batch_size=batch_size,
    key=jax.random.key(seed),
    augmentation=augmentation,
  )


class Files:
  """PNG files in memory, with the interface of `listing.Folder`."""

  def __init__(self, images):
    self._images = images

  def read(self, i):
    file = io.BytesIO()
    Image.fromarray(self._images[i]).save(file, 'png')
    return file.getvalue(), i


def _streamed(n=23, batch_size=5, seed=0, augmentation=AUGMENTED):
  batches = loading.Batches(
    Files(_images(n, channels=3)),
    np.arange(n),
    batch_size,
    loading.local_rows(batch_size),
    size=8,
    key=(seed, 1),
    # Crops on the host where the augmentation crops on the device.
    scale=0.25 if augmentation.padding else 0.0,
    keep=1.0,
  )
  moments = {'mean': (0.5,) * 3, 'std': (0.25,) * 3}
  plain = dataclasses.replace(augmentation, **moments, padding=0)
  key = jax.random.key(seed)
  return loading.StreamSource(batches, 2, key=key, augmentation=plain)


both_sources = pytest.mark.parametrize('source_of', [_arrays, _streamed])
_compiled = functools.cache(jax.jit)


def _batch(source, step):
  with source:
    item = jax.tree.map(lambda v: np.asarray(v)[0], source.chunk(step, 1))
  return jax.device_get(_compiled(source.draw)(source.resident, item))


def _labels(source, step):
  """Which images a batch holds; `test_images_keep_their_labels` draws them."""
  with source:
    *_, labels, _ = source.chunk(step, 1)
  return np.asarray(labels)[0].tolist()


# The order.


@both_sources
def test_an_epoch_repeats_no_image(source_of):
  n, batch_size = 23, 5
  source = source_of(n, batch_size)
  assert source.steps_per_epoch == n // batch_size
  for epoch in range(3):
    first = epoch * source.steps_per_epoch
    steps = range(first, first + source.steps_per_epoch)
    seen = [i for s in steps for i in _labels(source, s)]
    assert len(set(seen)) == len(seen) == n // batch_size * batch_size
    assert set(seen) <= set(range(n))


@both_sources
def test_epochs_differ_in_order_and_in_what_remains(source_of):
  source = source_of(23, 20)
  orders = [tuple(_labels(source, epoch)) for epoch in range(4)]
  assert len(set(orders)) == 4
  assert all(list(order) != sorted(order) for order in orders)
  assert len({frozenset(order) for order in orders}) > 1


@both_sources
def test_a_batch_depends_on_key_and_step_alone(source_of):
  walked, jumped = source_of(seed=3), source_of(seed=3)
  there = [_batch(walked, step) for step in range(8)]
  for step in (7, 0, 4):  # Back and forth over the epochs.
    for a, b in zip(there[step], _batch(jumped, step), strict=True):
      np.testing.assert_array_equal(a, b)


@both_sources
def test_keys_give_other_orders_and_other_crops(source_of):
  a, b = source_of(seed=1), source_of(seed=2)
  assert _labels(a, 0) != _labels(b, 0)
  sources = [source_of(1, 1, seed=seed) for seed in range(12)]
  crops = [_batch(source, 0)[0].tobytes() for source in sources]
  assert len(set(crops)) > 6


@both_sources
def test_a_step_is_augmented_anew(source_of):
  source = source_of(1, 1)  # The same image in every step.
  views = {_batch(source, step)[0].tobytes() for step in range(12)}
  assert len(views) > 6


@both_sources
def test_images_keep_their_labels(source_of):
  source = source_of(augmentation=PLAIN)
  for step in (0, 3, 9):
    x, y = _batch(source, step)
    raw = _images(23, channels=x.shape[-1])
  expected = (raw[y] / 255.0 - 0.5) / 0.25
  np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('batch_size', [0, -1, 24])
def test_a_batch_size_out_of_range_is_refused(batch_size, refused):
  rule = rf'batch_size must be in \[1, 23\].*; got {batch_size}\.'
  refused(rule, _arrays, 23, batch_size)


# Streamed files.


def test_processes_decode_their_rows_only():
  batches = _streamed(23, 10).batches
  for step in (0, 9):
    expected = batches.piece(step, np.arange(10))
    for rows in (np.arange(5), np.arange(5, 10), np.array([3, 7, 8])):
      found = batches.piece(step, rows)
      for name in loading.ARRAYS:
        np.testing.assert_array_equal(found[name], expected[name][rows])


def test_waits_are_counted(monkeypatch):
  """Those for the threads, and not the time between two batches."""
  read, allowed = Files.read, threading.Event()
  monkeypatch.setattr(Files, 'read', lambda *a: allowed.wait(60) and read(*a))
  with _streamed() as source:
    threading.Timer(1.0, allowed.set).start()
    source.batch(0)
    waited = source.seconds_waited
    assert 0.05 < waited < 60
    futures.wait(source._ahead[1])
    time.sleep(0.2)
    source.batch(1)
    assert 0 < source.seconds_waited - waited < 0.2
    source.batch(9)
    assert list(source._ahead) == [10, 11, 12]  # What a jump leaves is gone.


def test_threads_end_with_their_source():
  def decoders():
    return [t for t in threading.enumerate() if t.name.startswith('decode')]

  source = _streamed()
  for _ in range(2):
    with pytest.raises(ZeroDivisionError), source:
      source.chunk(0, 1)
      assert 1 <= len(decoders()) <= 2
      raise ZeroDivisionError
    assert not decoders()
  source.__exit__()


# Augmentation.


@pytest.mark.parametrize('flip', [False, True])
def test_crops_are_windows_of_the_padded_image(flip):
  n, size, padding = 200, 6, 2
  images = _images(n, size, channels=3)
  found = pipeline.crop_and_flip(images, jax.random.key(4), padding, flip)
  found = np.asarray(found)
  assert found.dtype == np.uint8 and found.shape == images.shape
  around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = np.pad(images, around)
  places, steps = range(2 * padding + 1), (1, -1) if flip else (1,)
  for one, crop in zip(padded, found, strict=True):
    windows = [
      one[top : top + size, left : left + size][:, ::step]
      for top, left, step in itertools.product(places, places, steps)
    ]  # Noise has one that fits.
    assert sum(np.array_equal(window, crop) for window in windows) == 1


def test_flip_and_crop_are_independent():
  images = np.arange(1, 1 + 4, dtype=np.uint8).reshape(1, 2, 2, 1)
  images = np.repeat(images, 4000, 0)
  found = np.asarray(pipeline.crop_and_flip(images, jax.random.key(0), 1, True))
  # Nine places by two directions, all of which differ: 222 +- 5 * 14.5.
  _, counts = np.unique(found.reshape(4000, 4), axis=0, return_counts=True)
  assert len(counts) == 18
  assert 150 < counts.min() and counts.max() < 295


def test_normalise_is_the_formula_by_channel():
  images = _images(2, channels=3)
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
  found = pipeline.Augmentation(mean, std).test(images)
  expected = (images / 255.0 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
  low = pipeline.Augmentation(mean, std, dtype=jnp.bfloat16).test(images)
  assert low.dtype == found.dtype == jnp.float32


def test_the_border_is_raw_zero():
  # An all-white image: what is not 1 after normalising is the border, and a
  # border of raw zeros is (0 - mean) / std, not 0.
  white = jnp.full((50, 4, 4, 1), 255, jnp.uint8)
  augmentation = pipeline.Augmentation((0.5,), (0.25,), padding=2)
  train_ = jax.jit(augmentation.train)
  found = np.unique(train_(white, jax.random.key(0)))
  np.testing.assert_allclose(found, [-2.0, 2.0], rtol=1e-6)


# Several steps a call.


def _running_sum(state, x, y):
  """A step whose result depends on crops, flips and the order of steps."""
  state = 0.9 * state + x[:, :, :3].mean() + 0.01 * y.mean()
  return state, {'state': state}


@both_sources
def test_three_steps_a_call_are_three_calls(source_of):
  source, first = source_of(23, 5), 3  # Over the border of an epoch.
  call = train.compiled_call(_running_sum, source.draw)
  one_by_one = jnp.zeros(())
  values = []
  for step in range(first, first + 3):
    item = source.chunk(step, 1)
    one_by_one, metrics = call(one_by_one, source.resident, item)
    values.append(float(metrics['state'][0]))
  with source:
    item = source.chunk(first, 3)
    together, metrics = call(jnp.zeros(()), source.resident, item)
  assert metrics['state'].shape == (3,)
  np.testing.assert_allclose(metrics['state'], values, rtol=1e-6)
  np.testing.assert_allclose(together, one_by_one, rtol=1e-6)
  assert len(set(values)) == 3


@both_sources
def test_sources_of_equal_augmentation_share_a_program(source_of):
  a, b = source_of(seed=1), source_of(seed=2)
  assert train.compiled_call(_running_sum, a.draw) is train.compiled_call(
    _running_sum, b.draw
  )
  other = source_of(augmentation=PLAIN)
  assert train.compiled_call(_running_sum, a.draw) is not train.compiled_call(
    _running_sum, other.draw
  )


# Evaluation.


def _evaluation(n, batch_size):
  images = _images(n, size=2)
  labels = np.arange(n)
  return images, pipeline.ArrayEvaluation(
    images, labels, batch_size=batch_size, augmentation=PLAIN
  )


def _check_once(n, batch_size):
  images, batches = _evaluation(n, batch_size)
  assert batches.size == n
  for _ in range(2):  # It can be iterated again.
    seen, shapes = [], set()
    for x, y, weight in batches:
      x, y, weight = jax.device_get((x, y, weight))
      shapes.add((x.shape, y.shape, weight.shape))
      assert set(np.unique(weight)) <= {0.0, 1.0}
      np.testing.assert_array_equal(x[weight == 1], images[y[weight == 1]])
      seen += y[weight == 1].tolist()
    assert sorted(seen) == list(range(n))
    assert len(shapes) == 1  # One program for all batches.
  return shapes


SIZES = [(23, 5), (20, 5), (3, 8), (1, 1)]


@pytest.mark.parametrize('n, batch_size', SIZES)
def test_evaluation_holds_every_image_once(n, batch_size):
  ((x_shape, _, _),) = _check_once(n, batch_size)
  assert x_shape[0] == min(n, batch_size)  # No more padding than needed.


def check_on_eight_devices():
  """test_train.py calls it in a process that has them."""
  assert jax.device_count() == 8
  for n, batch_size in SIZES:
    ((x_shape, _, _),) = _check_once(n, batch_size)
    assert x_shape[0] % 8 == 0
  _, batches = _evaluation(23, 16)
  for part in itertools.chain(*batches):
    assert len(part.sharding.device_set) == 8
    assert part.addressable_shards[0].data.shape[0] == 2
