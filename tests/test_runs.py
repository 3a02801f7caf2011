"""A run's folder: what survives crashes, damage, signals, other devices."""

import json
import logging
import shutil
import signal
import subprocess
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pfs_jax import checkpointing, devices, errors, runs, storage
from tests import own_models, processes


class State(flax.struct.PyTreeNode):
  """As training and search have one: counters, arrays, optimiser, statics."""

  step: jax.Array
  params: Any
  opt_state: Any
  label: str = flax.struct.field(pytree_node=False)


def make_state(seed):
  """A state on all devices; other numbers for another seed."""
  rng = np.random.default_rng(seed)
  params = {
    'conv': {'kernel': rng.normal(size=(3, 3, 4, 40)).astype(np.float32)},
    'bias': rng.normal(size=16).astype(np.float32),
  }
  opt_state = optax.sgd(0.1, 0.9).init(jax.tree.map(jnp.asarray, params))
  opt_state = jax.tree.map(lambda v: v + 0.1 * seed, opt_state)
  step = jnp.asarray(seed, jnp.int32)
  return devices.replicate(State(step, params, opt_state, 'static'))


def save(folder, *steps):
  """Checkpoints whose numbers follow from the step."""
  with checkpointing.Checkpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step))


def restore(folder):
  """(step, state) or None, into a target of other numbers."""
  with checkpointing.Checkpoints(folder) as checkpoints:
    found = checkpoints.restore(make_state(99))
    return found and found[:2]


def assert_restored(folder, step):
  found, state = restore(folder)
  assert found == step
  own_models.assert_same(state, make_state(step))


def test_parameters_of_16_bits_are_restored(tmp_path):
  state = {'x': jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3) / 7}
  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    _, found, _ = checkpoints.restore(devices.replicate(state))
  own_models.assert_same(found, state)


def kept_steps(folder):
  return sorted(int(p.name) for p in (folder / 'checkpoints').iterdir())


def test_the_two_newest_are_kept_with_their_types_and_bytes(tmp_path):
  assert restore(tmp_path) is None
  for last in (1, 2, 3, 4, 10):
    save(tmp_path, last)
    assert kept_steps(tmp_path)[-1] == last
    assert len(kept_steps(tmp_path)) <= 2
  assert kept_steps(tmp_path) == [4, 10]
  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(10, make_state(11))  # A saved step is not written again.
  assert_restored(tmp_path, 10)
  state = restore(tmp_path)[1]
  assert isinstance(state, State) and state.label == 'static'
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding == devices.replicated()


