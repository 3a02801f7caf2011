"""Data of one's own, as users have them: folders, .npz files, functions.

Costs about 10 s; the whole run from the command line is slow.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from pfs_jax import config, data, errors, stages
from pfs_jax.data import listing, own
from pfs_jax.studies import tournament
from tests import processes, small_run


def _config(**fields):
  c = config.default()
  c.data.validation_examples = 10
  c.train.batch_size = 16
  c.data.update(fields)
  config.validate(c)
  return c


def _config_of(source, **fields):
  name = 'npz' if source.suffix == '.npz' else 'folder'
  return _config(name=name, source_dir=str(source), **fields)


def _arrays():
  """Images of three classes."""
  rng = np.random.default_rng(0)
  return {
    'images': rng.integers(0, 256, (60, 8, 8, 1), np.uint8),
    'labels': np.arange(60) % 3,
    'test_images': rng.integers(0, 256, (12, 8, 8, 1), np.uint8),
    'test_labels': np.arange(12) % 3,
  }


def _npz(path, **changes):
  found = {k: v for k, v in {**_arrays(), **changes}.items() if v is not None}
  np.savez(path, **found)
  return path


def _folder(root, sizes=((8, 8),), classes=('cat', 'dog'), n=10, suffix='png'):
  """Images of one colour each, so that a pixel tells which image it is."""
  for label, name in enumerate(classes):
    (root / name).mkdir(parents=True)
    for i in range(n):
      colour = (20 * i, 100 * label, 50)
      image = Image.new('RGB', sizes[i % len(sizes)], colour)
      image.save(root / name / f'{i}.{suffix}', quality=95)
  return root


@pytest.fixture
def pets(tmp_path):
  return _folder(tmp_path / 'pets')


def _load(fields):
  with tempfile.TemporaryDirectory() as workdir:
    return own.load(fields, pathlib.Path(workdir))


def _examples(images, labels):
  pairs = zip(images, labels, strict=True)
  return sorted((i.tobytes(), int(k)) for i, k in pairs)


# What comes out.


def test_an_npz_file_becomes_arrays(tmp_path):
  path = _npz(tmp_path / 'mine.npz', class_names=['a', 'b', 'c'])
  c = _config_of(path)
  facts = data.configured(c.data)
  assert (facts.image_size, facts.channels, facts.num_classes) == (8, 1, 3)
  assert facts.class_names == ('a', 'b', 'c')
  assert (facts.train_examples, facts.test_examples) == (60, 12)
  raw = _arrays()
  np.testing.assert_allclose(facts.mean, raw['images'].mean() / 255, atol=1e-4)
  np.testing.assert_allclose(facts.std, raw['images'].std() / 255, atol=1e-4)
  found = _load(c.data)
  # The order is fixed and not that of the file; the test images keep theirs.
  assert _examples(found.train_images, found.train_labels) == _examples(
    raw['images'], raw['labels']
  )
  assert (found.train_labels != raw['labels']).any()
  np.testing.assert_array_equal(found.test_images, raw['test_images'])
  again = _load(c.data)
  np.testing.assert_array_equal(found.train_images, again.train_images)
  grey = {k: raw[k][..., 0] for k in ('images', 'test_images')}
  c.data.source_dir = str(_npz(tmp_path / 'grey.npz', **grey))
  assert _load(c.data).train_images.shape == (60, 8, 8, 1)


def test_an_opened_set_trains_holds_out_and_tests(tmp_path):
  path = _npz(tmp_path / 'x.npz')
  opened = data.open_set(_config_of(path), tmp_path)
  assert opened.validation().size == 10 and opened.test().size == 12
  with opened.train_source('train', hold_out=True) as source:
    assert source.steps_per_epoch == 50 // 16
    item = jax.tree.map(lambda v: v[0], source.chunk(0, 1))
    x, _ = source.draw(source.resident, item)
  assert x.shape == (16, 8, 8, 1)
  assert source.draw.augmentation.flip and source.draw.augmentation.padding == 1
  c = _config_of(path, flip=False)
  source = data.open_set(c, tmp_path).train_source('train', False)
  assert not source.draw.augmentation.flip
  few = data.open_set(_config_of(path, train_examples=40), tmp_path)
  assert few.train_source('train', False).steps_per_epoch == 40 // 16


@pytest.mark.parametrize('split', ['test', 'val'])
def test_folders_of_train_and_test(split, tmp_path):
  _folder(tmp_path / 'train')
  _folder(tmp_path / split, n=4, suffix='jpg')
  c = _config_of(tmp_path)
  facts = data.configured(c.data)
  assert facts.class_names == ('cat', 'dog') and facts.image_size == 8
  assert (facts.train_examples, facts.test_examples) == (20, 8)
  found = _load(c.data)
  # PNG at its own size: the pixels are those of the files.
  colours = {tuple(v) for v in found.train_images[:, 0, 0].tolist()}
  assert colours == {(20 * i, 100 * k, 50) for i in range(10) for k in (0, 1)}
  assert (found.train_images[:, 0, 0, 1] == 100 * found.train_labels).all()
  assert (found.train_images == found.train_images[:, :1, :1]).all()


def test_one_folder_is_split_by_name(pets):
  c = _config_of(pets)
  found = _load(c.data)
  assert np.bincount(found.test_labels).tolist() == [2, 2]  # A fifth of each.
  assert np.bincount(found.train_labels).tolist() == [8, 8]
  first = {v[0] for v in found.test_images[:2, 0, 0].tolist()}
  assert len(first) == 2
  # More images of other classes change nothing for these.
  _folder(pets, classes=('bee',))
  again = _load(c.data)
  assert np.bincount(again.test_labels).tolist() == [2, 2, 2]
  of_cats = again.test_images[again.test_labels == 1]
  assert {v[0] for v in of_cats[:, 0, 0].tolist()} == first


def test_images_of_any_size_become_squares(tmp_path):
  root = _folder(tmp_path, sizes=((30, 20), (17, 64), (9, 9)))
  c = _config_of(root)
  # The shorter side of the first training image.
  assert data.configured(c.data).image_size in (20, 17, 9)
  # The centre square, whole: an image with white borders loses them alone.
  square = np.random.default_rng(0).integers(0, 99, (10, 10, 3), np.uint8)
  wide = np.pad(square, ((0, 0), (10, 10), (0, 0)), constant_values=255)
  Image.fromarray(wide).save(root / 'cat' / '0.png')
  c.data.image_size = 10
  found = _load(c.data)
  images = np.concatenate([found.train_images, found.test_images])
  assert images.shape == (20, 10, 10, 3)
  assert (images == square).all((1, 2, 3)).sum() == 1


MODULE = """
import numpy as np
from sklearn import datasets

