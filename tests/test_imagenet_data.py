"""Streaming: files, order, crops, colour, corruption, workers, TFDS."""

import dataclasses
import hashlib
import io
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pfs_jax import config, data, devices, errors
from pfs_jax.data import (
  colour,
  decoding,
  listing,
  loading,
  pipeline,
  records,
  shapes,
  specs,
)
from tests import own_models, processes, small_run, test_data, test_devices

CLASSES, TRAIN, VAL, SIZE = 5, 40, 9, 32
SHAPES = [(40, 40), (64, 48), (48, 64), (100, 70), (9, 200)]


# Files. Pixels tell which image they are of.


def _colour(i):
  return (20 + 7 * (i % 30), 20 + 7 * (i // 30))


def _which(pixels):
  """uint8 [..., H, W, 3] -> the number of each image."""
  red, green = (pixels[..., c].mean((-1, -2)) for c in (0, 1))
  red, green = (np.rint((v - 20) / 7).astype(int) for v in (red, green))
  return red + 30 * green


def _encoded(image, kind='jpeg', **options):
  stream = io.BytesIO()
  image.save(stream, kind, **options)
  return stream.getvalue()


def _jpeg(i, size):
  """Red and green tell which image it is, blue where it was cropped."""
  y, x = np.mgrid[: size[1], : size[0]]
  pixels = np.empty((size[1], size[0], 3), np.uint8)
  pixels[..., :2] = _colour(i)
  pixels[..., 2] = 60 + 140 * (x + y) // sum(size)
  return _encoded(Image.fromarray(pixels), quality=98, subsampling=0)


def _files():
  """{(split, class, name): (number, content)}"""
  found = {}
  for split, count in (('train', TRAIN), ('val', VAL)):
    for label in range(CLASSES):
      for i in range(count):
        number = label * TRAIN + i + (split == 'val') * CLASSES * TRAIN
        name = f'n{label:02d}_{(i * 37) % 101}.JPEG'
        content = _jpeg(number, SHAPES[i % len(SHAPES)])
        found[split, f'n{label:02d}', name] = (number, content)
  return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('imagenet')
  for (split, label, name), (_, content) in _files().items():
    path = root / split / label / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  (root / 'train' / 'n00' / '.hidden.JPEG').write_bytes(b'not an image')
  (root / 'train' / 'n00' / 'readme.txt').write_text('not an image')
  (root / 'train' / '.cache').mkdir()
  return root


def _config(root, **fields):
  c = config.default()
  c.data.name = 'imagenet2012'
  c.data.source_dir = str(root)
  c.data.num_classes = CLASSES
  c.data.image_size = SIZE
  c.data.validation_examples = 3 * CLASSES
  c.data.eval_batch_size = 16
  c.data.workers = 0
  c.search.batch_size = c.train.batch_size = 24
  c.update_from_flattened_dict(small_run.dotted(fields))
  config.validate(c)
  return c


def _open(root, **fields):
  workdir = pathlib.Path(root).with_name(f'run-{pathlib.Path(root).name}')
  return data.open_set(_config(root, **fields), workdir)


def _batches(source, steps):
  """(pixels, labels) of some steps, on the host."""
  with source:
    chunks = [source.chunk(step, 1) for step in steps]
  return [(np.asarray(x)[0], np.asarray(y)[0]) for x, y, _ in chunks]


# What is in a folder.


def test_classes_are_the_sorted_folders(folder):
  listed = listing.scan(folder / 'train')
  assert _open(folder).spec.class_names == listed.classes
  assert listed.classes == tuple(f'n{i:02d}' for i in range(CLASSES))
  assert len(listed) == CLASSES * TRAIN
  assert [os.fsdecode(n) for n in listed.names[:TRAIN]] == sorted(
    name
    for split, label, name in _files()
    if (split, label) == ('train', 'n00')
  )
  content, label = listed.read(TRAIN)
  assert label == 1 and pathlib.Path(listed.where(TRAIN)).is_file()
  assert content[:2] == b'\xff\xd8'


def test_any_suffix_and_any_name(tmp_path):
  for name in ('1/a.JPEG', '1/b.jpg', '2/c.PNG', '2/Ünï cödé.jpeg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes((tmp_path / name).name.encode())
  listed = listing.scan(tmp_path)
  assert len(listed) == 4
  assert all(
    listed.read(i)[0] == os.path.basename(listed.where(i)).encode()
    for i in range(4)
  )


def test_what_is_missing_is_named(folder, tmp_path, refused):
  refused('cannot read .*/nowhere/train', _open, tmp_path / 'nowhere')
  shutil.copytree(folder, tmp_path / 'copy')
  os.rename(tmp_path / 'copy/val/n03', tmp_path / 'copy/val/other')
  refused('one lacks n03, other', _open, tmp_path / 'copy')


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'data__num_classes': 3}, 'hold 3 class folders .* has 5'),
    ({'data__num_classes': 0, 'data__validation_examples': 0}, 'hold 1000'),
    ({'data__validation_examples': 7}, 'multiple of the 5 classes'),
    ({'data__validation_examples': 200}, 'has 40; got 40 for each class'),
    ({'data__train_examples': 10}, 'must be 0 for a data set that is streamed'),
    ({'search__batch_size': 186}, r'must be in \[1, 185\]'),
  ],
)
def test_what_cannot_be_is_refused(folder, fields, message):
  with pytest.raises(errors.UserError, match=message):
    _open(folder, **fields).train_source('search', hold_out=True)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('data.image_size', 16, 'config.data.image_size must be 0 or 8 for digits'),
    ('data.num_classes', 9, 'config.data.num_classes must be 0 or 10'),
    ('search.crop_scale', 0.5, 'config.search.crop_scale must be 0 for digits'),
    ('train.lighting', 0.1, 'config.train.lighting must be 0 for digits'),
    ('train.colour_jitter', 0.4, 'config.train.colour_jitter must be 0'),
  ],
)
def test_arrays_refuse_what_is_for_streams(field, value, message, tmp_path):
  c = config.default()
  c.data.name = 'digits'
  c.update_from_flattened_dict({field: value})
  with pytest.raises(errors.UserError, match=message):
    data.open_set(c, tmp_path)


