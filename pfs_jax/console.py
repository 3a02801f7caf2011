"""What the terminal shows: progress, tables, and errors in a line or three."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence

import jax
import rich.console
import rich.progress
import rich.table

from pfs_jax import errors, runs


def say(text: str) -> None:
  """One plain line on stdout, from the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


def duration(seconds: float) -> str:
  """Seconds as '45 s', '3 min 20 s' or '2 h 05 min'."""
  seconds = int(round(seconds))
  if seconds < 60:
    return f'{seconds} s'
  minutes, seconds = divmod(seconds, 60)
  if minutes < 60:
    return f'{minutes} min {seconds:02d} s'
  return f'{minutes // 60} h {minutes % 60:02d} min'


class Progress:
  """Steps done, rate and time left: a bar on a terminal, else plain lines.

  Args:
    label: What is going on, such as 'search'.
    total: Steps in all.
    done: Steps done before.
  """

  def __init__(self, label: str, total: int, done: int = 0):
    self._label, self._total, self._first = label, total, done
    self._start = time.perf_counter()
    self._bar, self._started = None, False
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn('{task.fields[rate]}'),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
      )
      self._task = self._bar.add_task(
        label, total=total, completed=done, rate=''
      )

  def __enter__(self) -> Progress:
    """Starts the bar."""
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    """Ends the bar."""
    if self._bar:
      self._bar.stop()

  def _rate(self, step: int) -> float:
    if step <= self._first:
      return 0.0
    elapsed = max(time.perf_counter() - self._start, 1e-9)
    return (step - self._first) / elapsed

  def update(self, step: int) -> None:
    """Tells that `step` steps are done."""
    if not self._started:  # The first call compiled; rates count from here.
      self._started = True
      self._start, self._first = time.perf_counter(), step
    if self._bar:
      rate = f'{self._rate(step):.1f} steps/s'
      self._bar.update(self._task, completed=step, rate=rate)

  def line(self, step: int, **scalars: float) -> None:
    """A line with numbers, above the bar or plain, with the time left."""
    numbers = '  '.join(f'{k} {v:.4g}' for k, v in scalars.items())
    text = f'{self._label} {step}/{self._total}  {numbers}'
    if self._bar:
      self._bar.console.print(text, highlight=False, soft_wrap=True)
      return
    rate = self._rate(step)
    if rate:
      left = duration((self._total - step) / rate)
      text += f'  {rate:.1f} steps/s  {left} left'
    say(text)


def table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """A table on stdout; the first column to the left, numbers to the right."""
  if jax.process_index() != 0:
    return
  shown = rich.table.Table()
  for i, column in enumerate(columns):
    shown.add_column(column, justify='left' if i == 0 else 'right')
  for row in rows:
    shown.add_row(*row)
  width = None if sys.stdout.isatty() else 100
  console = rich.console.Console(width=width, highlight=False)
  console.print(title, soft_wrap=True, markup=False)  # A path stays whole.
  console.print(shown)


# Errors.


def _fail(text: str, code: int):
  print(text, file=sys.stderr)
  sys.exit(code)


def guarded(function: Callable) -> Callable:
  """Ends a user error in one to three lines on stderr and exit code 2.

  An interrupted run ends with 128 + the signal's number. All other exceptions
  are our mistakes and keep their traceback.
  """

  @functools.wraps(function)
  def run(*args):
    try:
      return function(*args)
    except errors.UserError as e:
      _fail(f'error: {e}', 2)
    except runs.Interrupted as e:
      _fail(str(e), 128 + e.signal)
    except KeyboardInterrupt:
      _fail('interrupted.', 130)

  return run


def guarded_parser(function: Callable) -> Callable:
  """`guarded` for the parsing of flags, where absl and ml_collections raise."""

  @guarded
  def parse(argv):
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
  """What an exception of a flag says, without the traceback it may quote."""
  text = str(e.args[0]) if len(e.args) == 1 else str(e)
  text = text.strip() or type(e).__name__
  lines = [line.strip() for line in text.replace('\\n', '\n').splitlines()]
  lines = [line for line in lines if line]
  if isinstance(e, OSError):  # 'Failed loading config file', paths, reasons.
    return f'the config file cannot be loaded: {lines[-1]}'
  if 'Traceback (most recent call last):' in lines:
    return f'the config file fails: {lines[-1]}'
  text = ' '.join(lines).replace("\\'", "'")
  return text[1:-1] if text[0] == text[-1] and text[0] in '\'"' else text
