"""What the terminal shows: progress, tables and errors of a few lines."""

import contextlib
import functools
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

import jax
import rich.console
import rich.progress
import rich.table

from pfs_jax import errors, peers

# The packages that each extra of the wheel brings (pyproject.toml).
_EXTRAS = {
  'data': ('array_record', 'importlib_resources', 'tensorflow_datasets'),
  'export': ('onnx', 'onnxruntime', 'safetensors'),
  'report': ('matplotlib',),
}


def say(text: str) -> None:
  """Prints one plain line on stdout, on the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


def note(text: str) -> None:
  """Prints one plain line on stderr, on every process."""
  print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """Seconds in words.

  >>> duration(45), duration(200), duration(7500)
  ('45 s', '3 min 20 s', '2 h 05 min')
  """
  seconds = int(round(seconds))
  if seconds < 60:
    return f'{seconds} s'
  minutes, seconds = divmod(seconds, 60)
  if minutes < 60:
    return f'{minutes} min {seconds:02d} s'
  return f'{minutes // 60} h {minutes % 60:02d} min'


class Progress:
  """Work done, rate and time left: a bar on a terminal, else plain lines.

  It counts steps or bytes, of which some may be `done` before. Bytes are shown
  as MB, and without a terminal `update` writes a line to stderr every 10 s.
  """

  def __init__(
    self, label: str, total: int, done: int = 0, unit: str = 'steps'
  ):
    self._label, self._total, self._first = label, total, done
    self._bytes = unit == 'bytes'
    self._start = self._said = time.perf_counter()
    self._started = False
    self._shown = sys.stderr.isatty() and jax.process_index() == 0
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(),
      rich.progress.TextColumn('{task.fields[status]}'),
      console=rich.console.Console(stderr=True),
      transient=True,
      disable=not self._shown,
    )
    about: dict[str, Any] = {'total': total, 'completed': done, 'status': ''}
    self._task = self._bar.add_task(label, **about)

  def __enter__(self) -> Self:
    self._bar.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._bar.stop()

  def _status(self, done: int) -> str:
    """The text of the bar, such as '20/100  2.0 steps/s  40 s left'."""
    text = f'{done}/{self._total}'
    if self._bytes:
      text = f'{done / 1e6:.1f}/{self._total / 1e6:.1f} MB'
    if done <= self._first:
      return text
    rate = (done - self._first) / max(time.perf_counter() - self._start, 1e-9)
    speed = f'{rate / 1e6:.1f} MB/s' if self._bytes else f'{rate:.1f} steps/s'
    return f'{text}  {speed}  {duration((self._total - done) / rate)} left'

  def update(self, done: int) -> None:
    """Shows how many steps or bytes are done so far."""
    now = time.perf_counter()
    if not self._started:  # The rate leaves out the first step, which compiles.
      self._started = True
      self._start, self._first = now, done
    self._bar.update(self._task, completed=done, status=self._status(done))
    if not self._shown and self._bytes and now - self._said >= 10:
      self._said = now
      note(f'{self._label} {self._status(done)}')

  def line(self, step: int, **scalars: float) -> None:
    """Writes a line of numbers, above the bar if one is shown."""
    text = f'{self._label} {self._status(step)}'
    text += ''.join(f'  {name} {value:.4g}' for name, value in scalars.items())
    if self._shown:
      self._bar.console.print(text, highlight=False, soft_wrap=True)
    else:
      say(text)


def table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """Prints a table: numbers right-aligned, and no name is cut short."""
  if jax.process_index() != 0:
    return
  shown = rich.table.Table(rich.table.Column(columns[0], overflow='fold'))
  for column in columns[1:]:
    shown.add_column(column, justify='right', overflow='fold')
  for row in rows:
    shown.add_row(*row)
  width = None if sys.stdout.isatty() else 1000
  console = rich.console.Console(width=width, highlight=False, markup=False)
  console.print(title, soft_wrap=True)  # Keeps paths whole.
  console.print(shown)


def _fail(text: str, code: int) -> NoReturn:
  """Prints an error, tells it to the other processes, and ends this one."""
  # It may quote a file, which must not control the terminal.
  text = ''.join(c if c.isprintable() or c == '\n' else '?' for c in text)
  with contextlib.suppress(OSError):  # Nobody may read it.
    print(text, file=sys.stderr, flush=True)
  try:
    sys.stdout.flush()
  except OSError:  # It is full or closed, and Python would try it again.
    sys.stdout = open(os.devnull, 'w')
  peers.tell(text.removeprefix('error: '))
  peers.leave(code)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a function so that user errors end the program without a traceback.

  A user error, or what the operating system refuses, is printed as one to three
  lines on stderr, with exit code 2. An interrupted run ends with 128 + the
  signal's number. All other exceptions are our own mistakes and keep their
  traceback. If there are several processes, one that fails tells the others.
  """

  @functools.wraps(function)
  def run(*args: Any) -> Any:
    if isinstance(sys.stdout, io.TextIOWrapper):  # A path may be no UTF-8.
      sys.stdout.reconfigure(errors='backslashreplace')
    try:
      return function(*args)
    except errors.UserError as e:
      _fail(f'error: {e}', 2)
    except errors.Interrupted as e:  # All processes stop at the same step.
      print(e, file=sys.stderr)
      sys.exit(128 + e.signal)
    except KeyboardInterrupt:
      _fail('interrupted.', 130)
    except BrokenPipeError:
      _fail('error: the reader of the output closed it.', 1)
    except OSError as e:  # What the machine refuses: permission, space, files.
      what = f'{e.filename} cannot be used: ' if e.filename else ''
      _fail(f'error: {what}{e.strerror or e}.', 2)
    except ModuleNotFoundError as e:
      for extra, packages in _EXTRAS.items():
        if (e.name or '').partition('.')[0] in packages:
          command = f"pip install 'pfs_jax[{extra}]'"
          _fail(f'error: {e.name} is not installed: {command}.', 2)
      raise
    except Exception as e:
      if errors.out_of_memory(e):
        reason = str(e).partition('\n')[0]
        _fail(f'error: not enough memory: {reason}.', 2)
      if not peers.joined():
        raise
      if peers.lost(e):
        _fail('error: the connection to another process broke.', 1)
      traceback.print_exc()
      _fail(f'error: {type(e).__name__}: {e}', 1)

  return run