# What is held out.


def test_the_least_hashes_of_each_class_are_held_out(folder):
  listed = listing.scan(folder / 'train')
  mask = listing.held_out(listed.names, listed.labels, 3)
  for label in range(CLASSES):
    own = listed.names[listed.labels == label]
    least = sorted(own, key=lambda n: hashlib.sha256(n).hexdigest())[:3]
    assert set(listed.names[mask & (listed.labels == label)]) == set(least)
  # It does not depend on the order.
  order = np.random.default_rng(0).permutation(len(listed))
  again = listing.held_out(listed.names[order], listed.labels[order], 3)
  np.testing.assert_array_equal(again, mask[order])
  assert not listing.held_out(listed.names, listed.labels, 0).any()


def test_the_search_never_sees_what_is_held_out(folder):
  d = _open(folder)
  validation = _evaluated(d.validation())
  assert len(validation) == 3 * CLASSES
  source = d.train_source('search', hold_out=True)
  steps = range(2 * source.steps_per_epoch)
  searched = {i for x, _ in _batches(source, steps) for i in _which(x)}
  assert not searched & set(validation)
  source = d.train_source('train', hold_out=False)
  assert source.steps_per_epoch == CLASSES * TRAIN // 24
  trained = {i for x, _ in _batches(source, range(24)) for i in _which(x)}
  assert set(validation) <= trained
  assert _open(folder, data__validation_examples=0).validation() is None


# The order; test_pipeline.py has what holds for all sources.


def test_seeds_and_stages_differ(folder):
  stages = (
    _open(folder).train_source('train', False),
    _open(folder, seed=1).train_source('train', False),
    _open(folder, data__validation_examples=0).train_source('search', True),
  )
  first, *others = (_which(_batches(s, [0])[0][0]).tolist() for s in stages)
  assert first not in others


