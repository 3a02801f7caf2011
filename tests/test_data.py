"""Data sets: facts, files that users supply, downloads, cache, splits.

Nothing here uses the network: archives are small fakes, served by this process.
"""

import collections
import contextlib
import dataclasses
import gzip
import http.server
import io
import os
import pathlib
import socket
import struct
import sys
import tarfile
import textwrap
import threading
import time
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from pfs_jax import config, console, data, errors, storage
from pfs_jax.data import prepare, records, specs, upstream
from tests import processes

DEBIAN = pathlib.Path(upstream.DEBIAN_FASHION)
KEYS = ('train_images', 'train_labels', 'test_images', 'test_labels')
TRAIN, TEST = 60, 20
TFDS_SETS = ('mnist', 'fashion_mnist', 'cifar10', 'cifar100')
NOWHERE = 'http://127.0.0.1:1/'

CACHED = (storage.CHECKSUMS, 'pfs_jax_uint8.npz')

# Fake upstream archives. Pixel 0 of an image repeats its label and the rest is
# noise, so that an image that lost its label shows.


def _fake_splits(name):
  """{split: (images, labels)}"""
  facts, splits = specs.SPECS[name], {}
  for seed, (split, count) in enumerate({'train': TRAIN, 'test': TEST}.items()):
    shape = (count, facts.image_size, facts.image_size, facts.channels)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, facts.num_classes, count, np.uint8)
    images[:, 0, 0, 0] = labels
    splits[split] = images, labels
  return splits


def _gz_idx(array):
  header = struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape)
  # With a file name, as upstream's have.
  stream = io.BytesIO()
  with gzip.GzipFile('x', 'wb', fileobj=stream, mtime=1) as f:
    f.write(header + array.tobytes())
  return stream.getvalue()


