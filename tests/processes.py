"""Python in a process of its own: devices, float64, signals, crashes.

JAX fixes its devices at first use, so other devices need another process:

  assert processes.output('import jax; print(jax.device_count())', devices=8)

It is a fork of a server that has imported JAX and pfs_jax and used neither,
which takes a fraction of a second. `run(..., fresh=True)` is a new interpreter.
"""

import atexit
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence

import jax

ROOT = pathlib.Path(__file__).parents[1]

# For what computes more than it compiles; conftest.py says what tests have.
OPTIMIZED = {'XLA_FLAGS': ''}

_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(
  [
    'pfs_jax.command',
    'sklearn.datasets',  # Takes seconds, and the digits need it.
    'tests.processes',
  ]
)


def environment(
  devices: int = 1, x64: bool = False, **more: str
) -> dict[str, str]:
  """The environment of a process with CPU devices, 64-bit types, and more."""
  flags = os.environ.get('XLA_FLAGS', '').split()
  flags = [f for f in flags if 'host_platform_device_count' not in f]
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_ENABLE_X64': str(int(x64)),
    'JAX_NUMPY_RANK_PROMOTION': 'raise',
    'XLA_FLAGS': ' '.join(flags),
    **more,
  }


def command(code_or_args: str | Sequence[str]) -> list[str]:
  """The command line of Python on source text, or on arguments."""
  if isinstance(code_or_args, str):
    code_or_args = ['-c', textwrap.dedent(code_or_args)]
  return [sys.executable, *map(str, code_or_args)]


def _set_environment(env: Mapping[str, str]) -> None:
  """Sets the environment, and JAX's options, which the server has read."""
  os.environ.clear()
  os.environ.update(env)
  for name, value in env.items():
    option = name.lower()
    if name.startswith('JAX_') and option in jax.config.values:
      now = jax.config.values[option]
      parse = type(now) if isinstance(now, int | float) else str
      jax.config.update(option, parse(int(value) if parse is bool else value))


def _child(arguments, env, cwd, out, err) -> None:
  """Does in a fork what `python ARGUMENTS` does in a new interpreter."""
  for path, number in ((out, 1), (err, 2)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  _set_environment(env)
  os.chdir(cwd)
  first, *rest = arguments
  sys.argv = arguments
  try:
    if first == '-c':
      sys.argv = ['-c', *rest[1:]]
      exec(compile(rest[0], '<string>', 'exec'), {'__name__': '__main__'})
    elif first == '-m':
      sys.argv = rest
      runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
      runpy.run_path(first, run_name='__main__')
  finally:
    atexit._run_exitfuncs()  # Such as leaving the other processes of JAX.


class Started:
  """A process that runs: the part of subprocess.Popen that tests need."""

  def __init__(self, code_or_args, env, cwd):
    self._folder = tempfile.TemporaryDirectory()
    self._files = [pathlib.Path(self._folder.name) / n for n in ('out', 'err')]
    for file in self._files:
      file.touch()
    self._process = _server.Process(
      target=_child,
      args=(command(code_or_args)[1:], env, str(cwd), *map(str, self._files)),
    )
    self._process.start()
    self.pid = self._process.pid

  def poll(self) -> int | None:
    """The exit code, or None while it runs."""
    return self._process.exitcode

  def output(self) -> str:
    """What it has printed so far."""
    return self._files[0].read_text()

  def wait_for(self, condition: Callable[[], object]) -> None:
    """Waits until a condition holds; the process must come so far."""
    deadline = time.monotonic() + 200
    while not condition():
      assert self.poll() is None and time.monotonic() < deadline
      time.sleep(0.005)

  def send_signal(self, number: int) -> None:
    """Sends a signal to the process, which must still run."""
    os.kill(self.pid, number)

  def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
    """Waits; after `timeout` seconds kills it and raises TimeoutExpired."""
    self._process.join(timeout)
    code = self._process.exitcode
    if code is None:
      self._process.kill()
      self._process.join()
    texts = [file.read_text() for file in self._files]
    self._folder.cleanup()
    if code is None:
      raise subprocess.TimeoutExpired('python', timeout, *texts)
    return subprocess.CompletedProcess('python', code, *texts)


def start(
  code_or_args: str | Sequence[str],
  *,
  env: Mapping[str, str] | None = None,
  cwd: str | os.PathLike = ROOT,
  **simulated: int,
) -> Started:
  """Starts Python in a fork of the server; the arguments are those of run."""
  return Started(code_or_args, environment(**simulated, **(env or {})), cwd)


def run(
  code_or_args: str | Sequence[str],
  *,
  timeout: float = 300,
  env: Mapping[str, str] | None = None,
  cwd: str | os.PathLike = ROOT,
  fresh: bool = False,
  **simulated: int,
) -> subprocess.CompletedProcess:
  """Runs Python in another process; look at `.returncode` yourself.

  Args:
    code_or_args: Source text, dedented here, or the arguments after `python`,
      such as ['main.py', '--mode=info', ...].
    timeout: Seconds until it is killed and TimeoutExpired raised.
    env: Variables besides.
    cwd: The working directory; by default the root of the repository.
    fresh: Whether it is a new interpreter, not a fork of the server.
    **simulated: `devices` and `x64`, as for `environment`.
  """
  if not fresh:
    started = start(code_or_args, env=env, cwd=cwd, **simulated)
    return started.finish(timeout)
  return subprocess.run(
    command(code_or_args),
    env=environment(**simulated, **(env or {})),
    cwd=cwd,
    timeout=timeout,
    capture_output=True,
    text=True,
  )


def output(code_or_args: str | Sequence[str], **options) -> str:
  """What a process that must succeed printed; else its stderr is shown."""
  done = run(code_or_args, **options)
  assert done.returncode == 0, (
    f'exit code {done.returncode}\n{done.stdout}\n{done.stderr}'
  )
  return done.stdout.strip()