def print_batches(root):
  """Prints digests of batches, which all processes must agree about."""
  rows, piece = [], loading.Batches.piece

  def counted(self, step, found):
    rows.append(len(self.rows))
    return piece(self, step, found)

  def digest(array):
    same = jax.jit(lambda a: a, out_shardings=devices.replicated())
    return hashlib.sha256(np.asarray(same(array)).tobytes()).hexdigest()

  loading.Batches.piece = counted
  d = _open(root, data__corrupt='skip')
  with d.train_source('search', True) as source:
    x, y, _ = source.chunk(3, 2)
  assert set(rows) == {24 // jax.process_count()}
  test, found = d.test(), [digest(x), digest(y)]
  for batch in test:
    found += [digest(array) for array in batch]
  print([found, test.size])


PRINT_BATCHES = (
  'import sys; from tests import test_imagenet_data as t; '
  't.print_batches(sys.argv[-1])'
)


@pytest.mark.slow  # Three processes.
def test_two_processes_make_the_batches_of_one(folder, tmp_path):
  root = tmp_path / 'one_corrupt'
  shutil.copytree(folder, root)
  (root / 'val/n03/n03_0.JPEG').write_bytes(b'no image')
  one = processes.output(['-c', PRINT_BATCHES, root], devices=4)
  two = test_devices.joined(PRINT_BATCHES, root)
  assert [d.returncode for d in two] == [0, 0], two
  assert [test_devices.printed(d) for d in two] == [one] * 2
  assert one.endswith(f', {CLASSES * VAL - 1}]')


# Evaluation.


def _evaluated(evaluation):
  """Numbers of the images seen with weight 1, in order."""
  seen = []
  for x, y, w in evaluation:
    x, y, w = (np.asarray(v) for v in (x, y, w))
    assert x.dtype == np.uint8 and x.shape[1:] == (SIZE, SIZE, 3)
    assert set(w.tolist()) <= {0.0, 1.0}
    numbers = _which(x[w == 1])
    assert (numbers % (CLASSES * TRAIN) // TRAIN == y[w == 1]).all()
    seen += numbers.tolist()
  return seen


@pytest.mark.parametrize('batch_size, threads', [(16, 2), (45, 0), (500, 1)])
def test_evaluation_counts_every_image_once(folder, batch_size, threads):
  d = _open(folder, data__eval_batch_size=batch_size, data__workers=threads)
  first = CLASSES * TRAIN
  expected = [first + c * TRAIN + i for c in range(CLASSES) for i in range(VAL)]
  for _ in range(2):  # Again is the same.
    test = d.test()
    assert sorted(_evaluated(test)) == expected
    assert test.size == len(expected)


# Pixels.


@pytest.mark.parametrize(
  'width, height, scale', [(500, 375, 0.08), (375, 500, 0.25), (64, 64, 1.0)]
)
def test_random_crops_keep_their_ranges(width, height, scale):
  rng = np.random.default_rng(0)
  boxes = [decoding.crop_box(rng, width, height, scale) for _ in range(3000)]
  left, top, right, bottom = np.array(boxes).T
  w, h = right - left, bottom - top
  assert left.min() >= 0 and top.min() >= 0
  assert right.max() <= width and bottom.max() <= height
  shares, ratios = w * h / (width * height), w / h
  assert shares.min() > scale - 0.03 and shares.max() <= 1
  assert ratios.min() > 0.72 and ratios.max() < 1.39
  if scale < 1:  # Areas are uniform but for those that do not fit.
    assert shares.min() < scale + 0.02 and shares.max() > 0.85
    assert left.min() == 0 and right.max() == width
    assert top.min() == 0 and bottom.max() == height
    assert abs(np.log(ratios).mean()) < 0.1


def test_an_image_too_narrow_is_cropped_in_the_middle():
  rng = np.random.default_rng(0)
  assert decoding.crop_box(rng, 1000, 10, 1.0) == (493, 0, 506, 10)
  assert decoding.crop_box(rng, 10, 1000, 1.0) == (0, 493, 10, 506)
  assert decoding.crop_box(rng, 1, 1, 0.25) == (0, 0, 1, 1)


def _picture(width, height):
  y, x = np.mgrid[:height, :width] / max(width, height)
  waves = [np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))]
  array = np.stack([127 + 100 * wave for wave in waves], -1)
  return Image.fromarray(array.astype(np.uint8))


@pytest.mark.parametrize('size', [(500, 375), (1200, 900)])
def test_evaluation_is_resize_256_and_centre_crop_224(size):
  """The usual two operations, up to rounding."""
  content = _encoded(_picture(*size), quality=95)
  image = Image.open(io.BytesIO(content))
  short = min(size)
  scaled = [round(v * 256 / short) for v in size]
  image = image.resize(scaled, Image.Resampling.BILINEAR)
  left, top = (image.width - 224) / 2, (image.height - 224) / 2
  expected = np.asarray(image.crop((left, top, left + 224, top + 224)))
  have = decoding.decode(content, 224)
  # (The largest is halved while decoding.)
  assert np.abs(have.astype(float) - expected).max() <= 4
  assert np.abs(have.astype(float) - expected).mean() < 0.6


