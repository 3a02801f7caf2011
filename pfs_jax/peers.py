"""Several processes of one run: how they join, and how they end together.

When a process dies, JAX's coordination service aborts the others with a long
dump; an exception on one process leaves the others waiting in a collective. Two
things end all processes soon, with one line that says which one failed and why:

- `start` forks. The child does the work. The parent collects what libraries in
  C++ print, and says in one line why a child was aborted.
- A process that fails tells the others through the coordination service
  (`tell`), and a thread in each process asks for such messages.
"""

import atexit
import collections
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from pfs_jax import errors

# Seconds without a heartbeat after which a process counts as dead. All
# processes end within twice this time after a failure.
_HEARTBEAT = 30
_KEY = 'pfs_jax/failed'
_CONTINUE = 'The same commands continue.'
_LOST = ('Gloo', 'NCCL', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'coordination')


def start(coordinator: str | None, processes: int, process: int) -> None:
  """Joins this process with the others; call it before any other use of JAX.

  Args:
    coordinator: None for a single process; 'auto' where JAX finds the others by
      itself (TPU pods, Slurm, Open MPI); else host:port of process 0.
    processes: Number of processes, with host:port.
    process: The number of this one, from 0, with host:port.

  Raises:
    errors.UserError: If the others cannot be joined.
  """
  if coordinator is None:
    if (processes, process) != (1, 0):
      raise errors.UserError(
        '--processes and --process need --coordinator=host:port.'
      )
    return
  given: dict[str, Any] = {}
  if coordinator != 'auto':
    if not 0 <= process < processes:
      raise errors.UserError(
        f'--process must be in [0, --processes); got {process} of {processes}.'
      )
    if not re.fullmatch(r'.+:\d{1,5}', coordinator):
      raise errors.UserError(
        f'--coordinator must be host:port, or auto; got {coordinator}.'
      )
    given = {
      'coordinator_address': coordinator,
      'num_processes': processes,
      'process_id': process,
    }
  _heartbeat()  # Refuses a wrong one.
  _fork(f'process {process}' if given else 'this process')
  try:
    jax.distributed.initialize(**given, heartbeat_timeout_seconds=_heartbeat())
  except (RuntimeError, ValueError) as e:
    raise errors.UserError(
      f'--coordinator={coordinator} failed: {str(e).splitlines()[0]}'
    ) from e
  ended = threading.Event()
  thread = threading.Thread(target=_listen, args=(ended,), daemon=True)
  thread.start()
  # The last one runs first, and both run before JAX's own handler: the thread
  # ends before JAX leaves the service and Python ends.
  atexit.register(thread.join)
  atexit.register(ended.set)


def _heartbeat() -> int:
  given = os.environ.get('PFS_JAX_HEARTBEAT', str(_HEARTBEAT))
  if not re.fullmatch(r'[1-9]\d{0,5}', given):
    raise errors.UserError(
      f'PFS_JAX_HEARTBEAT must be seconds, an integer >= 1; got {given!r}.'
    )
  return int(given)


def _grace() -> float:
  """Seconds in which each process can report an error that all of them have."""
  return min(2.0, _heartbeat() / 10)


def _fork(name: str) -> None:
  """Returns in the child; the parent waits for it and ends with its code."""
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    os.close(read)
    with contextlib.suppress(OSError, AttributeError):  # Dies with its parent.
      ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Python's messages stay on stderr; what C++ prints goes to the parent.
    sys.stderr = os.fdopen(os.dup(2), 'w', buffering=1)
    os.dup2(write, 2)
    os.close(write)
    return
  os.close(write)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _: os.kill(child, n))
  with os.fdopen(read, errors='replace') as pipe:
    last = collections.deque(pipe, maxlen=200)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if code < 0:
    print(f'error: {_reason(name, -code, "".join(last))}', file=sys.stderr)
    code = 1
  sys.stderr.flush()
  os._exit(code)


def _reason(name: str, number: int, text: str) -> str:
  """One line that says why a signal ended a child."""
  if number == signal.SIGABRT and 'coordination' in text:
    named = re.search(r'heartbeats?\):\s*(\d+)|Task (\d+) heartbeat', text)
    who = next(filter(None, named.groups())) if named else '0'
    return f'process {who} has died; {name} ends too. {_CONTINUE}'
  ended = signal.Signals(number).name
  more = next((t for t in reversed(text.splitlines()) if t.strip()), '')
  return f'{name} was ended by {ended}. {_CONTINUE} {more}'.strip()


def _client():
  """The client of the coordination service; None for a single process."""
  from jax._src import distributed  # It has no public name.

  return distributed.global_state.client


def joined() -> bool:
  """Whether this process is one of several."""
  return _client() is not None


def tell(reason: str) -> None:
  """Tells the other processes, if there are any, why this one fails.

  Process 0 holds the message, so it waits until the others have asked for it.
  """
  client = _client()
  if client is None:
    return
  with contextlib.suppress(Exception):  # Another process was first.
    client.key_value_set(_KEY, f'process {jax.process_index()}: {reason}')
  if jax.process_index() == 0:
    time.sleep(2 * _grace())


def leave(code: int) -> NoReturn:
  """Ends this process without waiting for the others.

  JAX would wait for them at a barrier, for minutes.
  """
  if not joined():
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def lost(e: Exception) -> bool:
  """Whether an exception says that the connection to another process broke.

  If it does, JAX first gets time to find the dead process and to end this one.
  """
  if not joined() or not any(word in str(e) for word in _LOST):
    return False
  time.sleep(_heartbeat() + 15)
  return True


def _listen(ended: threading.Event) -> None:
  """Ends this process if another one fails and this one does not notice.

  It polls, and does not wait inside the service: a thread that is inside C++
  when Python ends aborts the process.
  """
  client = _client()
  while not ended.wait(_grace() / 2):
    try:
      reason = client.key_value_try_get(_KEY)
    except Exception as e:
      if 'NOT_FOUND' in str(e):
        continue
      return  # The service has ended, and this process ends too.
    if reason.startswith(f'process {jax.process_index()}:'):
      return
    if ended.wait(_grace()):
      return
    line = reason.partition('\n')[0]
    said = f'error: {line} This process ends too.'
    print(said, file=sys.stderr, flush=True)
    os._exit(1)
