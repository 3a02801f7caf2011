"""Data parallelism: 1 and 8 devices, 1 and 2 processes, the same search."""

import json
import pathlib
import signal
import socket
import time

import numpy as np
import pytest

from pfs_jax import devices, errors, peers
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


def start_two(args_of, x64=False):
  """Two processes of two devices; args_of(host and port, i) -> arguments."""
  where = f'127.0.0.1:{free_port()}'
  return [
    processes.start(args_of(where, i), devices=2, x64=x64) for i in range(2)
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


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_both(tmp_path):
  def args_of(where, i):
    return [
      'main.py',
      '--config=configs/digits.py',
      '--mode=search',
      f'--workdir={tmp_path}',
      f'--coordinator={where}',
      '--processes=2',
      f'--process={i}',
      '--config.model.base_width=2',
      '--config.model.width=3',
      '--config.search.epochs=200',
      '--config.log_steps=5',
    ]

  started = start_two(args_of)
  metrics = tmp_path / 'search' / 'metrics.jsonl'
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    if metrics.exists() and metrics.read_text().count('\n') >= 4:
      break
    time.sleep(0.05)
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
