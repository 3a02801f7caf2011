"""Strictness, a shared compilation cache, and the fixtures of all tests."""

import fcntl
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Compiling takes longer than running here. Without LLVM's optimisations and the
# newer emitters of fusions, a search step of ResNet-20 compiles in 1.7 s of CPU
# time instead of 5.7. XLA's optimisations of its graph stay, so operations and
# bytes can be counted. A test of speed runs with processes.OPTIMIZED.
_FAST_TO_COMPILE = (
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
)

# Warnings are errors (pyproject.toml), except these of other people's code.
_ALLOWED = (
  # Two processes share the cache: one may read what the other half wrote, and
  # then compiles for itself.
  'ignore:Error reading persistent compilation cache entry:UserWarning:'
  'jax._src.compiler',
  # ml_collections loads config files the way Python 3.12 no longer does.
  'ignore:the load_module.. method is deprecated:DeprecationWarning:'
  'importlib._bootstrap',
)


def pytest_configure(config):
  """Sets JAX up before a test module imports it."""
  folder = pathlib.Path(tempfile.gettempdir()) / f'pfs_jax_cache_{os.getuid()}'
  if hasattr(config, 'cache'):
    folder = config.cache.mkdir('jax')
  if sys.dont_write_bytecode:
    # Else each process compiles all sources again, which takes 3 s.
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
    os.environ['PYTHONPYCACHEPREFIX'] = str(folder / 'bytecode')
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(folder / 'bytecode')
  # In the environment, so that processes that tests start share the cache.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  flags = os.environ.get('XLA_FLAGS', '')
  if _FAST_TO_COMPILE not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {_FAST_TO_COMPILE}'.strip()
  import jax

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  # Where a plugin imported JAX before, the environment came too late.
  jax.config.update(
    'jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR']
  )
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs',
    float(os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS']),
  )
  for allowed in _ALLOWED:
    config.addinivalue_line('filterwarnings', allowed)


def pytest_itemcollected(item):
  """Cases of large families are slow; the small ones of a test are fast."""
  _, _, case = item.name.partition('[')
  if any(name in case for name in ('mobilenet_v2', 'resnet50')):
    item.add_marker(pytest.mark.slow)


@pytest.fixture(scope='session')
def golden():
  """The folder of values measured on the published implementation."""
  return ROOT / 'tests' / 'golden'


@pytest.fixture
def refused():
  """Calls what must be refused, in at most three lines; returns the error."""
  from pfs_jax import errors

  def call(message, function, *args, **kwargs):
    with pytest.raises(errors.UserError, match=message) as e:
      function(*args, **kwargs)
    assert len(str(e.value).splitlines()) <= 3, str(e.value)
    return e.value

  return call


@pytest.fixture
def shallow_mobilenets(monkeypatch):
  """MobileNets of their first four blocks, which compile quickly."""
  from pfs_jax import models
  from pfs_jax.models import mobilenet, registry

  for blocks in ('V1_BLOCKS', 'V2_BLOCKS'):
    monkeypatch.setattr(mobilenet, blocks, getattr(mobilenet, blocks)[:4])
  # Without the caches, which stay as they are.
  traced, cost_model = registry._marked_calls, registry.cost_model
  monkeypatch.setattr(registry, '_marked_calls', traced.__wrapped__)
  monkeypatch.setattr(models, 'cost_model', cost_model.__wrapped__)


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
  """The workdir of tests/small_run.py after --mode=run; only to be read.

  The first worker that asks makes it for all workers.
  """
  from tests import processes, small_run

  base = tmp_path_factory.getbasetemp()
  base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  workdir = base / 'finished'
  with (base / 'finished.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (workdir / 'result.json').exists():
      processes.output(small_run.arguments('run', workdir))
  return workdir


@pytest.fixture
def finished(finished_run, tmp_path):
  """A copy of `finished_run` of one's own."""
  return shutil.copytree(finished_run, tmp_path / 'finished')