def digits():
  d = datasets.load_digits()
  images = (d.images * 15).astype(np.uint8)
  return dict(images=images[:1500], labels=d.target[:1500],
              test_images=images[1500:], test_labels=d.target[1500:])

def torch_habit():
  return 1, 2

def careless():
  return {}['images']
ragged = lambda: {**digits(), 'images': [[[0]], [[0, 0], [0, 0]]]}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'their_data.py').write_text(MODULE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  yield 'their_data'
  sys.modules.pop('their_data', None)


def test_a_function_gives_arrays(module, tmp_path):
  c = _config(factory=f'{module}:digits')
  facts = data.configured(c.data)
  assert (facts.image_size, facts.num_classes) == (8, 10)
  opened = data.open_set(c, tmp_path)
  assert opened.test().size == 297 and opened.spec == facts


# One line for what is wrong.


def _refusal(c):
  with pytest.raises(errors.UserError) as e:
    data.configured(c.data)
    with tempfile.TemporaryDirectory() as workdir:
      data.open_set(c, pathlib.Path(workdir))
  message = str(e.value)
  assert len(message.splitlines()) <= 3, message
  return message


@pytest.mark.parametrize(
  'name, message',
  [
    ('torch_habit', 'must return a dict of arrays'),
    ('careless', r"KeyError: 'images' \(.*their_data.py:15 in careless\)"),
    ('ragged', 'ValueError: .*inhomogeneous shape'),
    ('broken:f', r'ZeroDivisionError: division by zero \(.*broken.py:2'),
  ],
)
def test_a_function_that_fails_is_named(name, message, module, tmp_path):
  (tmp_path / 'broken.py').write_text('import numpy\n1 / 0\n')
  factory = name if ':' in name else f'{module}:{name}'
  found = _refusal(_config(factory=factory))
  assert found.startswith(f'config.data.factory={factory}: ')
  assert re.search(message, found), found


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'labels': None}, 'the arrays must be images, labels, test_images'),
    ({'label': np.zeros(3)}, 'must be images, labels'),
    ({'images': np.zeros((60, 8, 8, 1))}, 'must be uint8 .*; got float64'),
    ({'images': np.zeros((60, 64), np.uint8)}, r'uint8 \[N, H, W\]'),
    ({'images': np.zeros((0, 8, 8), np.uint8)}, r'got uint8 \(0, 8, 8\)'),
    ({'images': np.zeros((60, 8, 9, 1), np.uint8)}, 'must be squares'),
    ({'test_images': np.zeros((12, 9, 9, 1), np.uint8)}, r'\[8, 8, 1\] as'),
    ({'labels': np.zeros(59, int)}, 'must be 60 integers, one for each'),
    ({'labels': np.zeros(60)}, 'must be 60 integers.*; got float64'),
    ({'labels': np.zeros(60, int)}, 'must be 2 to 2[*]{2}20 classes; got 1'),
    ({'labels': np.eye(3)[np.zeros(60, int)]}, 'must be 60 integers'),
    ({'labels': np.arange(60) % 3 - 1}, r'labels must be in 0..1; got -1..1'),
    ({'labels': np.arange(60) % 3 + 1}, 'none of class 0'),
    ({'test_labels': np.full(12, 3)}, r'test_labels must be in 0..2; got 3..3'),
    ({'class_names': ['a', 'b']}, 'class_names must be 3; got 2'),
    ({'class_names': 'a'}, 'class_names must be 3; got 1'),
    ({'images': np.array([{}] * 60)}, 'cannot be read'),  # Pickled objects.
  ],
)
def test_arrays_that_are_wrong_are_named(changes, message, tmp_path):
  path = _npz(tmp_path / 'x.npz', **changes)
  found = _refusal(_config_of(path))
  assert str(path) in found and re.search(message, found), found


