"""Data parallelism: 1 and 8 devices, 1 and 2 processes, the same search."""

import json
import pathlib
import signal
import socket
import textwrap
import time
from concurrent import futures

import numpy as np
import pytest

from pfs_jax import devices, errors, peers, runs
from tests import processes


def numbers(stdout):
  return json.loads(stdout.splitlines()[-1])


def on_devices(n, x64, steps):
  args = ['-m', 'tests.data_parallel', steps]
  return numbers(processes.output(args, devices=n, x64=x64))


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start_two(args_of, x64=False, env=None):
  """Two processes of two devices; args_of(host and port, i) -> arguments."""
  where = f'127.0.0.1:{free_port()}'
  return [
    processes.start(args_of(where, i), devices=2, x64=x64, env=env)
    for i in range(2)
  ]


def in_two_processes(x64, steps):
  started = start_two(
    lambda where, i: ['-m', 'tests.data_parallel', steps, where, 2, i], x64
  )
  done = [p.finish() for p in started]
  assert [d.returncode for d in done] == [0, 0], done
  return numbers(done[0].stdout)


@pytest.fixture(scope='module')
def one64():
  return on_devices(1, True, 20)


@pytest.mark.parametrize(
  'search,n',
  [
    (lambda: on_devices(8, True, 20), 8),
    pytest.param(lambda: in_two_processes(True, 20), 4, marks=pytest.mark.slow),
  ],
  ids=['8 devices', '2 processes'],
)
def test_float64_searches_agree(one64, search, n):
  many = search()
  assert many['devices'] == n
  assert len(many['losses']) == 20
  np.testing.assert_allclose(many['losses'], one64['losses'], atol=1e-9)
  np.testing.assert_allclose(many['gates'], one64['gates'], atol=1e-9)
  assert many['counts'] == one64['counts']
  # Not because the gates did not move.
  assert min(one64['gates']) < 0.95


def test_float32_losses_agree_and_little_is_sent():
  one, eight = on_devices(1, False, 3), on_devices(8, False, 3)
  np.testing.assert_allclose(eight['losses'], one['losses'], rtol=0, atol=1e-5)
  assert one['collectives'] == []
  # Gradients of the gates, sums of BatchNorm forward (mean, variance) and
  # backward (two more a channel), scalars: no weight's gradient, no image.
  sent = sum(eight['collectives']) / eight['itemsize']
  needed = eight['gates_size'] + 2 * eight['statistics_size']
  assert 0 < sent <= 1.5 * needed
  assert sent < 0.5 * eight['weights_size']


def test_same_gates_same_counts_anywhere():
  code = """
    import json, numpy as np
    from pfs_jax import models, prune
    rng = np.random.default_rng(0)
    model = models.cost_model('resnet20', 10, 16, 3, 8)
    gates = {k: np.round(rng.random(n), 1).astype(np.float32)
             for k, n in zip(model.layers, model.widths)}
    print(prune.fit(gates, model, model.macs(model.widths) // 2).counts)
    """
  found = {processes.output(code, devices=n) for n in (1, 8)}
  assert len(found) == 1


def test_processes_that_finish_end_well():
  """In real interpreters: the news of a failure is awaited until the end."""
  code = """
    import sys
    from pfs_jax import peers
    peers.start(sys.argv[1], 2, int(sys.argv[2]))
    """
  where = f'127.0.0.1:{free_port()}'
  with futures.ThreadPoolExecutor() as pool:
    done = pool.map(
      lambda i: processes.run(
        ['-c', textwrap.dedent(code), where, i], fresh=True
      ),
      range(2),
    )
  assert [(d.returncode, d.stderr) for d in done] == [(0, '')] * 2


# What happens to one of two processes.

COMMAND = """
  import runpy, sys
  from pfs_jax import checkpointing, errors
  from pfs_jax.data import pipeline
  victim, fault, *sys.argv[1:] = sys.argv[1:]
  sys.argv[0] = 'main.py'

  def chunk(self, step, k, original=pipeline.ArraySource.chunk):
    if step == 12:
      raise errors.UserError('x.jpg cannot be read.')
    return original(self, step, k)

  def save(*_, **__):
    raise OSError(28, 'No space left on device')

  if f'--process={victim}' in sys.argv and fault == 'image':
    pipeline.ArraySource.chunk = chunk
  if f'--process={victim}' in sys.argv and fault == 'disk':
    checkpointing.ocp.CheckpointManager.save = save
  runpy.run_path('main.py', run_name='__main__')
  """