def test_a_crop_is_where_it_should_be_also_when_halved(monkeypatch):
  box = (300, 100, 1500, 1100)
  monkeypatch.setattr(decoding, 'crop_box', lambda *_: box)
  picture = _picture(2000, 1600)
  content = _encoded(picture, quality=95)
  expected = picture.resize((64, 64), Image.Resampling.BILINEAR, box)
  have = decoding.decode(content, 64, 0.5, np.random.default_rng(0))
  assert np.abs(have.astype(float) - np.asarray(expected)).max() <= 4
  # The crop stays larger than the result: no pixels are made up.
  widths = []
  opened = type(Image.open(io.BytesIO(content)))
  convert = opened.convert
  monkeypatch.setattr(
    opened,
    'convert',
    lambda s, mode: widths.append(s.width) or convert(s, mode),
  )
  for size in (64, 200, 300, 800):
    decoding.decode(content, size, 0.5, np.random.default_rng(0))
  assert widths == [250, 500, 1000, 2000]


def test_all_kinds_become_rgb():
  colour = (200, 60, 90)
  rgb = Image.new('RGB', (40, 30), colour)
  grey = round(0.299 * 200 + 0.587 * 60 + 0.114 * 90)
  deep = Image.fromarray(np.full((30, 40), 0xC0C0, np.uint16))
  kinds = {
    'rgb': (_encoded(rgb, quality=95), colour),
    'grey': (_encoded(rgb.convert('L'), quality=95), (grey,) * 3),
    'cmyk': (_encoded(rgb.convert('CMYK'), quality=95), colour),
    'png': (_encoded(rgb, 'png'), colour),
    '16 bits': (_encoded(deep, 'png'), (192,) * 3),
    'palette': (_encoded(rgb.quantize(4), 'png'), colour),
    'alpha': (_encoded(rgb.convert('RGBA'), 'png'), colour),
    'grey alpha': (_encoded(rgb.convert('LA'), 'png'), (grey,) * 3),
    'odd exif': (_encoded(rgb, quality=95, exif=b'Exif\0\0nonsense'), colour),
  }
  for kind, (content, expected) in kinds.items():
    pixels = decoding.decode(content, 16)
    assert pixels.shape == (16, 16, 3)
    error = np.abs(pixels.astype(int) - expected).max()
    assert error <= (0 if kind == '16 bits' else 3), kind


def test_exif_orientation_is_followed():
  upright = _picture(60, 40)
  exif = Image.Exif()
  exif[0x0112] = 6  # Stored lying on its left side.
  lying = upright.transpose(Image.Transpose.ROTATE_90)
  content = _encoded(lying, quality=98, subsampling=0, exif=exif)
  have = decoding.decode(content, 16).astype(int)
  want = decoding.decode(_encoded(upright, 'png'), 16)
  assert np.abs(have - want).max() <= 4


# Corrupt files.


@pytest.fixture
def damaged(folder, tmp_path):
  root = tmp_path / 'damaged'
  shutil.copytree(folder, root)
  for split in ('train', 'val'):
    path = root / split / 'n02' / 'n02_0.JPEG'
    path.write_bytes(path.read_bytes()[:300])  # Its head is in order.
  (root / 'train' / 'n04' / 'n04_37.JPEG').write_bytes(b'')
  return root


def test_a_corrupt_file_is_named(damaged, refused):
  d = _open(damaged, data__workers=2, data__validation_examples=0)
  source = d.train_source('train', False)
  with pytest.raises(errors.UserError) as e, source:
    for step in range(source.steps_per_epoch):
      source.chunk(step, 1)
  message = str(e.value)
  assert 'cannot be decoded' in message and "corrupt='skip'" in message
  assert any(f'train/{n}' in message for n in ('n02/n02_0', 'n04/n04_37'))
  assert len(message.splitlines()) <= 3
  refused('val/n02/n02_0.JPEG cannot be', list, d.test())
  os.remove(damaged / 'val/n01/n01_37.JPEG')  # Gone since it was listed.
  for corrupt in ('error', 'skip'):  # The image may be a good one.
    d._config.data.corrupt = corrupt
    refused('n01_37.JPEG cannot be read', list, d.test())


def test_another_folder_is_refused_in_the_same_workdir(
  folder, tmp_path, refused
):
  c, root = _config(folder), tmp_path / 'moved'
  data.open_set(c, tmp_path / 'run')
  shutil.copytree(folder, root)
  c.data.source_dir = str(root)
  data.open_set(c, tmp_path / 'run')  # Where it lies does not matter.
  for split in ('train', 'val'):
    (root / split / 'n03').rename(root / split / 'n99')
  refused('not those .* a class differs', data.open_set, c, tmp_path / 'run')


