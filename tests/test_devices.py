"""Data parallelism: several devices and processes make the same search."""

import json
import re
import signal
import socket
import textwrap
from concurrent import futures

import jax
import numpy as np
import pytest

from pfs_jax import devices, models, peers, prune, runs, search, train
from pfs_jax.data import pipeline
from tests import own_models, processes, small_run

JOIN = """
import sys
from pfs_jax import peers
peers.start(sys.argv[1], 2, int(sys.argv[2]))
"""


def free_address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def in_two_processes(arguments, **options):
  """Both ends of two processes; arguments(host and port, i) -> arguments."""
  where = free_address()
  started = [
    processes.start(arguments(where, i), devices=2, **options) for i in range(2)
  ]
  return [p.finish(240) for p in started]


def joined(code, *more, **options):
  """Both ends of two processes that join and then do the same code.

  The code finds `more` from sys.argv[3] on.
  """
  return in_two_processes(
    lambda where, i: ['-c', JOIN + code, where, i, *more], **options
  )


def printed(done):
  """What a process printed last; Gloo prints at any time."""
  lines = done.stdout.splitlines()
  return [line for line in lines if not line.startswith('[Gloo]')][-1]


COLLECTIVE = re.compile(
  r'= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|'
  r'reduce-scatter)(?:-start)?\('
)


def numbers_sent(text):
  """Numbers that the collectives of a compiled program result in."""
  shapes = ' '.join(COLLECTIVE.findall(text))
  dims = re.findall(r'\w+\[([\d,]*)\]', shapes)
  return int(sum(np.prod([int(d) for d in ds.split(',') if d]) for ds in dims))


