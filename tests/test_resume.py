"""A run that was killed and continued is bit-equal to one left alone."""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from tests import processes

ARGS = [
  'main.py',
  '--config=configs/digits.py',
  '--config.model.base_width=2',
  '--config.model.width=3',
  '--config.search.epochs=3',
  '--config.train.epochs=4',
  '--config.train.reference=False',
  '--config.checkpoint_steps=5',
  '--config.log_steps=5',
]


# XLA's optimisations cost more here than they win.
FAST = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def command(mode, workdir):
  return [*ARGS, f'--mode={mode}', f'--workdir={workdir}']


def output(arguments):
  return processes.output(arguments, timeout=300, env=FAST)


def steps_done(folder):
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return 0
  lines = [line for line in path.read_text().splitlines() if line]
  return json.loads(lines[-1])['step'] if lines else 0


def stop_at(mode, workdir, stage, step, number):
  """Starts a mode and sends a signal once a step is logged; its exit code."""
  process = subprocess.Popen(
    processes.command(command(mode, workdir)),
    env=processes.environment(**FAST),
    cwd=processes.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 120
  while process.poll() is None and time.monotonic() < deadline:
    if steps_done(workdir / stage) >= step:
      os.kill(process.pid, number)
      break
    time.sleep(0.005)
  _, err = process.communicate(timeout=60)
  return process.returncode, err


def metrics(folder):
  """The metrics log without its times."""
  records = []
  for line in (folder / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    record.pop('seconds', None)
    records.append(record)
  return records


def outcome(workdir):
  """Everything that must be equal to the last bit."""
  result = json.loads((workdir / 'result.json').read_text())
  arrays = np.load(workdir / 'search' / 'gates.npz')
  check = next((workdir / 'train' / 'checkpoints').glob('9*/check/*'), None)
  return {
    'gates': {k: arrays[k].tobytes() for k in arrays},
    'structure': (workdir / 'structure.json').read_text(),
    'accuracy': result['test_accuracy'],
    'weights': check.read_text() if check else None,
  }


@pytest.fixture(scope='module')
def untouched(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'untouched'
  output(command('run', workdir))
  return workdir


def test_sigkill_at_random_points(untouched, tmp_path):
  rng = random.Random()
  for stage, last in (('search', 50), ('train', 80)):
    step = rng.randrange(5, last)
    code, _ = stop_at('run', tmp_path / 'w', stage, step, signal.SIGKILL)
    assert code == -signal.SIGKILL, f'{stage} was over before step {step}'
    time.sleep(0.1)
  output(command('run', tmp_path / 'w'))
  expected, found = outcome(untouched), outcome(tmp_path / 'w')
  assert expected['weights'] is not None
  assert found == expected
  for stage in ('search', 'train'):
    last = metrics(untouched / stage)[-1]
    assert metrics(tmp_path / 'w' / stage)[-1] == last


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(untouched, tmp_path, number):
  workdir = tmp_path / 'w'
  code, err = stop_at('search', workdir, 'search', 7, number)
  assert code == 128 + number
  assert 'saved. The same command continues.' in err
  assert 'Traceback' not in err and err.count('\n') == 1
  output(command('search', workdir))
  arrays = np.load(workdir / 'search' / 'gates.npz')
  expected = outcome(untouched)['gates']
  assert {k: arrays[k].tobytes() for k in arrays} == expected


def test_a_finished_run_prints_its_table(untouched):
  before = {p: p.stat().st_mtime for p in untouched.rglob('*.npz')}
  out = output(command('run', untouched))
  assert 'test accuracy' in out and 'steps/s' not in out
  assert {p: p.stat().st_mtime for p in untouched.rglob('*.npz')} == before


def test_eval_restores(untouched):
  result = json.loads((untouched / 'result.json').read_text())
  out = output(command('eval', untouched))
  correct = round(result['test_accuracy'] * 297)
  assert f'({correct} of 297 images)' in out


def test_another_budget_needs_no_search(untouched):
  gates = untouched / 'search' / 'gates.npz'
  before = gates.stat().st_mtime
  more = '--config.budget.keep=0.8'
  output([*command('prune', untouched), more])
  found = json.loads((untouched / 'structure-keep0.8.json').read_text())
  first = json.loads((untouched / 'structure.json').read_text())
  assert first['macs'] < found['macs'] <= found['budget']['max_macs']
  assert gates.stat().st_mtime == before
  output([*command('train', untouched), more, '--config.train.epochs=1'])
  result = json.loads((untouched / 'result-keep0.8.json').read_text())
  assert result['macs'] == found['macs']
  assert (
    json.loads((untouched / 'result.json').read_text())['macs']
    == (first['macs'])
  )


def test_a_structure_from_any_file(untouched, tmp_path):
  out = output(
    [
      *command('train', tmp_path / 'other'),
      f'--config.train.structure={untouched / "structure.json"}',
      '--config.train.epochs=1',
    ]
  )
  assert 'test accuracy' in out
  result = json.loads((tmp_path / 'other' / 'result.json').read_text())
  first = json.loads((untouched / 'structure.json').read_text())
  assert result['counts'] == first['counts']


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
def test_another_config_is_refused(untouched, mode, change, named):
  done = processes.run([*command(mode, untouched), change])
  assert done.returncode == 2
  assert named in done.stderr and len(done.stderr.splitlines()) <= 3


def test_a_second_process_is_refused(untouched):
  holder = processes.command(
    f"""
    import pathlib, sys
    from pfs_jax import storage
    with storage.locked(pathlib.Path({str(untouched)!r})):
      print('held', flush=True)
      sys.stdin.read()
    """
  )
  with subprocess.Popen(
    holder,
    env=processes.environment(),
    cwd=processes.ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'held\n'
    done = processes.run(command('run', untouched))
    process.stdin.close()
  assert done.returncode == 2
  assert 'in use by another process' in done.stderr