def _flip(content):
  found = bytearray(content)
  found[len(content) // 2] ^= 0x10
  return bytes(found)


DAMAGES = {
  'deleted': None,
  'emptied': lambda content: b'',
  'cut in half': lambda content: content[: len(content) // 2],
  'one bit flipped': _flip,
}


def _damage(path, kind):
  if DAMAGES[kind] is None:
    path.unlink()
  else:
    path.write_bytes(DAMAGES[kind](path.read_bytes()))


@pytest.mark.parametrize('kind', DAMAGES)
def test_any_damaged_file_leads_to_a_good_state(tmp_path, kind):
  save(tmp_path / 'whole', 1, 2)
  newest = tmp_path / 'whole' / 'checkpoints' / '2'
  files = [p for p in sorted(newest.rglob('*')) if p.is_file()]
  assert {'state.npz', 'check.json'} < {p.name for p in files}
  found = []
  for path in files:
    damaged = tmp_path / 'damaged'
    shutil.copytree(tmp_path / 'whole', damaged)
    _damage(damaged / path.relative_to(tmp_path / 'whole'), kind)
    step, state = restore(damaged)
    own_models.assert_same(state, make_state(step))
    found.append(step)
    shutil.rmtree(damaged)
  # Some files matter and some do not.
  assert set(found) == {1, 2}


def test_a_checkpoint_that_may_not_be_read_is_kept(tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(13, 'Permission denied', str(path))

  save(tmp_path, 1, 2)
  monkeypatch.setattr(storage.pathlib.Path, 'read_bytes', refuse)
  with pytest.raises(PermissionError, match='2/default/state.npz'):
    restore(tmp_path)
  assert kept_steps(tmp_path) == [1, 2]


def test_a_renamed_checkpoint_is_no_newer_one(tmp_path):
  save(tmp_path, 1, 2)
  folder = tmp_path / 'checkpoints'
  shutil.copytree(folder / '1', folder / '3')
  assert restore(tmp_path)[0] == 2
  with checkpointing.Checkpoints(tmp_path, read_only=True) as checkpoints:
    with pytest.raises(errors.UserError, match='checkpoint 3 does not match'):
      checkpoints.restore_step(make_state(99), 3)
    with pytest.raises(errors.UserError, match='checkpoint 4 is missing'):
      checkpoints.restore_step(make_state(99), 4)
    state = checkpoints.restore_step(make_state(99), 2)
  own_models.assert_same(state, make_state(2))


def state_file(folder, step):
  return folder / 'checkpoints' / str(step) / 'default' / 'state.npz'


def test_another_weight_is_caught_by_the_checksum(tmp_path, caplog):
  save(tmp_path, 1, 2)
  path = state_file(tmp_path, 2)
  arrays = storage.read_arrays(path)
  arrays['1'] = arrays['1'] + 1
  storage.write_arrays(path, arrays)
  with caplog.at_level(logging.WARNING):
    assert_restored(tmp_path, 1)
  assert 'checkpoint 2 does not match its checksum' in caplog.text


def test_no_good_checkpoint_is_a_user_error(tmp_path, refused):
  save(tmp_path, 1, 2)
  for step in (1, 2):
    shutil.rmtree(tmp_path / 'checkpoints' / str(step) / 'default')
  refused(r'\(steps 2, 1\); delete that', restore, tmp_path)
  assert kept_steps(tmp_path) == [1, 2]  # Deleting is the user's to do.


@pytest.mark.parametrize('steps', [(2,), (3,), (4, 5, 6)])
def test_going_on_after_damage_replaces_what_is_bad(tmp_path, steps):
  save(tmp_path, 1, 3)
  _damage(state_file(tmp_path, 3), 'cut in half')
  assert restore(tmp_path)[0] == 1
  assert kept_steps(tmp_path) == [1, 3]  # Reading deletes nothing.
  with checkpointing.Checkpoints(tmp_path) as checkpoints:
    checkpoints.restore(make_state(99))
    for step in steps:
      checkpoints.save(step, make_state(step))
  assert_restored(tmp_path, steps[-1])


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
  save(tmp_path, 1)
  folder = tmp_path / 'checkpoints'
  shutil.copytree(folder / '1', folder / '2.orbax-checkpoint-tmp')
  save(tmp_path, 2)
  assert restore(tmp_path)[0] == 2
  assert kept_steps(tmp_path) == [1, 2]


def check_on_eight_devices(folder):
  assert jax.device_count() == 8
  assert_restored(folder, 1)
  for leaf in jax.tree.leaves(restore(folder)[1]):
    assert len(leaf.sharding.device_set) == 8
  save(folder, 2)


def test_checkpoints_move_between_device_counts(tmp_path):
  save(tmp_path, 1)
  code = f"""
    import pathlib
    from tests import test_runs
    test_runs.check_on_eight_devices(pathlib.Path({str(tmp_path)!r}))
    """
  processes.output(code, devices=8)
  assert jax.device_count() == 1
  assert_restored(tmp_path, 2)
  jax.jit(lambda s: s.params['bias'] + 1)(restore(tmp_path)[1])  # It is here.


def test_checksum_sees_every_leaf_and_their_order():
  a, b = np.arange(3.0), np.arange(3.0) + 1
  sums = [storage.checksum(t) for t in ([a, b], [b, a], [a], [a, b + 1e-9])]
  assert len(set(sums)) == 4
  single = np.arange(3, dtype=np.float32)
  alone = [jnp.asarray(single)]
  assert storage.checksum({'x': single}) == storage.checksum(alone)
  # As `sha256sum` says of the file of these bytes.
  assert storage.checksum(np.zeros(0)) == (
    'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
  )


def test_what_is_written_is_read_and_leaves_no_other_file(tmp_path):
  folder = tmp_path / 'new'
  storage.write_json(folder / 'x.json', {'a': [1, 2]})
  with pytest.raises(TypeError):
    storage.write_json(folder / 'x.json', {'a': object()})
  assert storage.read_json(folder / 'x.json') == {'a': [1, 2]}
  arrays = {'stem/conv': np.arange(3.0), 'a': np.ones(2, np.float32)}
  storage.write_arrays(folder / 'x.npz', arrays)
  found = storage.read_arrays(folder / 'x.npz')
  assert list(found) == list(arrays)  # In the order of writing.
  for name, value in arrays.items():
    np.testing.assert_array_equal(found[name], value, strict=True)
  assert {p.name for p in folder.iterdir()} == {'x.json', 'x.npz'}


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
  path = tmp_path / 'x.json'
  storage.write_json(path, 'old')
  seen = []
  replace = storage.os.replace

  def watched(source, target):
    seen.append((storage.read_json(path), json.loads(source.read_text())))
    replace(source, target)

  monkeypatch.setattr(storage.os, 'replace', watched)
  storage.write_json(path, 'new')
  assert seen == [('old', 'new')] and storage.read_json(path) == 'new'


@pytest.mark.parametrize(
  'content, reason',
  [
    (b'', 'truncated'),
    (b'{"a": 1', 'truncated'),
    (b'\xff', 'malformed'),
    (b'"\xff"', 'not UTF-8'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'out of range'),
    (b'{"a": NaN}', 'malformed'),
  ],
)
def test_broken_json_is_a_user_error(tmp_path, content, reason, refused):
  path = tmp_path / 'x.json'
  path.write_bytes(content)
  e = refused(rf'x\.json: .*{reason}', storage.read_json, path)
  assert '\n' not in str(e)


def test_only_files_are_read(tmp_path, refused):
  refused('it is not a file', storage.read_json, tmp_path)
  storage.os.mkfifo(tmp_path / 'pipe')  # Reading one would wait for ever.
  refused('it is not a file', storage.read_json, tmp_path / 'pipe')
  (tmp_path / 'x').write_text('12345')
  refused('5 bytes; at most 4', storage.read_bytes, tmp_path / 'x', largest=4)


def test_a_sealed_file_that_was_changed_is_refused(tmp_path, refused):
  path = tmp_path / 'x.json'
  storage.write_json(path, 1, sealed=True)
  storage.write_json(tmp_path / 'y.json', 2, sealed=True)
  assert storage.read_json(path) == 1
  path.write_text('3\n')
  refused('x.json is damaged or was chan', storage.read_json, path)
  assert storage.read_json(tmp_path / 'y.json') == 2
  path.write_text('1\n')
  assert storage.read_json(path) == 1
  (tmp_path / 'checksums.json').write_text('{"x.json": 1}')
  refused('checksums.json: Expected `str`', storage.read_json, path)


def test_a_crash_leaves_no_seal_that_is_wrong(tmp_path, monkeypatch):
  """Whichever rename is the last one, the file can be read."""
  path, replace = tmp_path / 'x.json', storage.os.replace
  seen = set()
  for last in range(5):
    storage.write_json(path, 'old', sealed=True)
    left = [last]

    def crash(source, target, left=left):
      if not left[0]:
        raise KeyboardInterrupt
      left[0] -= 1
      replace(source, target)

    monkeypatch.setattr(storage.os, 'replace', crash)
    try:
      storage.write_json(path, 'new', sealed=True)
    except KeyboardInterrupt:
      pass
    monkeypatch.setattr(storage.os, 'replace', replace)
    seen.add(storage.read_json(path))
  assert seen == {'old', 'new'}


def test_what_is_there_already_is_not_written(tmp_path, monkeypatch):
  def refuse(*_):
    raise AssertionError

  path = tmp_path / 'x.npz'
  storage.write_arrays(path, {'a': np.arange(3.0)}, sealed=True)
  monkeypatch.setattr(storage.os, 'replace', refuse)
  storage.write_arrays(path, {'a': np.arange(3.0)}, sealed=True)
  with pytest.raises(AssertionError):
    storage.write_arrays(path, {'a': np.arange(4.0)}, sealed=True)


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(_):
    raise OSError(28, 'No space left on device')

  path = tmp_path / 'x.json'
  storage.write_json(path, 'old')
  monkeypatch.setattr(storage.os, 'fsync', full)
  said = (
    r'x\.json cannot be written: No space left on device: [\d,]+ bytes are f'
  )
  with pytest.raises(errors.UserError, match=said):
    storage.write_json(path, 'new')
  assert [p.name for p in tmp_path.iterdir()] == ['x.json']
  assert storage.read_json(path) == 'old'


ARRAYS = {'a': np.ones(2), 'b': np.ones(3)}


@pytest.mark.parametrize(
  'arrays, message',
  [
    ({'a': np.ones(2)}, r'a, b in this order; got a\.'),
    ({**ARRAYS, 'c': np.ones(1)}, r'a, b in this order; got a, b, c\.'),
    (dict(reversed(ARRAYS.items())), r'a, b in this order; got b, a\.'),
    ({**ARRAYS, 'b': np.ones((3, 1))}, r'b must be .* got float64 \[3, 1\]'),
    ({**ARRAYS, 'b': np.array(['x'] * 3)}, 'b must be finite floats'),
    ({**ARRAYS, 'b': np.full(3, np.nan)}, 'not all finite'),
  ],
)
def test_arrays_must_be_what_is_expected(tmp_path, arrays, message, refused):
  shapes = {'a': (2,), 'b': (3,)}
  storage.write_arrays(tmp_path / 'x.npz', ARRAYS)
  assert list(storage.read_arrays(tmp_path / 'x.npz', shapes)) == ['a', 'b']
  storage.write_arrays(tmp_path / 'x.npz', arrays)
  refused(message, storage.read_arrays, tmp_path / 'x.npz', shapes)


def test_files_that_cannot_be_read_are_user_errors(tmp_path, refused):
  for read in (storage.read_json, storage.read_arrays):
    refused(r'none does not exist\.$', read, tmp_path / 'none')
  storage.write_arrays(tmp_path / 'cut.npz', {'a': np.arange(100.0)})
  _damage(tmp_path / 'cut.npz', 'cut in half')
  np.savez(tmp_path / 'pickle.npz', a=np.array([{}], object))
  for name in ('cut.npz', 'pickle.npz'):
    refused(f'{name} cannot be read', storage.read_arrays, tmp_path / name)


def test_versions_name_what_a_run_ran_with():
  found = runs.versions()
  assert found['jax'] == jax.__version__
  assert found['hardware'].startswith('1 x ') and ' cores' in found['hardware']
  assert set(found) > {'commit', 'python', 'flax', 'optax', 'numpy'}


IDENTITY = {'config.seed': 0, 'config.budget.keep': (0.5, 0.3), 'config.x': 'a'}


def test_another_identity_is_refused_by_what_differs(tmp_path, refused):
  for _ in range(2):
    runs.claim(tmp_path, IDENTITY)
  other = {**IDENTITY, 'config.seed': 1, 'config.new': 2}
  seed = r'config.seed \(there 0, asked 1\)'
  message = str(refused(seed, runs.claim, tmp_path, other))
  assert 'config.new (there None, asked 2)' in message
  assert 'keep' not in message and 'config.x' not in message
  fewer = {k: v for k, v in IDENTITY.items() if k != 'config.x'}
  refused(r"config\.x \(there 'a'", runs.claim, tmp_path, fewer)
  # Fields at their default and fields that no result depends on may be absent.
  plain = {'config.dtype': 'float32', 'config.data.corrupt': 'skip'}
  runs.claim(tmp_path / 'more', {**IDENTITY, **plain})
  runs.claim(tmp_path / 'more', IDENTITY)
  other = {**IDENTITY, 'config.dtype': 'bfloat16'}
  dtype = r"config.dtype \(there 'float32', asked 'bfloat16'\)"
  refused(dtype, runs.claim, tmp_path / 'more', other)
  # An older folder does not say what these were.
  later = {'config.train.statistics': 'estimated'}
  runs.claim(tmp_path, {**IDENTITY, **later})
  runs.claim(tmp_path / 'new', {**IDENTITY, **later})
  later['config.train.statistics'] = 'auto'
  refused('statistics', runs.claim, tmp_path / 'new', {**IDENTITY, **later})
  many = {f'f{i}': 0 for i in range(6)}
  refused('and 2 more', runs.claim, tmp_path, {**IDENTITY, **many})
  runs.claim(tmp_path, IDENTITY)  # Still the first one's.


def test_only_claims_without_work_are_given_back(tmp_path):
  """A refused command removes its own claims, and no other run's or work."""
  parts = ('mine/search', 'mine/train', 'mine/gone', 'other/search')
  refusal = pytest.raises(errors.UserError)
  with refusal, runs.giving_back(tmp_path / 'mine'):
    for part in parts:
      runs.claim(tmp_path / part, IDENTITY)
    shutil.rmtree(tmp_path / 'mine' / 'gone')
    (tmp_path / 'mine' / 'train' / 'metrics.jsonl').touch()
    raise errors.UserError('no')
  left = {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob('*.json')}
  assert left == {'mine/train', 'other/search'}


def test_a_folder_that_cannot_be_is_a_user_error(tmp_path, refused):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot be used'):
    storage.locked(tmp_path / 'file' / 'run').__enter__()
  refused('must be a path in UTF-8', save, tmp_path / '\udce9', 1)


def _write_metrics(folder, resume_step, steps, **scalars):
  log = runs.MetricsLog(folder, resume_step)
  for step in steps:
    log.write(step, loss=float(step), **scalars)
  log.close()


def _steps(folder):
  return [r['step'] for r in runs.read_metrics(folder)]


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path):
  _write_metrics(tmp_path, 0, [10, 20, 30])
  _write_metrics(tmp_path, 20, [30, 40], new=1.0)
  assert _steps(tmp_path) == [10, 20, 30, 40]
  found = [r.get('new') for r in runs.read_metrics(tmp_path)]
  assert found == [None, None, 1.0, 1.0]
  _write_metrics(tmp_path, 0, [5])  # A fresh log forgets all.
  assert _steps(tmp_path) == [5]


@pytest.mark.parametrize('torn', ['{"step": 3', '{"st', '{', '{"step": 30, '])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
  _write_metrics(tmp_path, 0, [10, 20])
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write(torn)
  assert _steps(tmp_path) == [10, 20]
  _write_metrics(tmp_path, 30, [40])
  assert _steps(tmp_path) == [10, 20, 40]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [10, 20, 40]


def test_a_record_is_on_disk_at_once(tmp_path):
  log = runs.MetricsLog(tmp_path, 0)
  log.write(1, loss=0.5)
  assert runs.read_metrics(tmp_path) == [{'step': 1, 'loss': 0.5}]
  (events,) = (tmp_path / 'events').iterdir()
  assert b'loss' in events.read_bytes()
  log.close()


def test_the_clock_goes_on_where_the_log_ends(tmp_path):
  assert runs.Clock(tmp_path).seconds() < 60
  _write_metrics(tmp_path, 0, [1, 2], seconds=2000.0)
  clock = runs.Clock(tmp_path)
  first = clock.seconds()
  assert 2000 <= first < 2060
  time.sleep(0.02)
  assert first + 0.02 <= clock.seconds() + 1e-3 < 2120


def test_a_second_signal_ends_the_process():
  done = processes.run(
    """
    import os, signal, time
    from pfs_jax import runs
    with runs.StopSignal() as stop:
      os.kill(os.getpid(), signal.SIGTERM)
      while stop.number is None:  # Another thread may have got it.
        time.sleep(0.001)
      print('caught', stop.number, flush=True)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(20)
      print('still here')
    """
  )
  assert done.stdout == 'caught 15\n'
  assert done.returncode == -signal.SIGINT


def test_results_make_no_commit_dirty(tmp_path, monkeypatch):
  """A study writes into the checkout while it runs."""

  def git(*args):
    who = ('-c', 'user.name=t', '-c', 'user.email=t@example.org')
    line = ['git', *who, *args]
    return subprocess.check_output(line, cwd=tmp_path, text=True)

  files = ('pfs_jax/runs.py', 'configs/a.py', 'results/a.json', 'main.py')
  for path in map(tmp_path.joinpath, files):
    path.parent.mkdir(exist_ok=True)
    path.write_text('1')
  git('init', '-q')
  git('add', '.')
  git('commit', '-qm', 'All')
  monkeypatch.setattr(runs, '__file__', str(tmp_path / files[0]))
  clean = runs.commit.__wrapped__()
  assert clean == git('rev-parse', '--short=12', 'HEAD').strip()
  (tmp_path / 'results' / 'a.json').write_text('2')
  assert runs.commit.__wrapped__() == clean
  (tmp_path / 'main.py').write_text('2')
  assert runs.commit.__wrapped__() == f'{clean}-dirty'
  inside = tmp_path / 'venv' / 'pfs_jax'  # In the checkout of something else.
  inside.mkdir(parents=True)
  monkeypatch.setattr(runs, '__file__', str(inside / 'runs.py'))
  assert runs.commit.__wrapped__() == ''