def test_fields_that_do_not_fit_are_named(tmp_path):
  path = _npz(tmp_path / 'x.npz')
  for field, value, message in (
    ('image_size', 9, 'image_size must be 0 or 8; got 9'),
    ('num_classes', 2, 'labels must be in 0..1; got 0..2'),
    ('num_classes', 2**32, 'must be 2 to 2**20 classes; got 4294967296'),
    ('train_examples', 61, 'must be in 0..60 for npz'),
  ):
    assert message in _refusal(_config_of(path, **{field: value}))


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  good = _npz(tmp_path / 'good.npz').read_bytes()
  bad = tmp_path / 'bad.npz'
  c = _config_of(bad)
  assert 'must be a .npz file (No such file' in _refusal(c)
  for content in (b'', b'hello', good[: len(good) // 2]):
    bad.write_bytes(content)
    assert 'must be a .npz file' in _refusal(c)
  spoilt = bytearray(good)
  spoilt[len(good) // 3] ^= 1  # zip's CRC notices.
  bad.write_bytes(bytes(spoilt))
  assert 'cannot be read' in _refusal(c)
  spoilt = bytearray(good)
  spoilt[good.rindex(b'PK\x01\x02') + 6] = 109  # The version that reads it.
  bad.write_bytes(bytes(spoilt))
  assert 'must be a .npz file (zip file version' in _refusal(c)
  assert 'must be a .npz file' in _refusal(_config(name='npz'))
  assert 'No such file' in _refusal(_config_of(pathlib.Path('~nobody/x.npz')))
  bad.write_bytes(good)
  monkeypatch.setattr(own, 'MAX_BYTES', 1000)
  assert 'must hold at most 1,000 bytes' in _refusal(c)
  os.mkfifo(pipe := tmp_path / 'pipe.npz')  # Reading it would wait for ever.
  assert 'must be a .npz file; got a pipe' in _refusal(_config_of(pipe))


def test_folders_that_are_wrong_are_named(pets):
  c = _config_of(pets)
  assert 'must be a folder of class' in _refusal(_config(name='folder'))
  assert 'cannot read' in _refusal(_config_of(pets / 'nowhere'))
  for field, value, message in (
    ('num_classes', 3, 'num_classes must be 0 or 2'),
    ('image_size', 100_000, 'streams large folders'),
  ):
    wrong = _config_of(pets)
    wrong.data[field] = value
    assert message in _refusal(wrong)
  (pets / 'empty').mkdir()
  assert 'pets/empty has none' in _refusal(c)
  Image.new('L', (8, 8)).save(pets / 'empty' / 'one.png')
  assert 'at least 2 images of every class' in _refusal(c)
  (pets / 'empty' / 'one.png').rename(pets / 'dog' / 'one.png')
  (pets / 'empty').rename(odd := pets / os.fsdecode(b'odd\xff'))
  for name in ('1', '2', '3', '4'):
    Image.new('L', (8, 8)).save(odd / f'{name}.png')
  assert r"class names must be printable text; got 'odd\udcff'" in _refusal(c)
  shutil.rmtree(odd)
  (pets / 'dog' / '5.png').write_bytes(b'no image')
  found = _refusal(c)
  assert 'dog/5.png cannot be decoded (neither JPEG nor PNG)' in found
  assert 'Replace it' in found
  for path in pets.glob('cat/*.png'):
    path.write_bytes(b'')
  assert 'image_size is 0' in _refusal(c)
  shutil.rmtree(pets / 'cat')
  assert 'at least 2 class folders; ' in _refusal(c)


def test_corrupt_images_are_left_out_when_asked(pets, capsys):
  (pets / 'dog' / '5.png').write_bytes(b'no image')
  c = _config_of(pets, corrupt='skip', validation_examples=0)
  found = _load(c.data)
  assert found.spec.train_examples + found.spec.test_examples == 20
  assert len(found.train_labels) + len(found.test_labels) == 19
  assert 'skipped' in capsys.readouterr().err
  for path in pets.glob('dog/*.png'):
    path.write_bytes(b'')
  assert 'dog can be decoded' in _refusal(c)


# What must not be read, or not taken for the same.


def test_links_out_of_a_folder_are_refused(pets, tmp_path):
  secret = tmp_path / 'secret.png'
  Image.new('RGB', (8, 8)).save(secret)
  c = _config_of(pets)
  (pets / 'dog' / 'link.png').symlink_to(pets / 'dog' / '1.png')
  assert data.configured(c.data).num_classes == 2  # Inside: no harm.
  for place, target in (
    (pets / 'dog' / 'out.png', secret),
    (pets / 'elsewhere', tmp_path),
  ):
    place.symlink_to(target)
    found = _refusal(c)
    assert f'{place} leads to {target}' in found and 'cp -rL' in found
    place.unlink()
  os.mkfifo(pets / 'dog' / 'pipe.png')  # Reading it would wait for ever.
  assert 'must hold regular files' in _refusal(c)


def test_files_that_are_not_decoded(pets, monkeypatch):
  c, path = _config_of(pets), pets / 'dog' / '5.png'
  # Pillow would start Ghostscript for EPS, whatever the file's name.
  Image.new('RGB', (8, 8)).save(path, 'EPS')
  assert 'neither JPEG nor PNG' in _refusal(c)
  path.write_bytes(bytes(2000))
  with monkeypatch.context() as patch:
    patch.setattr(listing, 'MAX_BYTES', 1 << 10)
    assert 'larger than' in _refusal(c)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)  # A bomb is over twice.
  assert 'exceeds limit' in _refusal(c)


def test_a_workdir_keeps_to_its_data(tmp_path, refused):
  path = _npz(tmp_path / 'x.npz')
  c = _config_of(path)
  workdir = tmp_path / 'run'
  data.open_set(c, workdir)
  path.rename(tmp_path / 'y.npz')
  c.data.source_dir = str(tmp_path / 'y.npz')  # Where it lies does not matter.
  data.open_set(c, workdir)
  for name, index in (('labels', 5), ('test_images', (3, 1, 1, 0))):
    raw = _arrays()
    raw[name][index] ^= 1
    np.savez(tmp_path / 'y.npz', **raw)
    os.utime(tmp_path / 'y.npz', (1, hash(name) % 10**6))
    refused('differs', data.open_set, c, workdir)


def test_what_reads_no_images_needs_no_data(tmp_path, capsys, refused):
  """The facts of the data are noted in the workdir."""
  path, workdir = _npz(tmp_path / 'mine.npz'), tmp_path / 'w'
  c = small_run.config(data__name='npz', data__source_dir=str(path))
  c.data.validation_examples, c.budget.ranking = 10, 'uniform'
  stages.execute('prune', stages.Job(c, workdir))
  before = stages.Job(c, workdir).spec
  path.unlink()
  job = stages.Job(c, workdir)
  assert job.spec == before
  stages.execute('info', job)
  assert 'floor' in capsys.readouterr().out
  refused('mine.npz must be a .npz', stages.execute, 'train', job)
  refused('mine.npz must be a .npz', stages.Job, c, tmp_path / 'other')
  wrong = {**dataclasses.asdict(before), 'channels': 3}
  (workdir / 'data.json').write_text(json.dumps(wrong))
  (workdir / 'checksums.json').unlink()
  refused('data.json: mean and std must', stages.Job, c, workdir)


def test_a_refused_tournament_leaves_nothing(tmp_path, refused):
  c = small_run.config(data__name='npz', data__validation_examples=10)
  c.data.source_dir = str(_npz(tmp_path / 'mine.npz'))
  c.search.batch_size = c.train.batch_size = 16
  refused('probe.share must be', tournament.run, c, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow  # A whole run.
def test_a_folder_from_the_command_line(tmp_path):
  source = datasets.load_digits()
  for i, image in enumerate(source.images[:600]):
    path = tmp_path / 'digits' / f'digit_{source.target[i]}' / f'scan{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 15).astype(np.uint8)).save(path)
  options = {
    'data.name': 'folder',
    'data.source_dir': tmp_path / 'digits',
    'data.validation_examples': 100,
    'model.factory': 'tests.test_tournament:Tiny',
  }
  more = [f'--config.{name}={value}' for name, value in options.items()]
  out = processes.output(small_run.arguments('run', tmp_path / 'run', *more))
  assert 'narrow' in out and 'test accuracy' in out
