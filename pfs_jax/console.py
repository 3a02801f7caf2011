"""What the terminal shows: progress and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import rich.console
import rich.progress
import rich.table

import jax


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
    self._bar = None
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
    elapsed = max(time.perf_counter() - self._start, 1e-9)
    return (step - self._first) / elapsed

  def update(self, step: int) -> None:
    """Tells that `step` steps are done."""
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
    left = (self._total - step) / rate if rate else 0.0
    say(f'{text}  {rate:.1f} steps/s  {duration(left)} left')


def table(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
  """A table on stdout; the first column to the left, numbers to the right."""
  if jax.process_index() != 0:
    return
  shown = rich.table.Table(title=title, title_justify='left')
  for i, column in enumerate(columns):
    shown.add_column(column, justify='left' if i == 0 else 'right')
  for row in rows:
    shown.add_row(*row)
  width = None if sys.stdout.isatty() else 100
  rich.console.Console(width=width, highlight=False).print(shown)
