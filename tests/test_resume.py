"""A run that was killed and continued is bit-equal to one left alone."""

import json
import random
import signal
import time

import numpy as np
import pytest

from pfs_jax import runs, storage
from tests import processes, small_run


def run(mode, workdir, *more):
  """What a command that must succeed printed."""
  return processes.output(small_run.arguments(mode, workdir, *more))


def steps_done(folder):
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return 0
  lines = [line for line in path.read_text().splitlines() if line]
  return json.loads(lines[-1])['step'] if lines else 0


def stop_at(mode, workdir, stage, step, number):
  """Starts a mode and sends a signal once a step is logged; its end."""
  process = processes.start(small_run.arguments(mode, workdir))
  deadline = time.monotonic() + 120
  while process.poll() is None and time.monotonic() < deadline:
    if steps_done(workdir / stage) >= step:
      process.send_signal(number)
      break
    time.sleep(0.005)
  return process.finish(60)


def metrics(folder):
  """The metrics log without its times."""
  records = runs.read_metrics(folder)
  return [{k: v for k, v in r.items() if k != 'seconds'} for r in records]


def outcome(workdir):
  """Everything that must be equal to the last bit."""
  result = json.loads((workdir / 'result.json').read_text())
  arrays = storage.read_arrays(workdir / 'search' / 'gates.npz')
  checkpoints = (workdir / 'train' / 'checkpoints').iterdir()
  last = max(checkpoints, key=lambda path: int(path.name))
  return {
    'gates': {k: v.tobytes() for k, v in arrays.items()},
    'structure': (workdir / 'structure.json').read_text(),
    'accuracy': result['test_accuracy'],
    'weights': (last / 'default' / 'check.json').read_text(),
  }


@pytest.mark.slow
def test_sigkill_at_random_points(finished_run, tmp_path):
  rng, workdir = random.Random(11), tmp_path / 'w'
  for stage, last in (('search', 32), ('train', 40)):
    step = rng.randrange(8, last)
    done = stop_at('run', workdir, stage, step, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, f'{stage} ended before {step}'
  run('run', workdir)
  assert outcome(workdir) == outcome(finished_run)
  for stage in ('search', 'train'):
    assert metrics(workdir / stage) == metrics(finished_run / stage)


@pytest.mark.parametrize(
  'number',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_leaves(finished_run, tmp_path, number):
  workdir = tmp_path / 'w'
  done = stop_at('search', workdir, 'search', 7, number)
  assert done.returncode == 128 + number
  assert 'saved. The same command continues.' in done.stderr
  assert 'Traceback' not in done.stderr and done.stderr.count('\n') == 1
  run('search', workdir)
  for name, expected in np.load(finished_run / 'search' / 'gates.npz').items():
    found = storage.read_arrays(workdir / 'search' / 'gates.npz')[name]
    np.testing.assert_array_equal(found, expected, strict=True)


def test_a_finished_run_prints_its_table(finished):
  before = {p: p.stat().st_mtime for p in finished.rglob('*.npz')}
  out = run('run', finished)
  assert 'test accuracy' in out and 'steps/s' not in out
  assert {p: p.stat().st_mtime for p in finished.rglob('*.npz')} == before


def test_eval_restores(finished):
  result = json.loads((finished / 'result.json').read_text())
  correct = round(result['test_accuracy'] * 297)
  assert f'({correct} of 297 images)' in run('eval', finished)


def test_another_budget_needs_no_search(finished):
  gates = finished / 'search' / 'gates.npz'
  before = gates.stat().st_mtime
  first = json.loads((finished / 'structure.json').read_text())
  more = '--config.budget.keep=0.8'
  run('prune', finished, more)
  found = json.loads((finished / 'keep0.8' / 'structure.json').read_text())
  assert first['macs'] < found['macs'] <= found['budget']['max_macs']
  assert gates.stat().st_mtime == before
  run('train', finished, more, '--config.train.epochs=1')
  results = [
    json.loads((finished / name).read_text())['macs']
    for name in ('result.json', 'keep0.8/result.json')
  ]
  assert results == [first['macs'], found['macs']]


def test_a_structure_from_any_file(finished_run, tmp_path):
  path = finished_run / 'structure.json'
  structure, epochs = (
    f'--config.train.structure={path}',
    '--config.train.epochs=1',
  )
  assert 'test accuracy' in run('train', tmp_path / 'w', structure, epochs)
  result = json.loads((tmp_path / 'w' / 'result.json').read_text())
  assert result['counts'] == json.loads(path.read_text())['counts']


@pytest.mark.parametrize(
  'mode,change,named',
  [
    ('search', '--config.search.sparsity=0.3', 'config.search.sparsity'),
    ('train', '--config.train.learning_rate=0.2', 'config.train.learning_rate'),
    ('train', '--config.seed=3', 'config.seed'),
    ('eval', '--config.train.batch_size=32', 'config.train.batch_size'),
    ('prune', '--config.model.width=4', 'config.model.width'),
  ],
)
def test_another_config_is_refused(finished, mode, change, named):
  done = processes.run(small_run.arguments(mode, finished, change))
  assert done.returncode == 2
  assert named in done.stderr and len(done.stderr.splitlines()) <= 3


def test_a_second_process_is_refused(finished):
  with storage.locked(finished):
    done = processes.run(small_run.arguments('run', finished))
  assert done.returncode == 2
  assert 'in use by another process' in done.stderr