def test_held_out_images_come_in_a_mixed_order(folder):
  """A probe takes the first batches alone; the folder is sorted by class."""
  (_, labels, _), *_ = _open(folder, data__eval_batch_size=8).validation()
  assert len(set(np.asarray(labels).tolist())) > 3


def test_a_damaged_record_is_named_without_its_file():
  class Source:
    def __len__(self):
      return 3

    def __getitems__(self, places):
      raise ValueError('damaged')

  split = object.__new__(records.Records)
  split.name, split.split, split._source = 'x', 'train', Source()
  assert split.where(1) == 'the record (x train[1])'


def test_corrupt_files_are_skipped_and_counted(damaged, capfd):
  d = _open(damaged, data__corrupt='skip', data__workers=1)
  source = d.train_source('train', False)
  batches = _batches(source, range(3 * source.steps_per_epoch))
  bad = {2 * TRAIN, 4 * TRAIN + 1}  # Numbers of the two.
  seen = [i for x, _ in batches for i in _which(x)]
  assert not bad & set(seen)
  assert all((_which(x) // TRAIN == y).all() for x, y in batches)
  said = capfd.readouterr().err
  assert said.count('skipped, cannot be decoded') == 2  # Each once.
  assert '(2 so far)' in said and 'n02/n02_0.JPEG' in said
  other = _open(damaged, data__corrupt='skip', data__workers=2)
  again = _batches(other.train_source('train', False), range(3, 8))
  own_models.assert_same(batches[3:8], again)
  test = d.test()
  first = CLASSES * TRAIN
  seen = _evaluated(test)
  assert len(seen) == len(set(seen)) == test.size == CLASSES * VAL - 1
  assert first + 2 * TRAIN not in seen


def test_nothing_but_corrupt_files_is_an_error(tmp_path, refused):
  for part in ('train/a', 'train/b', 'val/a', 'val/b'):
    (tmp_path / part).mkdir(parents=True)
    for i in range(12 if 'train' in part else 2):
      (tmp_path / part / f'{i}.jpg').write_bytes(b'nothing')
  d = _open(
    tmp_path,
    data__num_classes=2,
    data__validation_examples=0,
    data__corrupt='skip',
  )
  with pytest.raises(errors.UserError, match='24 images cannot be decoded'):
    _batches(d.train_source('train', False), [0])
  refused('no image of an evaluation can', list, d.test())


# Colour.


def _noise(n=4):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.uniform(0.2, 0.6, (n, 6, 6, 3)), jnp.float32)


def test_jitter_is_brightness_contrast_and_saturation():
  """Against Pillow's definitions, image by image, in float."""
  x, key = _noise(), jax.random.key(3)
  have = np.asarray(colour.jitter(x, key, 0.4))
  factors = np.asarray(
    jax.random.uniform(key, (3, 4, 1, 1, 1), jnp.float32, 0.6, 1.4)
  ).reshape(3, 4)
  grey = np.array([0.299, 0.587, 0.114])
  for image, got, (b, c, s) in zip(np.asarray(x), have, factors.T, strict=True):
    image = image * b
    image = (image @ grey).mean() * (1 - c) + image * c
    image = (image @ grey)[..., None] * (1 - s) + image * s
    np.testing.assert_allclose(got, image.clip(0, 1), atol=1e-6)
  assert len(set(factors.ravel().tolist())) == 12  # Each its own.
  np.testing.assert_allclose(colour.jitter(x, key, 0.0), x, atol=1e-6)
  wild = colour.jitter(_noise(64), key, 1.0)
  assert wild.min() >= 0 and wild.max() <= 1


def test_lighting_has_the_covariance_of_imagenet():
  x = jnp.zeros((20000, 1, 1, 3))
  added = np.asarray(colour.lighting(x, jax.random.key(0), 0.1)).reshape(-1, 3)
  vectors = np.array(colour.EIGENVECTORS)
  np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)
  variances = (0.1 * np.array(colour.EIGENVALUES)) ** 2
  expected = vectors @ np.diag(variances) @ vectors.T
  np.testing.assert_allclose(np.cov(added.T), expected, rtol=0.05, atol=2e-6)
  assert 2 < 255 * added.std(axis=0).min() < 4  # Not near nil.
  many = colour.lighting(_noise(), jax.random.key(0), 0.1) - _noise()
  assert np.ptp(np.asarray(many), axis=(1, 2)).max() < 1e-6