def start_two_runs(workdir, victim=-1, fault='', **fields):
  fields = {
    **{'model.base_width': 2, 'model.width': 3, 'search.epochs': 200},
    **{'train.epochs': 200, 'train.reference': False, 'log_steps': 2},
    **fields,
  }

  def arguments(where, i):
    return [
      *('-c', textwrap.dedent(COMMAND), victim, fault),
      *('--config=configs/digits.py', '--mode=run', f'--workdir={workdir}'),
      *(f'--coordinator={where}', '--processes=2', f'--process={i}'),
      *(f'--config.{name}={value}' for name, value in fields.items()),
    ]

  return start_two(arguments, env={'PFS_JAX_HEARTBEAT': '5'})


def wait_for_records(folder, number=3):
  metrics, deadline = folder / 'metrics.jsonl', time.monotonic() + 200
  while time.monotonic() < deadline:
    if metrics.exists() and metrics.read_text().count('\n') >= number:
      return
    time.sleep(0.05)
  raise AssertionError(f'{metrics} stays short')


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_both(tmp_path):
  started = start_two_runs(tmp_path)
  wait_for_records(tmp_path / 'search')
  started[1].send_signal(signal.SIGTERM)
  done = [p.finish(120) for p in started]
  assert [d.returncode for d in done] == [128 + signal.SIGTERM] * 2, done
  steps = {
    line.split(' step ')[1].split(';')[0]
    for line in (done[0].stderr + done[1].stderr).splitlines()
    if 'saved. The same command continues' in line
  }
  assert len(steps) == 1, done
  saved = [p.name for p in pathlib.Path(tmp_path).glob('search/checkpoints/*')]
  assert steps.pop() in saved


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('where', ['search', 'train', 'checkpoint'])
def test_sigkill_of_one_of_two_ends_both(tmp_path, victim, where):
  """Soon, with one line that names it; the same command continues."""
  stage = 'train' if where == 'train' else 'search'
  fields = {'checkpoint_steps': 1 if where == 'checkpoint' else 4}
  if stage == 'train':
    fields['search.epochs'] = 0.3
  started = start_two_runs(tmp_path, **fields)
  wait_for_records(tmp_path / stage)
  started[victim].send_signal(signal.SIGKILL)
  killed, left = started[victim].finish(60), started[1 - victim].finish(60)
  assert killed.returncode == -signal.SIGKILL
  assert left.returncode == 1
  assert left.stderr == (
    f'error: process {victim} has died; process {1 - victim} ends too. The '
    'same commands continue.\n'
  )
  before = len(runs.read_metrics(tmp_path / stage))
  started = start_two_runs(tmp_path, **fields)
  wait_for_records(tmp_path / stage, before + 2)
  for process in started:
    process.send_signal(signal.SIGTERM)
  assert [p.finish(120).returncode for p in started] == [143, 143]


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize(
  'fault, message',
  [
    ('image', 'x.jpg cannot be read.'),
    ('disk', 'cannot be written: No space left on device: '),
  ],
)
def test_what_fails_on_one_is_told_to_the_other(
  tmp_path, victim, fault, message
):
  started = start_two_runs(tmp_path, victim, fault, checkpoint_steps=10)
  done = [p.finish(120) for p in started]
  failed, told = done[victim], done[1 - victim]
  assert failed.returncode == 2 and message in failed.stderr
  assert told.returncode == 1 and f'error: process {victim}: ' in told.stderr
  assert message in told.stderr
  assert all(d.stderr.count('\n') == 1 for d in done), done


@pytest.mark.parametrize('where', ['host', 'host:', ':1', 'host:123456', ''])
def test_a_coordinator_is_a_host_and_a_port(where):
  with pytest.raises(errors.UserError, match='must be host:port, or auto; got'):
    peers.start(where, 2, 0)


def test_refusals(tmp_path):
  with pytest.raises(errors.UserError, match='--process must be in'):
    peers.start('127.0.0.1:1', 2, 2)
  devices.check_batch('train.batch_size', 3)  # One device takes any.
  done = processes.run(
    [
      'main.py',
      '--config=configs/digits.py:smoke',
      '--mode=search',
      f'--workdir={tmp_path}',
      '--config.search.batch_size=60',
    ],
    devices=8,
  )
  assert done.returncode == 2
  assert 'config.search.batch_size must be a multiple of the 8 devices' in (
    done.stderr
  )
