"""A run that was killed and continued is bit-equal to one left alone.

A finished run is only read, and damage to it is refused.
"""

import math
import pathlib
import random
import shutil
import signal

import numpy as np
import pytest

from benchmarks import damage, faults
from pfs_jax import errors, loading, runs, stages, storage
from pfs_jax.models import registry
from tests import processes, small_run


def execute(mode, workdir, **more):
  """Runs a mode in this process."""
  stages.execute(mode, stages.Job(small_run.config(**more), workdir))


def stop_at(mode, workdir, stage, step, number):
  """Starts a mode and sends a signal once a step is logged; its end."""
  process = processes.start(small_run.arguments(mode, workdir))

  def logged():
    records = runs.read_metrics(workdir / stage)
    return records and records[-1]['step'] >= step

  process.wait_for(logged)
  process.send_signal(number)
  return process.finish(60)


@pytest.mark.slow
def test_sigkill_at_random_points(finished_run, tmp_path):
  rng, workdir = random.Random(11), tmp_path / 'w'
  for stage, last in (('search', 32), ('train', 40)):
    step = rng.randrange(8, last)
    done = stop_at('run', workdir, stage, step, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, f'{stage} ended before {step}'
  processes.output(small_run.arguments('run', workdir))
  faults.same(workdir, finished_run)
  again, once = (w / 'structure.json' for w in (workdir, finished_run))
  assert again.read_text() == once.read_text()


def test_ctrl_c_saves_and_leaves(finished_run, tmp_path):
  """SIGTERM does so in test_devices.py."""
  done = stop_at('search', tmp_path, 'search', 7, signal.SIGINT)
  assert done.returncode == 128 + signal.SIGINT
  assert 'saved. The same command continues.' in done.stderr
  assert 'Traceback' not in done.stderr and done.stderr.count('\n') == 1
  processes.output(small_run.arguments('search', tmp_path))
  for name, expected in np.load(finished_run / 'search' / 'gates.npz').items():
    found = storage.read_arrays(tmp_path / 'search' / 'gates.npz')[name]
    np.testing.assert_array_equal(found, expected, strict=True)


def test_a_finished_run_is_only_read(finished, capsys, monkeypatch, refused):
  """By some modes even while another process is at work there."""
  monkeypatch.delattr(registry, '_compiled_init')  # Drawing weights takes long.

  def written():
    files = (p for p in finished.rglob('*') if p.is_file())
    return {p: p.stat().st_mtime_ns for p in files if p.name != '.lock'}

  def shown(mode):
    execute(mode, finished)
    return capsys.readouterr().out

  before = written()
  for mode in ('run', 'train'):
    out = shown(mode)
    assert 'test accuracy' in out and 'steps/s' not in out
    assert '(keep0.5)' in out
  with storage.locked(finished):
    for mode in ('run', 'search', 'prune', 'train'):
      refused('in use by another process', execute, mode, finished)
    result = storage.read_json(finished / 'result.json')
    assert set(result['search']) == {'lowest_ce', 'chance_ce', 'left_chance'}
    assert result['search']['chance_ce'] == math.log(10)
    assert result['warnings'] == []
    correct = round(result['test_accuracy'] * 297)
    assert f'({correct} of 297 images)' in shown('eval')
    assert 'floor' in shown('info')
  assert written() == before


def test_the_gates_are_those_of_the_selected_step(finished, monkeypatch):
  saved = sorted((finished / 'search' / 'gates').glob('*.npz'))
  first, last = (storage.read_arrays(path) for path in saved[:: len(saved) - 1])
  step = int(saved[0].stem)
  monkeypatch.setattr(stages.searching.search, 'select', lambda *_: step)
  for name in ('search/gates.npz', 'result.json'):
    (finished / name).unlink()
  shutil.rmtree(finished / 'train')
  execute('search', finished)
  found = storage.read_arrays(finished / 'search' / 'gates.npz')
  for name, expected in first.items():
    np.testing.assert_array_equal(found[name], expected)
    assert (expected != last[name]).any()


def test_no_search_is_made_for_a_ranking_that_needs_none(tmp_path):
  execute('run', tmp_path, budget__ranking='uniform', train__epochs=0.1)
  assert (tmp_path / 'result.json').exists()
  assert not (tmp_path / 'search').exists()


def test_a_reference_can_be_added_later(finished, capsys):
  before = storage.read_json(finished / 'result.json')
  execute('train', finished, train__reference=True)
  after = storage.read_json(finished / 'result.json')
  assert f'{after["reference_test_accuracy"]:.2%}' in capsys.readouterr().out
  assert after['latency'].pop('reference_ms') > 0
  assert after == before | {
    'reference_test_accuracy': after['reference_test_accuracy']
  }
  execute('train', finished)  # It stays.
  assert f'{after["reference_test_accuracy"]:.2%}' in capsys.readouterr().out


def test_the_table_names_the_winner_of_a_tournament(finished, capsys):
  path = finished / 'structure.json'
  found = storage.read_json(path)
  found['source']['tournament'] = {'chosen': 'tilt1'}
  storage.write_json(path, found)
  execute('train', finished)
  assert "(keep0.5, the widths of 'tilt1' by a" in capsys.readouterr().out


def test_no_older_state_stands_for_a_damaged_last_one(finished, monkeypatch):
  """What needs the last one says how to repair it."""
  monkeypatch.delattr(registry, '_compiled_init')
  checkpoints = (finished / 'train/checkpoints').iterdir()
  last = max(checkpoints, key=lambda path: int(path.name))
  path = last / 'default' / 'state.npz'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  for use in (
    lambda: execute('eval', finished),
    lambda: execute('export', finished),
    lambda: loading.load(finished),
  ):
    with pytest.raises(errors.UserError, match='Delete .*result.json and run'):
      use()


@pytest.mark.parametrize(
  'mode, field, value',
  [
    ('search', 'search.sparsity', 0.3),
    ('train', 'train.learning_rate', 0.2),
    ('train', 'seed', 3),
    ('eval', 'train.batch_size', 32),
    ('prune', 'model.width', 7),
  ],
)
def test_another_config_is_refused(finished, refused, mode, field, value):
  refused(f'config.{field}', execute, mode, finished, **{field: value})


# (a mode without a program to compile, a file that it reads, a damage).
DAMAGED = [
  ('run', 'result.json', 'a number changed'),
  ('run', 'search/gates.npz', 'a bit flipped'),
  ('run', 'search/metrics.jsonl', 'truncated'),
  ('run', 'structure.json', 'a value nested'),
  ('train', 'result.json', 'a field dropped'),
  ('train', 'structure.json', 'a value of another type'),
  ('train', 'checksums.json', 'deleted'),
  ('train', 'train/config.json', 'a number changed'),
  ('prune', 'search/gates.npz', 'overwritten with zeros'),
  ('prune', 'search/config.json', 'swapped'),
  ('prune', 'search/checksums.json', 'a folder in its place'),
  ('prune', 'kept.json', 'a number changed'),
  ('info', 'budget.txt', 'a bit flipped'),
  ('info', 'checksums.json', 'a value of another type'),
]


@pytest.fixture(scope='module')
def answers():
  return {}


@pytest.mark.parametrize('mode, file, kind', DAMAGED)
def test_damage_gives_the_same_numbers_or_a_refusal(
  finished_run, answers, tmp_path, mode, file, kind
):
  c = small_run.config()
  if mode not in answers:
    whole = shutil.copytree(finished_run, tmp_path / 'whole')
    answers[mode] = damage.answer(mode, c, whole)
    assert not isinstance(answers[mode], errors.UserError)
  given = (mode, finished_run, tmp_path / 'w', c, answers[mode])
  found = damage.check(*given, pathlib.Path(file), kind, seed='0')
  assert found != 'not done'