def print_search():
  """Searches on all devices of all processes; process 0 prints JSON."""
  dtype = np.float64
  module = models.build('resnet8', 10, 4, gated=True, dtype=dtype)
  variables = models.init(module, jax.random.key(0), (8, 8, 3))
  variables = jax.tree.map(lambda v: v.astype(dtype), variables)
  rng = np.random.default_rng(0)
  source = pipeline.ArraySource(
    rng.integers(0, 256, (128, 8, 8, 3), dtype=np.uint8),
    rng.integers(0, 10, 128),
    batch_size=32,
    key=jax.random.key(1),
    augmentation=pipeline.Augmentation(
      (0.5,) * 3, (0.25,) * 3, padding=2, flip=True, dtype=dtype
    ),
  )
  settings = {'sparsity': 0.3, 'balance': 0.5, 'learning_rate': 0.01}
  state = devices.replicate(search.init(module, variables, **settings))
  call = train.compiled_call(search.step, source.draw)
  call = call.lower(state, source.resident, source.chunk(0, 1)).compile()
  losses = []
  for step in range(20):
    state, metrics = call(state, source.resident, source.chunk(step, 1))
    losses.append(float(metrics['ce'][0]))
  gates = models.gates_by_layer('resnet8', jax.device_get(state.gates))
  model = models.cost_model('resnet8', 10, 8, 3, 4)
  structure = prune.fit(gates, model, model.macs(model.widths) // 2)
  found = {
    'devices': jax.device_count(),
    'losses': losses,
    'gates': np.concatenate(list(gates.values())).tolist(),
    'counts': structure.counts,
    'sent': numbers_sent(call.as_text()),
    'sizes': {
      'gates': own_models.size(gates),
      'statistics': own_models.size(state.batch_stats),
      'weights': own_models.size(state.params),
    },
  }
  if jax.process_index() == 0:
    print(json.dumps(found))


SEARCH = 'from tests import test_devices; test_devices.print_search()'


def on_devices(n):
  return json.loads(processes.output(SEARCH, devices=n, x64=True))


@pytest.fixture(scope='module')
def one():
  return on_devices(1)


def assert_same_search(many, one):
  assert len(many['losses']) == 20
  np.testing.assert_allclose(many['losses'], one['losses'], atol=1e-9)
  np.testing.assert_allclose(many['gates'], one['gates'], atol=1e-9)
  assert many['counts'] == one['counts']
  assert min(one['gates']) < 0.95  # The gates did move.


def test_eight_devices_search_as_one_does_and_send_little(one):
  eight = on_devices(8)
  assert (one['devices'], eight['devices']) == (1, 8)
  assert_same_search(eight, one)
  # What is sent: gradients of the gates, and for each channel of a BatchNorm
  # two sums forward (mean, variance) and two backward, and a few scalars. It is
  # no gradient of a weight and no image.
  sizes = eight['sizes']
  assert one['sent'] == 0
  assert 0 < eight['sent'] <= 1.5 * (sizes['gates'] + 2 * sizes['statistics'])
  assert eight['sent'] < 0.5 * sizes['weights']


@pytest.mark.slow
def test_two_processes_search_as_one_does(one):
  ends = joined(SEARCH, x64=True)
  assert [d.returncode for d in ends] == [0, 0], ends
  two = json.loads(printed(ends[0]))
  assert two['devices'] == 4
  assert_same_search(two, one)


# The first process finds that another one is at work in the first folder.
TOURNAMENT = """
import contextlib, pathlib, jax
from pfs_jax import storage
from pfs_jax.studies import tournament
from tests import test_tournament
plain, found = storage.locked, []
@contextlib.contextmanager
def locked(folder, wait=None):
  with plain(folder, wait) as held:
    found.append(folder)
    yield held and (len(found) > 1 or jax.process_index() > 0)
storage.locked = locked
tournament.run(test_tournament.small(), pathlib.Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_two_processes_hold_a_tournament(tmp_path):
  ends = joined(TOURNAMENT, tmp_path)
  assert [d.returncode for d in ends] == [0, 0], ends
  assert (tmp_path / 'tournament.json').exists()


@pytest.mark.slow
def test_processes_that_finish_end_well():
  """In real interpreters: the news of a failure is awaited until the end."""
  where = free_address()
  with futures.ThreadPoolExecutor() as pool:
    done = pool.map(
      lambda i: processes.run(['-c', JOIN, where, i], fresh=True), (0, 1)
    )
  assert [(d.returncode, d.stderr) for d in done] == [(0, '')] * 2


# main.py, where a fault happens before a step of the search or the training in
# one of two processes. A signal goes to the parent of the process that works.
COMMAND = """
  import os, runpy, signal, sys
  from pfs_jax import checkpointing, errors
  from pfs_jax.data import pipeline
  fault, at, *sys.argv[1:] = sys.argv[1:]
  sys.argv[0] = 'main.py'

  manager = checkpointing.ocp.CheckpointManager

  def full_disk(*_, **__):
    raise OSError(28, 'No space left on device')

  def killed_in_save(*args, original=manager.save, **kwargs):
    original(*args, **kwargs)  # Others write on in the background.
    os.kill(os.getppid(), signal.SIGKILL)

  def chunk(self, step, k, original=pipeline.ArraySource.chunk):
    if step == int(at):
      if fault in ('SIGKILL', 'SIGTERM'):
        os.kill(os.getppid(), getattr(signal, fault))
      if fault == 'image':
        raise errors.UserError('x.jpg cannot be read.')
      if fault == 'disk':
        manager.save = full_disk
      if fault == 'write':
        manager.save = killed_in_save
    return original(self, step, k)

  pipeline.ArraySource.chunk = chunk
  runpy.run_path('main.py', run_name='__main__')
  """


def two_runs(workdir, victim, fault, at):
  """The ends of (the victim, the other one)."""
  fields = {
    'model.factory': 'tests.test_tournament:Tiny',
    'model.base_width': 0,
    'model.width': 0,
    'search.epochs': 1,
    'train.epochs': 200,
    'train.statistics': 'running',  # A third less to trace in each process.
    'checkpoint_steps': 4,
  }

  def arguments(where, i):
    mine = [fault, at] if i == victim else ['none', -1]
    options = [f'--config.{name}={value}' for name, value in fields.items()]
    together = [f'--coordinator={where}', '--processes=2', f'--process={i}']
    command = small_run.arguments('run', workdir, *options, *together)
    return ['-c', textwrap.dedent(COMMAND), *mine, *command[1:]]

  ends = in_two_processes(arguments, env={'PFS_JAX_HEARTBEAT': '3'})
  return ends[victim], ends[1 - victim]


@pytest.mark.slow
def test_two_processes_end_together_and_the_same_command_continues(tmp_path):
  """Fault after fault on one run: in its search (18 steps), then training.

  Each process is killed once, one between two saves and one right after a save.
  An unreadable image and a full disk leave the other one in different waits.
  """

  def last_step(stage):
    records = runs.read_metrics(tmp_path / stage)
    return records[-1]['step'] if records else 0

  for stage, victim, fault, at in (
    ('search', 0, 'SIGKILL', 6),
    ('train', 1, 'write', 26),
  ):
    killed, left = two_runs(tmp_path, victim, fault, at)
    assert (killed.returncode, left.returncode) == (-signal.SIGKILL, 1), left
    assert left.stderr == (
      f'error: process {victim} has died; process {1 - victim} ends too. The '
      'same commands continue.\n'
    )
    assert at - 4 <= last_step(stage) <= at + 4
  for victim, fault, at, message in (
    (0, 'image', 34, 'x.jpg cannot be read.'),
    (1, 'image', 42, 'x.jpg cannot be read.'),
    (1, 'disk', 50, 'written: No space left on device: '),
  ):
    failed, told = two_runs(tmp_path, victim, fault, at)
    assert (failed.returncode, told.returncode) == (2, 1), (failed, told)
    assert message in failed.stderr and message in told.stderr
    assert f'error: process {victim}: ' in told.stderr
    assert [d.stderr.count('\n') for d in (failed, told)] == [1, 1]
    assert at - 4 <= last_step('train') <= at + 4
  ends = two_runs(tmp_path, 1, 'SIGTERM', 63)
  assert [d.returncode for d in ends] == [128 + signal.SIGTERM] * 2, ends
  steps = [
    line.split(' step ')[1].split(';')[0]
    for line in (ends[0].stderr + ends[1].stderr).splitlines()
    if 'saved. The same command continues' in line
  ]
  assert len(steps) == 2 and len(set(steps)) == 1, ends
  assert (tmp_path / 'train' / 'checkpoints' / steps[0]).is_dir()


@pytest.mark.parametrize('where', ['host', 'host:', ':1', 'host:123456', ''])
def test_a_coordinator_is_a_host_and_a_port(where, refused):
  refused('must be host:port, or auto; got', peers.start, where, 2, 0)


def test_refusals(tmp_path, monkeypatch, refused):
  refused('need --coordinator=host:port', peers.start, None, 2, 1)
  monkeypatch.setenv('PFS_JAX_HEARTBEAT', 'soon')
  refused("HEARTBEAT must be .* got 'soon'", peers.start, '127.0.0.1:1', 2, 1)
  monkeypatch.undo()
  args = small_run.arguments('info', tmp_path)
  for name, value in {'JAX_PLATFORMS': 'cuda', 'PYTHONOPTIMIZE': '1'}.items():
    fresh = name.startswith('PYTHON')  # It is read at the start.
    done = processes.run(args, env={name: value}, fresh=fresh)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1)
    assert name in done.stderr
  refused('--process must be in', peers.start, '127.0.0.1:1', 2, 2)
  batch = '--config.search.batch_size=60'
  args = small_run.arguments('search', tmp_path, batch)
  done = processes.run(args, devices=8)
  assert done.returncode == 2
  said = 'config.search.batch_size must be a multiple of the 8 devices'
  assert said in done.stderr
