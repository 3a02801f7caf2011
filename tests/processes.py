"""Python in a fresh process: other device counts, float64, signals, crashes.

A process of its own is needed because JAX fixes its devices at first use.

  done = processes.run('''
    import jax
    print(jax.device_count())
    ''', devices=8)
  assert done.returncode == 0, done.stderr

Or, where only the output of a script that must succeed matters:

  assert processes.output('print(1 + 1)') == '2'
"""

import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parents[1]


def environment(
  devices: int = 1, x64: bool = False, **more: str
) -> dict[str, str]:
  """The environment of a process with so many simulated CPU devices.

  The compilation cache that conftest.py set up is shared by being inherited.

  Args:
    devices: Simulated devices.
    x64: Whether 64-bit types are on.
    **more: Variables besides.
  """
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


def run(
  code_or_args: str | Sequence[str],
  *,
  devices: int = 1,
  x64: bool = False,
  timeout: float = 300,
  env: Mapping[str, str] | None = None,
  cwd: str | os.PathLike = ROOT,
) -> subprocess.CompletedProcess:
  """Runs Python in a fresh process; look at `.returncode` yourself.

  Args:
    code_or_args: Source text, dedented here, or the arguments after `python`,
      such as ['main.py', '--mode=info', ...].
    devices: Simulated CPU devices.
    x64: Whether 64-bit types are on.
    timeout: Seconds until it is killed and TimeoutExpired raised.
    env: Variables besides.
    cwd: Where; the default is the root of the repository.

  Returns:
    The finished process with text in `.stdout` and `.stderr`.
  """
  return subprocess.run(
    command(code_or_args),
    env=environment(devices, x64, **(env or {})),
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
