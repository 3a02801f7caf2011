"""Data sets: facts, files that users supply, downloads, cache, splits.

Nothing here uses the network: archives are small fakes, served by this process.
"""

import collections
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time

import numpy as np
import pytest

from pfs_jax import data, errors
from pfs_jax.data import kept, prepare, specs, upstream

ROOT = pathlib.Path(__file__).parents[1]
DEBIAN = pathlib.Path(upstream.DEBIAN_FASHION)
TRAIN, TEST = 60, 20
TFDS_SETS = ('mnist', 'fashion_mnist', 'cifar10', 'cifar100')

# Fake upstream archives. Pixel 0 of an image repeats its label and the rest is
# noise, so that an image that lost its label shows.


def _fake_split(name, count, seed):
  facts = specs.SPECS[name]
  shape = (count, facts.image_size, facts.image_size, facts.channels)
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, shape, np.uint8)
  labels = rng.integers(0, facts.num_classes, count, np.uint8)
  images[:, 0, 0, 0] = labels
  return images, labels


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


def _tar_gz(prefix, members):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode='w') as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(prefix + name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  # The same bytes in every process, whatever the time.
  return gzip.compress(stream.getvalue(), mtime=1)


def _fake_files(name):
  train, test = _fake_split(name, TRAIN, 0), _fake_split(name, TEST, 1)
  if 'mnist' in name:
    return {
      f'{prefix}-{kind}-idx{rank}-ubyte.gz': _gz_idx(array)
      for prefix, pair in (('train', train), ('t10k', test))
      for kind, rank, array in (
        ('images', 3, pair[0][..., 0]),
        ('labels', 1, pair[1]),
      )
    }
  stray = {'../evil.txt': b'must not be extracted'}
  if name == 'cifar100':
    parts = {'train.bin': train, 'test.bin': test}
    prefix = 'cifar-100-binary/'
  else:
    parts = {
      f'data_batch_{i + 1}.bin': [a[i * 12 : i * 12 + 12] for a in train]
      for i in range(5)
    } | {'test_batch.bin': test}
    prefix = 'cifar-10-batches-bin/'
  members = {k: _cifar_bytes(name, *v) for k, v in parts.items()}
  number = '100' if name == 'cifar100' else '10'
  return {f'cifar-{number}-binary.tar.gz': _tar_gz(prefix, members | stray)}


def _install(name, contents, base_url='http://127.0.0.1:1/'):
  """Registers small counts and the fakes' checksums; for fixtures below."""
  specs.SPECS[name] = dataclasses.replace(
    specs.SPECS[name], train_examples=TRAIN, test_examples=TEST
  )
  upstream.OVERRIDES[name] = tuple(
    upstream.File(k, base_url + k, len(v), hashlib.sha256(v).hexdigest())
    for k, v in contents.items()
  )


@pytest.fixture
def fakes(monkeypatch):
  """install(name, base_url) -> {file name: content}, undone afterwards."""
  monkeypatch.setattr(specs, 'SPECS', dict(specs.SPECS))
  monkeypatch.setattr(upstream, 'OVERRIDES', {})

  def install(name, base_url='http://127.0.0.1:1/'):
    contents = _fake_files(name)
    _install(name, contents, base_url)
    return contents

  return install


def _folder(path, contents):
  path.mkdir()
  for name, content in contents.items():
    (path / name).write_bytes(content)
  return str(path)


def _tree(path):
  return sorted(str(p.relative_to(path)) for p in path.rglob('*'))


def _pixels(images, labels):
  """A multiset of examples."""
  pairs = zip(images, labels, strict=True)
  return collections.Counter((i.tobytes(), int(k)) for i, k in pairs)


# Facts.


@pytest.mark.parametrize('name', ['digits', *TFDS_SETS])
def test_spec_is_consistent(name):
  facts = data.spec(name)
  assert facts.name == name
  assert len(set(facts.class_names)) == facts.num_classes
  assert len(facts.mean) == len(facts.std) == facts.channels
  assert all(0 < v < 1 for v in facts.mean + facts.std)
  assert facts.flip == (name in ('fashion_mnist', 'cifar10', 'cifar100'))
  assert 0 <= facts.crop_padding < facts.image_size


def test_spec_agrees_with_tfds():
  import tensorflow_datasets as tfds

  for name in TFDS_SETS:
    features = tfds.builder_cls(name)(data_dir='/nonexistent').info.features
    facts = data.spec(name)
    size = facts.image_size
    assert features['image'].shape == (size, size, facts.channels)
    assert features['label'].num_classes == facts.num_classes
    if name == 'fashion_mnist':
      assert tuple(features['label'].names) == facts.class_names
  # CIFAR-100's labels are in alphabetical order (the data set's home page).
  assert sorted(data.spec('cifar100').class_names) == list(
    data.spec('cifar100').class_names
  )


def test_unknown_name_lists_the_known():
  with pytest.raises(errors.UserError) as e:
    data.load('cifar')
  assert str(e.value) == (
    'config.data.name must be one of digits, mnist, fashion_mnist, cifar10, '
    'cifar100, imagenet2012, shapes; got cifar.'
  )


def test_register_adds_a_name(fakes):
  facts = dataclasses.replace(
    data.spec('cifar10'), name='streamed', in_memory=False
  )
  data.register(facts)
  assert data.spec('streamed') is facts
  with pytest.raises(errors.UserError, match='fits in memory'):
    data.load('streamed')
  with pytest.raises(AssertionError):
    data.register(dataclasses.replace(facts, num_classes=10, flip=False))


def test_facts_import_no_heavy_library():
  code = """
    import sys
    from pfs_jax import data
    data.spec('cifar10')
    heavy = {'jax', 'flax', 'tensorflow_datasets', 'sklearn', 'tensorflow'}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
  """
  _python(code).check_returncode()


def _python(code, *args):
  return subprocess.run(
    [sys.executable, '-W', 'error', '-c', textwrap.dedent(code), *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


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
  for key in ('train_images', 'train_labels', 'test_images', 'test_labels'):
    np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


def test_digits_normalise_to_zero_mean_and_unit_deviation():
  d = data.load('digits')
  x = (d.train_images / 255 - d.spec.mean[0]) / d.spec.std[0]
  assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_train_examples_keeps_the_first():
  every, few = data.load('digits'), data.load('digits', train_examples=10)
  np.testing.assert_array_equal(few.train_images, every.train_images[:10])
  np.testing.assert_array_equal(few.train_labels, every.train_labels[:10])
  assert len(few.test_labels) == 297
  assert len(data.load('digits', train_examples=1500).train_labels) == 1500


@pytest.mark.parametrize('count', [-1, 1501])
def test_train_examples_out_of_range(count):
  with pytest.raises(errors.UserError, match=r'config\.data\.train_examples'):
    data.load('digits', train_examples=count)


# Holdout.


def test_split_holds_the_last_back():
  x, y = np.arange(20).reshape(10, 2), np.arange(10)
  (tx, ty), (vx, vy) = data.split(x, y, 3)
  np.testing.assert_array_equal(ty, [0, 1, 2, 3, 4, 5, 6])
  np.testing.assert_array_equal(vy, [7, 8, 9])
  np.testing.assert_array_equal(tx, x[:7])
  np.testing.assert_array_equal(vx, x[7:])
  (tx, ty), (vx, vy) = data.split(x, y, 0)
  assert len(ty) == len(tx) == 10 and len(vx) == len(vy) == 0


@pytest.mark.parametrize('holdout', [-1, 10, 11])
def test_split_out_of_range(holdout):
  message = r'config\.data\.validation_examples must be in 0\.\.9'
  with pytest.raises(errors.UserError, match=message):
    data.split(np.zeros((10, 2)), np.zeros(10), holdout)


# Files that the user has.


@pytest.mark.parametrize('name', TFDS_SETS)
def test_source_dir(name, fakes, tmp_path):
  contents = fakes(name)
  source = _folder(tmp_path / 'source', contents)
  os.chmod(source, 0o555)
  d = data.load(name, data_dir=str(tmp_path / 'data'), source_dir=source)
  assert d.train_images.dtype == np.uint8 and d.train_labels.dtype == np.int32
  assert _pixels(d.train_images, d.train_labels) == _pixels(
    *_fake_split(name, TRAIN, 0)
  )
  assert _pixels(d.test_images, d.test_labels) == _pixels(
    *_fake_split(name, TEST, 1)
  )
  np.testing.assert_array_equal(d.train_images[:, 0, 0, 0], d.train_labels)
  assert _tree(tmp_path / 'source') == sorted(contents)
  assert not (tmp_path / 'evil.txt').exists()
  left = [p for p in os.listdir(tmp_path / 'data') if p != name]
  assert not left


@pytest.mark.parametrize('name', TFDS_SETS)
def test_stock_builder_reads_what_was_prepared(name, fakes, tmp_path):
  import tensorflow_datasets as tfds

  source = _folder(tmp_path / 'source', fakes(name))
  d = data.load(name, data_dir=str(tmp_path / 'data'), source_dir=source)
  builder = tfds.builder(
    name, data_dir=tmp_path / 'data', file_format='array_record'
  )
  assert builder.is_prepared()
  features = builder.info.features
  if name != 'mnist':
    assert tuple(features['label'].names) == d.spec.class_names
  for split in ('train', 'test'):
    examples = builder.as_data_source(split)
    raw_images, raw_labels = _fake_split(
      name, *((TRAIN, 0) if split == 'train' else (TEST, 1))
    )
    # The same order as ours, and (where there are ids) upstream's numbers.
    for i, example in enumerate(_quietly(examples)):
      np.testing.assert_array_equal(
        example['image'], getattr(d, f'{split}_images')[i]
      )
      assert example['label'] == getattr(d, f'{split}_labels')[i]
      if 'id' in example:
        kind, number = example['id'].decode().split('_')
        assert kind == split
        np.testing.assert_array_equal(example['image'], raw_images[int(number)])
        assert example['label'] == raw_labels[int(number)]
      if 'coarse_label' in example:
        assert example['coarse_label'] == example['label'] // 5
    assert i + 1 == len(raw_labels)


def _quietly(examples):
  return (examples[i] for i in range(len(examples)))


def test_source_dir_with_a_file_missing(fakes, tmp_path):
  contents = fakes('mnist')
  del contents['t10k-labels-idx1-ubyte.gz']
  source = _folder(tmp_path / 'source', contents)
  with pytest.raises(errors.UserError) as e:
    data.load('mnist', data_dir=str(tmp_path / 'data'), source_dir=source)
  message = str(e.value)
  assert len(message.splitlines()) <= 3
  assert 'config.data.source_dir' in message and source in message
  assert 'cannot read t10k-labels-idx1-ubyte.gz' in message
  assert 'train-images-idx3-ubyte.gz' in message  # What else is expected.
  assert _tree(tmp_path / 'data') == []


def test_source_dir_with_another_file(fakes, tmp_path):
  contents = fakes('cifar10')
  wanted = hashlib.sha256(contents['cifar-10-binary.tar.gz']).hexdigest()
  contents['cifar-10-binary.tar.gz'] += b'x'
  source = _folder(tmp_path / 'source', contents)
  with pytest.raises(errors.UserError) as e:
    data.load('cifar10', data_dir=str(tmp_path / 'data'), source_dir=source)
  message = str(e.value)
  assert len(message.splitlines()) <= 3
  assert 'cifar-10-binary.tar.gz' in message and source in message
  assert wanted in message
  assert _tree(tmp_path / 'data') == []


def test_real_checksums_are_those_of_tfds():
  # Length and sha256 from TFDS 4.9.10's url_checksums/cifar10.txt.
  (cifar10,) = upstream.expected('cifar10')
  assert cifar10.name == 'cifar-10-binary.tar.gz'
  assert cifar10.size == 170052171
  assert cifar10.sha256 == (
    'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
  )
  (cifar100,) = upstream.expected('cifar100')
  assert cifar100.name == 'cifar-100-binary.tar.gz'
  for name in ('mnist', 'fashion_mnist'):
    assert {f.name for f in upstream.expected(name)} == set(_fake_files(name))


@pytest.mark.slow
@pytest.mark.skipif(
  not DEBIAN.exists(), reason='Debian package dataset-fashion-mnist is absent'
)
def test_debian_fashion_mnist(tmp_path):
  code = """
    import sys, time
    import numpy as np
    from pfs_jax import data, runs
    start = time.monotonic()
    d = data.load('fashion_mnist', data_dir=sys.argv[1], source_dir=sys.argv[2])
    print(time.monotonic() - start, 'tensorflow_datasets' in sys.modules)
    assert 'tensorflow' not in sys.modules
    assert d.train_images.shape == (60000, 28, 28, 1)
    # The data set's own page: 10 classes, 6,000 and 1,000 images each.
    assert np.bincount(d.train_labels).tolist() == [6000] * 10
    assert np.bincount(d.test_labels).tolist() == [1000] * 10
    x = d.train_images / np.float32(255)
    assert abs(x.mean() - d.spec.mean[0]) < 1e-3
    assert abs(x.std() - d.spec.std[0]) < 1e-3
  """
  first = _python(code, str(tmp_path), upstream.DEBIAN_FASHION)
  assert first.returncode == 0, first.stderr
  assert first.stdout.split()[1] == 'True'
  second = _python(code, str(tmp_path), '')
  assert second.returncode == 0, second.stderr
  seconds, imported = second.stdout.split()
  assert imported == 'False' and second.stderr == ''
  assert float(seconds) < 1
  assert _tree(tmp_path)[:2] == ['fashion_mnist', 'fashion_mnist/3.0.1']


# The network.


@contextlib.contextmanager
def _server(contents, spoil=None):
  """Serves files; `spoil(handler, content)` may answer in its own way."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      content = contents[self.path[1:]]
      if spoil:
        spoil(self, content)
        return
      self.send_response(200)
      self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/', asked
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


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


@pytest.mark.parametrize('name', ['fashion_mnist', 'cifar100'])
def test_download(name, fakes, tmp_path, capsys):
  with _server(_fake_files(name)) as (url, asked):
    fakes(name, url)
    d = data.load(name, data_dir=str(tmp_path))
  assert len(asked) == len(set(asked)) == len(upstream.expected(name))
  assert _pixels(d.test_images, d.test_labels) == _pixels(
    *_fake_split(name, TEST, 1)
  )
  out, err = capsys.readouterr()
  assert out == ''
  assert f'downloading {url}' in err
  assert _tree(tmp_path)[0] == name


def test_download_on_a_terminal_shows_a_bar(fakes, tmp_path, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setattr(sys, 'stderr', Terminal())
  monkeypatch.setenv('TERM', 'xterm')
  with _server(_fake_files('cifar10')) as (url, _):
    fakes('cifar10', url)
    upstream.download('cifar10')
  assert 'cifar-10-binary.tar.gz' in sys.stderr.getvalue()
  assert '100' in sys.stderr.getvalue() or '━' in sys.stderr.getvalue()


def _same_length(handler, content):
  handler.send_response(200)
  handler.end_headers()
  handler.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))


def _too_long(handler, content):
  handler.send_response(200)
  handler.end_headers()
  handler.wfile.write(content + b'x' * 100)


def _cut_short(handler, content):
  handler.send_response(200)
  handler.send_header('Content-Length', str(len(content)))
  handler.end_headers()
  handler.wfile.write(content[: len(content) // 2])


def _not_found(handler, content):
  handler.send_error(404)


def _not_http(handler, content):
  handler.wfile.write(b'hello\r\n\r\n')


@pytest.mark.parametrize(
  'spoil, reason',
  [
    (_same_length, 'not the expected file (sha256 differs)'),
    (_too_long, 'not the expected file (sha256 differs)'),
    (_cut_short, 'ended after'),
    (_not_found, 'status 404'),
    (_not_http, 'hello'),
  ],
)
def test_spoilt_download_is_refused_at_once(spoil, reason, fakes, tmp_path):
  with _server(_fake_files('cifar10'), spoil) as (url, asked):
    fakes('cifar10', url)
    message = _refused('cifar10', tmp_path)
  assert reason in message and 'the download failed' in message
  assert f'{url}cifar-10-binary.tar.gz' in message
  assert len(asked) == 1  # One attempt.


def test_connection_refused(fakes, tmp_path):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  fakes('fashion_mnist', f'http://127.0.0.1:{port}/')
  start = time.monotonic()
  message = _refused('fashion_mnist', tmp_path)
  assert time.monotonic() - start < 5
  assert 'Connection refused' in message
  assert 'apt-get install dataset-fashion-mnist' in message


def test_unknown_host(fakes, tmp_path):
  fakes('mnist', 'http://no-such-host.invalid/')
  start = time.monotonic()
  message = _refused('mnist', tmp_path)
  assert time.monotonic() - start < upstream.CONNECT_SECONDS + 5
  assert 'apt-get' not in message


def test_no_answer(fakes, tmp_path, monkeypatch):
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


def test_stall_in_the_middle(fakes, tmp_path, monkeypatch):
  release = threading.Event()
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
  return root, d


def _again(root):
  return data.load('cifar10', data_dir=str(root), download=False)


def _equal(a, b):
  for key in ('train_images', 'train_labels', 'test_images', 'test_labels'):
    np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


def test_second_load_reads_the_cache_only(prepared, monkeypatch):
  root, first = prepared
  monkeypatch.setattr(prepare, '_one_at_a_time', None)  # No waiting either.
  monkeypatch.setattr(prepare, '_decode_once', None)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)  # No import.
  second = _again(root)
  _equal(first, second)
  assert second.train_labels.dtype == np.int32


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 1
  path.write_bytes(content)


def _empty(path):
  path.write_bytes(b'')


def _other_type(path):
  with np.load(path) as f:
    arrays = dict(f)
  arrays['train_labels'] = arrays['train_labels'].astype(np.int64)
  np.savez(path, **arrays)


def _other_shape(path):
  with np.load(path) as f:
    arrays = dict(f)
  arrays['test_images'] = arrays['test_images'][:-1]
  np.savez(path, **arrays)


def _bad_labels(path):
  with np.load(path) as f:
    arrays = dict(f)
  arrays['test_labels'][3] = 10
  np.savez(path, **arrays)


def _lacks_a_key(path):
  np.savez(path, train_images=np.zeros(3))


@pytest.mark.parametrize(
  'damage',
  [
    _truncate,
    _flip_a_bit,
    _empty,
    _other_type,
    _other_shape,
    _bad_labels,
    _lacks_a_key,
  ],
)
def test_damaged_cache_is_made_again(damage, prepared, capsys):
  root, first = prepared
  cache = root / 'cifar10' / 'pfs_jax_uint8.npz'
  good = cache.read_bytes()
  damage(cache)
  assert cache.read_bytes() != good
  _equal(first, _again(root))
  assert 'is damaged' in capsys.readouterr().err
  with np.load(cache) as stored:
    np.testing.assert_array_equal(stored['test_labels'], first.test_labels)
  _equal(first, _again(root))
  assert capsys.readouterr().err == ''


def test_cache_that_cannot_be_kept(prepared, monkeypatch, capsys):
  root, first = prepared
  (root / 'cifar10' / 'pfs_jax_uint8.npz').unlink()
  before = _tree(root)

  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(kept, 'write', refuse)
  _equal(first, _again(root))
  assert 'not kept' in capsys.readouterr().err
  assert _tree(root) == before


def _frame(record):
  """A TFRecord, with the checksums of tensorboardX's writer."""
  from tensorboardX import record_writer

  length = struct.pack('<Q', len(record))
  checks = (record_writer.masked_crc32c(v) for v in (length, record))
  first, second = (struct.pack('<I', c) for c in checks)
  return length + first + record + second


def test_tfrecord_prepared_by_others(prepared):
  """TFDS's usual format, which its own reader needs TensorFlow for."""
  root, first = prepared
  (root / 'cifar10' / 'pfs_jax_uint8.npz').unlink()
  folder = root / 'cifar10' / '3.0.2'
  builder = prepare._stock_builder('cifar10', root)
  for split in ('train', 'test'):
    records = list(prepare._records(builder, split))
    (old,) = folder.glob(f'*-{split}.*')
    new = old.with_name(old.name.replace('array_record', 'tfrecord'))
    new.write_bytes(b''.join(map(_frame, records)))
    old.unlink()
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  assert prepare._stock_builder('cifar10', root).info.file_format.value == (
    'tfrecord'
  )
  _equal(first, _again(root))
  (root / 'cifar10' / 'pfs_jax_uint8.npz').unlink()
  good = new.read_bytes()
  for bad, message in (
    (good[:-5], 'middle of a record'),
    (good[:1000] + bytes([good[1000] ^ 4]) + good[1001:], 'its checksum'),
  ):
    new.write_bytes(bad)
    with pytest.raises(errors.UserError, match=message):
      _again(root)


@pytest.mark.parametrize('what', ['train.array_record', 'dataset_info.json'])
def test_damaged_prepared_data(what, prepared):
  root, _ = prepared
  (root / 'cifar10' / 'pfs_jax_uint8.npz').unlink()
  (path,) = (root / 'cifar10' / '3.0.2').glob(f'*{what}*')
  path.write_bytes(b'{}' if what.endswith('json') else b'nonsense' * 1000)
  with pytest.raises(errors.UserError) as e:
    _again(root)
  message = str(e.value)
  assert len(message.splitlines()) <= 3
  assert str(root / 'cifar10' / '3.0.2') in message and 'Delete' in message


@pytest.mark.parametrize('bad', ['file', 'file/below', 'gs://bucket/data'])
def test_data_dir_that_cannot_be(bad, fakes, tmp_path):
  source = _folder(tmp_path / 'source', fakes('cifar10'))
  (tmp_path / 'file').write_text('')
  path = bad if '://' in bad else str(tmp_path / bad)
  with pytest.raises(errors.UserError, match=r'config\.data\.data_dir') as e:
    data.load('cifar10', data_dir=path, source_dir=source)
  assert path in str(e.value)


def test_default_data_dir(monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', '/some/where')
  assert prepare._root('') == pathlib.Path('/some/where')
  monkeypatch.delenv('TFDS_DATA_DIR')
  home = pathlib.Path.home()
  assert prepare._root('') == home / 'tensorflow_datasets'
  assert prepare._root('~/x') == home / 'x'


def test_failure_while_preparing_leaves_nothing(fakes, tmp_path, monkeypatch):
  source = _folder(tmp_path / 'source', fakes('cifar10'))

  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(prepare.os, 'rename', full)
  with pytest.raises(errors.UserError, match='No space left'):
    data.load('cifar10', data_dir=str(tmp_path / 'data'), source_dir=source)
  assert not [p for p in _tree(tmp_path / 'data') if p != 'cifar10']


def test_work_of_a_killed_process_is_cleared(fakes, tmp_path):
  source = _folder(tmp_path / 'source', fakes('cifar10'))
  left = tmp_path / 'data' / '.pfs_jax_cifar10_abc' / 'cifar10'
  left.mkdir(parents=True)
  data.load('cifar10', data_dir=str(tmp_path / 'data'), source_dir=source)
  assert os.listdir(tmp_path / 'data') == ['cifar10']


def test_second_of_two_without_locks_is_content(fakes, tmp_path, monkeypatch):
  """Both prepared; the later rename finds the place taken."""
  contents = fakes('cifar10')

  def no_locks(*args):
    raise OSError(38, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  facts = data.spec('cifar10')
  prepare._prepare(facts, tmp_path, contents)
  prepare._prepare(facts, tmp_path, contents)
  assert os.listdir(tmp_path) == ['cifar10']
  assert len(_again(tmp_path).train_labels) == TRAIN


def test_two_processes_at_once(fakes, tmp_path):
  """Both wait for our lock, then one prepares and both have the same."""
  source = _folder(tmp_path / 'source', fakes('cifar10'))
  root = tmp_path / 'data'
  root.mkdir()
  code = textwrap.dedent("""
    import hashlib, sys
    sys.path.insert(0, 'tests')
    import test_data
    from pfs_jax import data
    test_data._install('cifar10', test_data._fake_files('cifar10'))
    d = data.load('cifar10', data_dir=sys.argv[1], source_dir=sys.argv[2])
    print(hashlib.sha256(d.train_images.tobytes()).hexdigest())
    print('tensorflow_datasets' in sys.modules)
  """)
  command = [sys.executable, '-c', code, str(root), source]
  handle = os.open(root, os.O_RDONLY)
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for process in both:
      assert 'another process' in process.stderr.readline()
    assert os.listdir(root) == []
  finally:
    os.close(handle)
  outcomes = [process.communicate(timeout=60) for process in both]
  assert [process.returncode for process in both] == [0, 0], outcomes
  outs = [out.split() for out, _ in outcomes]
  assert outs[0][0] == outs[1][0]
  # The second one found the cache made.
  assert sorted(out[1] for out in outs) == ['False', 'True']
  assert sum(err.count('preparing') for _, err in outcomes) == 1
  assert os.listdir(root) == ['cifar10']