def _cifar_bytes(name, images, labels):
  columns = [labels[:, None], images.transpose(0, 3, 1, 2).reshape(-1, 3072)]
  if name == 'cifar100':
    columns.insert(0, labels[:, None] // 5)
  return np.concatenate(columns, axis=1).tobytes()


def _tar_gz(members):
  """An archive of {name or TarInfo: content}, the same bytes at any time."""
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w') as archive:
    for info, content in members.items():
      if isinstance(info, str):
        info = tarfile.TarInfo(info)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return gzip.compress(stream.getvalue(), mtime=1)


def _fake_files(name):
  train, test = _fake_splits(name).values()
  if 'mnist' in name:
    return {
      f'{prefix}-{kind}-idx{rank}-ubyte.gz': _gz_idx(array)
      for prefix, pair in (('train', train), ('t10k', test))
      for kind, rank, array in (
        ('images', 3, pair[0][..., 0]),
        ('labels', 1, pair[1]),
      )
    }
  if name == 'cifar100':
    parts = {'train.bin': train, 'test.bin': test}
    prefix = 'cifar-100-binary/'
  else:
    parts = {
      f'data_batch_{i + 1}.bin': [a[i * 12 : i * 12 + 12] for a in train]
      for i in range(5)
    } | {'test_batch.bin': test}
    prefix = 'cifar-10-batches-bin/'
  members = {prefix + k: _cifar_bytes(name, *v) for k, v in parts.items()}
  number = '100' if name == 'cifar100' else '10'
  return {f'cifar-{number}-binary.tar.gz': _tar_gz(members)}


@pytest.fixture
def fakes(monkeypatch):
  """install(name, base_url) -> {file name: content}, undone afterwards.

  It registers small counts and the checksums of the fakes.
  """
  monkeypatch.setattr(specs, 'SPECS', dict(specs.SPECS))

  def install(name, base_url=NOWHERE):
    contents = _fake_files(name)
    specs.SPECS[name] = dataclasses.replace(
      specs.SPECS[name], train_examples=TRAIN, test_examples=TEST
    )
    listed = tuple(
      upstream.File(k, base_url + k, len(v), storage.sha256(v))
      for k, v in contents.items()
    )
    monkeypatch.setattr(upstream, 'expected', {name: listed}.__getitem__)
    return contents

  return install


def _folder(path, contents):
  path.mkdir()
  for name, content in contents.items():
    (path / name).write_bytes(content)
  return str(path)


def _tree(path):
  """Files and folders below, but for the lock."""
  found = (str(p.relative_to(path)) for p in path.rglob('*'))
  return sorted(p for p in found if p != '.lock')


def _pixels(images, labels):
  """A multiset of examples."""
  pairs = zip(images, labels, strict=True)
  return collections.Counter((i.tobytes(), int(k)) for i, k in pairs)


def _assert_equal(a, b):
  for key in KEYS:
    np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


# Facts.


def test_spec_agrees_with_tfds():
  import tensorflow_datasets as tfds

  for name in TFDS_SETS:
    features = tfds.builder_cls(name)(data_dir='/nonexistent').info.features
    facts = data.spec(name)
    size = facts.image_size
    assert features['image'].shape == (size, size, facts.channels)
    assert features['label'].num_classes == facts.num_classes
    assert len(set(facts.class_names)) == facts.num_classes
    assert facts.flip == (name != 'mnist')
    if name == 'fashion_mnist':
      assert tuple(features['label'].names) == facts.class_names
  # CIFAR-100's labels are in alphabetical order (the data set's home page).
  names = data.spec('cifar100').class_names
  assert list(names) == sorted(names)
  # ImageNet's are the sorted names of folders.
  builder = tfds.builder_cls('imagenet2012')(data_dir='/nonexistent')
  lines = builder.info.features['label'].names
  assert lines == sorted(lines)
  assert len(lines) == data.spec('imagenet2012').num_classes == 1000


def test_unknown_name_lists_the_known(refused):
  e = refused('must be one of', data.load, 'cifar')
  assert str(e) == (
    'config.data.name must be one of digits, mnist, fashion_mnist, cifar10, '
    'cifar100, imagenet2012, shapes, folder, npz; got cifar.'
  )
  refused('fits in memory', data.load, 'imagenet2012')


# Digits.


def test_digits_split_is_disjoint_stratified_and_fixed():
  from sklearn import datasets

  a, b = data.load('digits'), data.load('digits')
  source = datasets.load_digits()
  assert a.train_images.shape == (1500, 8, 8, 1)
  assert a.test_images.shape == (297, 8, 8, 1)
  assert a.train_images.dtype == a.test_images.dtype == np.uint8
  assert a.train_labels.dtype == a.test_labels.dtype == np.int32
  # Together they are scikit-learn's set, each image once: hence disjoint.
  every = _pixels(a.train_images, a.train_labels)
  every += _pixels(a.test_images, a.test_labels)
  scaled = np.rint(source.images * 255 / 16).astype(np.uint8)
  assert every == _pixels(scaled, source.target)
  assert scaled.max() == 255
  share = np.bincount(source.target) * 297 / 1797
  assert np.all(np.abs(np.bincount(a.test_labels) - share) < 1)
  _assert_equal(a, b)
  x = (a.train_images / 255 - a.spec.mean[0]) / a.spec.std[0]
  assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_train_examples_keeps_the_first():
  every, few = data.load('digits'), data.load('digits', train_examples=10)
  np.testing.assert_array_equal(few.train_images, every.train_images[:10])
  np.testing.assert_array_equal(few.train_labels, every.train_labels[:10])
  assert len(few.test_labels) == 297
  assert len(data.load('digits', train_examples=1500).train_labels) == 1500
  for count in (-1, 1501):
    with pytest.raises(errors.UserError, match=r'config\.data\.train_examples'):
      data.load('digits', train_examples=count)


def test_the_last_are_held_out(tmp_path, refused):
  c = config.default()
  c.data.name, c.data.validation_examples = 'digits', 300
  opened = data.open_set(c, tmp_path)
  ((images, labels, _),) = opened.validation()
  digits = data.load('digits')
  np.testing.assert_array_equal(images, digits.train_images[-300:])
  np.testing.assert_array_equal(labels, digits.train_labels[-300:])
  for hold_out, n in ((True, 1200), (False, 1500)):
    found, _ = opened.train_source('train', hold_out).resident
    np.testing.assert_array_equal(found, digits.train_images[:n])
  c.data.validation_examples = 0
  assert data.open_set(c, tmp_path).validation() is None
  c.data.validation_examples = 1500
  message = r'config\.data\.validation_examples must be in 0\.\.1499'
  refused(message, data.open_set, c, tmp_path)


# Files that the user has.


def prepared_by_tfds(name, root, splits):
  """Lets TFDS prepare {split: [(key, example)]}, without TensorFlow."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  stock = tfds.builder_cls(name)
  with registered.skip_registration():

    class Prepared(stock):
      name = stock.name
      pkg_dir_path = stock.pkg_dir_path if 'imagenet' in name else None

      def _split_generators(self, dl_manager):
        return {split: iter(examples) for split, examples in splits.items()}

  builder = Prepared(data_dir=root, file_format='array_record')
  tfds.disable_progress_bar()
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )


def _fakes_by_tfds(name, root):
  splits = {}
  for split, (images, labels) in _fake_splits(name).items():
    splits[split] = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      png = io.BytesIO()
      Image.fromarray(image.squeeze()).save(png, 'png')
      example = {'image': png.getvalue(), 'label': int(label)}
      if 'cifar' in name:
        example['id'] = f'{split}_{i:05d}'
      if name == 'cifar100':
        example['coarse_label'] = int(label) // 5
      splits[split].append((i, example))
  prepared_by_tfds(name, root, splits)


@pytest.mark.parametrize('name', TFDS_SETS[1:])  # MNIST is as Fashion-MNIST.
def test_source_dir_gives_what_tfds_prepares(name, fakes, tmp_path):
  """The same images, labels and order, from files and from TFDS."""
  source = _folder(tmp_path / 'source', contents := fakes(name))
  os.chmod(source, 0o555)
  root = tmp_path / 'data'
  d = data.load(name, data_dir=str(root), source_dir=source)
  raw = _fake_splits(name)
  assert _pixels(d.train_images, d.train_labels) == _pixels(*raw['train'])
  assert _pixels(d.test_images, d.test_labels) == _pixels(*raw['test'])
  np.testing.assert_array_equal(d.train_images[:, 0, 0, 0], d.train_labels)
  assert _tree(tmp_path / 'source') == sorted(contents)
  assert _tree(root) == [name, *(f'{name}/{file}' for file in CACHED)]
  _fakes_by_tfds(name, tmp_path / 'tfds')
  _assert_equal(d, data.load(name, data_dir=str(tmp_path / 'tfds')))


def test_source_dir_with_a_wrong_file(fakes, tmp_path, refused):
  contents, source = fakes('mnist'), tmp_path / 'source'
  _folder(source, contents)
  name = 't10k-labels-idx1-ubyte.gz'

  def wrong(*parts):
    places = {'data_dir': str(tmp_path / 'x'), 'source_dir': str(source)}
    e = refused('config.data.source_dir', data.load, 'mnist', **places)
    for part in (str(source), name, *parts):
      assert part in str(e)
    assert _tree(tmp_path / 'x') == []

  (source / name).write_bytes(contents[name] + b'x')
  wrong('is another file', storage.sha256(contents[name]))
  (source / name).unlink()
  wrong(f'{name} does not exist', 'train-images-idx3-ubyte.gz')  # What else.
  os.mkfifo(source / name)  # Reading it would wait for ever.
  wrong(f'{name} cannot be read: it is not a file')


def test_real_checksums_are_those_of_tfds():
  # Length and sha256 from TFDS 4.9.10's url_checksums/cifar10.txt.
  (cifar10,) = upstream.expected('cifar10')
  assert (cifar10.name, cifar10.size) == ('cifar-10-binary.tar.gz', 170052171)
  sha256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
  assert cifar10.sha256 == sha256
  (cifar100,) = upstream.expected('cifar100')
  assert cifar100.name == 'cifar-100-binary.tar.gz'
  for name in ('mnist', 'fashion_mnist'):
    assert {f.name for f in upstream.expected(name)} == set(_fake_files(name))
  for name in TFDS_SETS:  # Nothing is used without a checksum.
    assert all(len(f.sha256) == 64 for f in upstream.expected(name))


@pytest.mark.slow
@pytest.mark.skipif(
  not DEBIAN.exists(), reason='Debian package dataset-fashion-mnist is absent'
)
def test_debian_fashion_mnist(tmp_path):
  code = """
    import sys, time
    import numpy as np
    from pfs_jax import data, storage
    start = time.process_time()
    d = data.load('fashion_mnist', data_dir=sys.argv[1], source_dir=sys.argv[2])
    print(time.process_time() - start, 'tensorflow_datasets' in sys.modules)
    assert 'tensorflow' not in sys.modules
    assert d.train_images.shape == (60000, 28, 28, 1)
    # The data set's own page: 10 classes, 6,000 and 1,000 images each.
    assert np.bincount(d.train_labels).tolist() == [6000] * 10
    assert np.bincount(d.test_labels).tolist() == [1000] * 10
    x = d.train_images / np.float32(255)
    assert abs(x.mean() - d.spec.mean[0]) < 1e-3
    assert abs(x.std() - d.spec.std[0]) < 1e-3
  """
  for source, imports in ((upstream.DEBIAN_FASHION, 'True'), ('', 'False')):
    command = ['-c', textwrap.dedent(code), tmp_path, source]
    seconds, imported = processes.output(command).split()
    assert imported == imports
  assert float(seconds) < 1  # CPU time: other work does not change it.


# The network.


def _answer(handler, content, length=None):
  handler.send_response(200)
  handler.send_header('Content-Length', str(length or len(content)))
  handler.end_headers()
  handler.wfile.write(content)


@contextlib.contextmanager
def _server(contents, answer=_answer):
  """Serves files by answer(handler, content); (address, paths asked for)."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      answer(self, contents[self.path[1:]])

    def log_message(self, *args):
      pass

  with (
    http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server,
    futures.ThreadPoolExecutor(1) as pool,
  ):
    # Asked often whether to end: shutdown() waits for the next time.
    pool.submit(server.serve_forever, 0.01)
    try:
      yield f'http://127.0.0.1:{server.server_port}/', asked
    finally:
      server.shutdown()


def _refused(name, tmp_path, **kwargs):
  """The message of a failing load, of which nothing may stay behind."""
  with pytest.raises(errors.UserError) as e:
    data.load(name, data_dir=str(tmp_path / 'data'), **kwargs)
  message = str(e.value)
  assert len(message.splitlines()) <= 3
  assert f'{name} is not prepared in {tmp_path / "data"}' in message
  for way in ('config.data.download', 'source_dir', 'data_dir'):
    assert way in message
  assert _tree(tmp_path / 'data') == []
  return message


def test_download(fakes, tmp_path, capsys):
  with _server(_fake_files('fashion_mnist')) as (url, asked):
    fakes('fashion_mnist', url)
    d = data.load('fashion_mnist', data_dir=str(tmp_path))
  assert len(asked) == len(set(asked)) == 4
  raw = _fake_splits('fashion_mnist')['test']
  assert _pixels(d.test_images, d.test_labels) == _pixels(*raw)
  out, err = capsys.readouterr()
  assert out == '' and f'downloading {url}' in err


def _altered(handler, content):
  _answer(handler, content[:-1] + bytes([content[-1] ^ 1]))


def _cut_short(handler, content):
  _answer(handler, content[: len(content) // 2], len(content))


@pytest.mark.parametrize(
  'spoil, reason',
  [
    (_altered, 'not the expected file (sha256 differs)'),
    (lambda h, content: _answer(h, content + b'x' * 100), 'sha256 differs'),
    (_cut_short, 'ended after'),
    (lambda h, _: h.send_error(404), 'status 404'),
    (lambda h, _: h.wfile.write(b'hello\r\n\r\n'), 'hello'),
  ],
)
def test_spoilt_download_is_refused_at_once(spoil, reason, fakes, tmp_path):
  with _server(_fake_files('cifar10'), spoil) as (url, asked):
    fakes('cifar10', url)
    message = _refused('cifar10', tmp_path)
  assert reason in message and 'the download failed' in message
  assert f'{url}cifar-10-binary.tar.gz' in message
  assert len(asked) == 1  # One attempt.


def test_nobody_answers(fakes, tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  fakes('fashion_mnist', f'http://127.0.0.1:{port}/')
  start = time.monotonic()
  message = _refused('fashion_mnist', tmp_path)
  assert time.monotonic() - start < 5
  assert 'Connection refused' in message
  assert 'apt-get install dataset-fashion-mnist' in message
  fakes('mnist', 'http://no-such-host.invalid/')
  start = time.monotonic()
  message = _refused('mnist', tmp_path)
  assert time.monotonic() - start < upstream.CONNECT_SECONDS + 5
  assert 'apt-get' not in message


def test_slow_answers(fakes, tmp_path, monkeypatch):
  release = threading.Event()
  monkeypatch.setattr(upstream, 'CONNECT_SECONDS', 0.3)
  monkeypatch.setattr(upstream, '_STALL_SECONDS', 2)
  with _server(_fake_files('cifar10'), lambda *_: release.wait(20)) as (url, _):
    fakes('cifar10', url)
    start = time.monotonic()
    message = _refused('cifar10', tmp_path)
    assert time.monotonic() - start < 1.5
    release.set()
  assert 'no answer within 0.3 s' in message

  release.clear()
  monkeypatch.setattr(upstream, 'CONNECT_SECONDS', 5)
  monkeypatch.setattr(upstream, '_STALL_SECONDS', 0.3)

  def stall(handler, content):
    _cut_short(handler, content)
    handler.wfile.flush()
    release.wait(20)

  with _server(_fake_files('cifar10'), stall) as (url, _):
    fakes('cifar10', url)
    message = _refused('cifar10', tmp_path)
    release.set()
  assert 'timed out' in message


def test_no_download_asks_nobody(fakes, tmp_path):
  with _server(_fake_files('cifar10')) as (url, asked):
    fakes('cifar10', url)
    message = _refused('cifar10', tmp_path, download=False)
  assert asked == []
  assert 'config.data.download is False' in message
  assert 'cifar-10-binary.tar.gz' in message


# The directory of prepared data.


@pytest.fixture
def prepared(fakes, tmp_path):
  """A prepared CIFAR-10; source and network are gone."""
  source = _folder(tmp_path / 'source', fakes('cifar10'))
  root = tmp_path / 'data'
  d = data.load('cifar10', data_dir=str(root), source_dir=source)
  return root, d, root / 'cifar10' / 'pfs_jax_uint8.npz'


def _again(root, source=''):
  places = {'data_dir': str(root), 'source_dir': str(source)}
  return data.load('cifar10', **places, download=False)


def test_second_load_reads_the_cache_only(prepared, monkeypatch):
  root, first, _ = prepared
  monkeypatch.setattr(storage, 'locked', None)  # No waiting either.
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)  # No import.
  second = _again(root)
  _assert_equal(first, second)
  assert second.train_labels.dtype == np.int32


def test_a_damaged_cache_is_made_again(prepared, capsys):
  """Cut off, flipped, or well-formed with other contents: never used."""
  root, first, cache = prepared
  source, notes = root.parent / 'source', cache.with_name(storage.CHECKSUMS)
  good, noted = cache.read_bytes(), notes.read_bytes()
  place = len(good) // 3
  for content in (
    b'',
    good[: len(good) // 2],
    good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :],
  ):
    cache.write_bytes(content)
    _assert_equal(first, _again(root, source))
    assert 'is damaged or was changed' in capsys.readouterr().err
    assert cache.read_bytes() == good and notes.read_bytes() == noted
  # Without its note (a crash, an older version): it must be this data set.
  arrays = {key: getattr(first, key) for key in KEYS}
  for changes, message in (
    ({'train_labels': first.train_labels.astype(np.int64)}, 'train_labels is'),
    ({'test_images': first.test_images[:-1]}, 'test_images is'),
    ({'test_labels': np.full_like(first.test_labels, 10)}, 'not in 0..9'),
    ({'sha256': np.array('abc')}, 'sha256 is'),
    ({'test_labels': None}, 'test_labels is None'),
  ):
    other = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(cache, **other)
    notes.unlink()
    _assert_equal(first, _again(root, source))
    assert message in capsys.readouterr().err
  _assert_equal(first, _again(root))
  assert capsys.readouterr().err == ''


def test_cache_that_cannot_be_kept(prepared, monkeypatch, capsys):
  """The folder cannot be made, either: a user without a home has none."""
  root, first, cache = prepared
  cache.unlink()
  before = _tree(root.parent)

  def refuse(path, **kwargs):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
  for folder in (root, root.parent / 'other'):
    _assert_equal(first, _again(folder, root.parent / 'source'))
    assert 'not saved' in capsys.readouterr().err
    assert _tree(root.parent) == before


def test_what_tfds_prepared_and_is_damaged(fakes, tmp_path, refused):
  fakes('cifar10')
  _fakes_by_tfds('cifar10', tmp_path)
  first = _again(tmp_path)
  folder, cache = tmp_path / 'cifar10/3.0.2', tmp_path / 'cifar10' / CACHED[1]
  (path,) = folder.glob('*train.array_record*')
  info = folder / 'dataset_info.json'
  good, described = path.read_bytes(), info.read_bytes()
  spoilt = [(path, b'nonsense' * 1000), (info, b'{}')]
  for place in np.random.default_rng(1).integers(0, len(good), 6).tolist():
    changed = good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :]
    spoilt.append((path, changed))
  for i, (file, content) in enumerate(spoilt):
    cache.unlink(missing_ok=True)
    path.write_bytes(good)
    info.write_bytes(described)
    file.write_bytes(content)
    try:  # array_record checks what it holds; its padding may change.
      _assert_equal(first, _again(tmp_path))
    except errors.UserError as e:
      message = str(e)
      assert len(message.splitlines()) <= 3
      assert str(folder) in message and 'Delete' in message
    else:
      assert i > 1
  cache.unlink(missing_ok=True)
  info.write_bytes(described.replace(b'array_record', b'tfrecord'))
  refused('as array_record; got tfrecord', _again, tmp_path)


@pytest.mark.parametrize('bad', ['file', 'file/below', 'gs://bucket/data'])
def test_data_dir_that_cannot_be(bad, fakes, tmp_path):
  source = _folder(tmp_path / 'source', fakes('cifar10'))
  (tmp_path / 'file').write_text('')
  path = bad if '://' in bad else str(tmp_path / bad)
  with pytest.raises(errors.UserError, match='cannot be used|must be a local'):
    data.load('cifar10', data_dir=path, source_dir=source)


def test_default_data_dir(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', '/some/where')
  assert records.directory('') == pathlib.Path('/some/where')
  monkeypatch.delenv('TFDS_DATA_DIR')
  home = pathlib.Path.home()
  assert records.directory('') == home / 'tensorflow_datasets'
  assert records.directory('~/x') == home / 'x'


def test_two_at_once(fakes, tmp_path, monkeypatch):
  """Both wait for the lock, then one prepares and both get the same."""
  source = _folder(tmp_path / 'source', fakes('cifar10'))
  root, build = tmp_path / 'data', prepare._build
  made, waiting = [], threading.Semaphore(0)
  monkeypatch.setattr(prepare, '_build', lambda *a: made.append(a) or build(*a))

  def note(text):
    assert text.endswith(f'another process prepares data in {root}; waiting')
    waiting.release()

  monkeypatch.setattr(console, 'note', note)
  # A lock is one of an open file, so two threads are as two processes are.
  with futures.ThreadPoolExecutor(2) as pool:
    with storage.locked(root):
      both = [pool.submit(_again, root, source) for _ in range(2)]
      assert all(waiting.acquire(timeout=60) for _ in both)
      assert _tree(root) == []
    _assert_equal(*(one.result(60) for one in both))
  assert len(made) == 1  # The second one found the cache made.