def guarded_parser(function: Callable[..., Any]) -> Callable[..., Any]:
  """`guarded` for the parsing of flags, where absl and ml_collections raise."""

  @guarded
  def parse(argv: Sequence[str]) -> Any:
    try:
      return function(argv)
    except errors.UserError:
      raise
    except Exception as e:  # A config file may raise anything.
      raise errors.UserError(_last_line(e)) from e
    except SystemExit:  # --help was printed; absl would end with 1.
      sys.exit(0)

  return parse


def _last_line(e: Exception) -> str:
  """The message of a flag's exception, without the traceback it may contain."""
  text = str(e.args[0]) if len(e.args) == 1 else str(e)
  text = text.strip() or type(e).__name__
  stripped = map(str.strip, text.replace('\\n', '\n').splitlines())
  lines = list(filter(None, stripped))
  if isinstance(e, OSError):  # 'Failed loading config file', paths, reasons.
    return f'the config file cannot be loaded: {lines[-1]}'
  if 'Traceback (most recent call last):' in lines:
    return f'the config file fails: {lines[-1].rpartition("UserError: ")[2]}'
  text = ' '.join(lines).replace("\\'", "'")
  text = text[1:-1] if text[0] == text[-1] and text[0] in '\'"' else text
  start = 'the config has no field ' if isinstance(e, AttributeError) else ''
  return start + text.replace("' Did you", "'. Did you")