def test_augmentation_flips_then_colours_then_normalises():
  x = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3))
  x = jnp.asarray(x, jnp.uint8)
  plain = pipeline.Augmentation((0.5,) * 3, (0.25,) * 3, flip=True)
  key = jax.random.key(1)
  flipped = np.asarray(plain.train(x, key))
  straight = np.asarray(plain.test(x))
  same = (flipped == straight).all((1, 2, 3))
  assert 0 < same.sum() < 8
  np.testing.assert_array_equal(flipped[~same], straight[~same][:, :, ::-1])
  full = dataclasses.replace(plain, colour_jitter=0.4, lighting=0.1)
  jitter_only = dataclasses.replace(plain, colour_jitter=1e-6)
  np.testing.assert_allclose(jitter_only.train(x, key), flipped, atol=1e-4)
  assert np.abs(np.asarray(full.train(x, key)) - flipped).max() > 0.1
  np.testing.assert_array_equal(full.test(x), straight)


def test_augmentation_follows_the_config(folder):
  fields = {'train__colour_jitter': 0.4, 'train__lighting': 0.1}
  full, plain = (
    _open(folder, data__augment=augment, **fields).train_source('train', False)
    for augment in (True, False)
  )
  normalised = pipeline.Augmentation(*specs.IMAGENET_MOMENTS)
  assert full.draw.augmentation == dataclasses.replace(
    normalised, flip=True, colour_jitter=0.4, lighting=0.1
  )
  assert plain.draw.augmentation == normalised
  assert (full.batches.scale, plain.batches.scale) == (0.25, 0)


# TFDS.


def _open_prepared(root, workdir, **fields):
  c = _config(
    '',
    data__data_dir=str(root),
    data__num_classes=0,
    data__validation_examples=3000,
    **fields,
  )
  return data.open_set(c, workdir)


def test_a_prepared_set_gives_the_images_of_the_folder(folder, tmp_path):
  splits = {'train': [], 'validation': []}
  for (split, label, name), (_, content) in _files().items():
    example = {'image': content, 'label': int(label[1:]), 'file_name': name}
    theirs = 'train' if split == 'train' else 'validation'
    splits[theirs].append((name, example))
  prepared = tmp_path / 'tfds'
  test_data.prepared_by_tfds('imagenet2012', prepared, splits)
  d, f = _open_prepared(prepared, tmp_path), _open(folder)
  assert sorted(_evaluated(d.test())) == sorted(_evaluated(f.test()))
  # The same images are held out, since the rule is about file names.
  held_out = _evaluated(d.validation())
  assert len(held_out) == 15
  assert sorted(held_out) == sorted(_evaluated(f.validation()))
  source = d.train_source('search', True)
  assert source.steps_per_epoch == 185 // 24
  batches = _batches(source, range(source.steps_per_epoch))
  assert not {i for x, _ in batches for i in _which(x)} & set(held_out)
  assert all((_which(x) // TRAIN == y).all() for x, y in batches)
  # The names are read once a workdir.
  (kept,) = (tmp_path / 'data').glob('*.npz')
  before = kept.stat().st_mtime_ns
  again = _open_prepared(prepared, tmp_path, data__workers=1)
  assert kept.stat().st_mtime_ns == before
  again = _batches(again.train_source('search', True), range(3))
  own_models.assert_same(again, batches[:3])


def test_what_is_not_prepared_says_the_ways(tmp_path, refused):
  root = tmp_path / 'nothing'
  e = refused('imagenet2012 is not prepared in', _open_prepared, root, tmp_path)
  assert 'config.data.source_dir' in str(e) and 'docs/imagenet.md' in str(e)


# Shapes.


def test_shapes_are_made_once_and_the_same(tmp_path):
  counts = {'train_examples': 16, 'test_examples': 8}
  facts = dataclasses.replace(specs.spec('shapes'), **counts)
  root = shapes.make_folder(tmp_path / 'a', facts)
  again = shapes.make_folder(tmp_path / 'b', facts)
  files = sorted(p.relative_to(root) for p in root.rglob('*.JPEG'))
  assert len(files) == 24
  assert all((root / p).read_bytes() == (again / p).read_bytes() for p in files)
  sizes = set()
  for path in files:
    with Image.open(root / path) as image:
      sizes.add(image.size)
  assert len(sizes) > 10
  (root / files[0]).unlink()
  assert shapes.make_folder(root, facts) == root
  assert not (root / files[0]).exists()  # Left as it was.
  assert listing.scan(root / 'train').classes == facts.class_names
  assert sorted(os.listdir(tmp_path)) == ['a', 'b']
