"""Words for durations, progress lines, and errors in a line or three."""

import io
import re
import sys
import types

import pytest

from pfs_jax import console, errors


@pytest.mark.parametrize(
  'seconds, expected',
  [
    (0, '0 s'),
    (0.4, '0 s'),
    (59.4, '59 s'),
    (59.6, '1 min 00 s'),
    (61, '1 min 01 s'),
    (3599.4, '59 min 59 s'),
    (3600, '1 h 00 min'),
    (100 * 3600, '100 h 00 min'),
  ],
)
def test_durations_in_words(seconds, expected):
  assert console.duration(seconds) == expected


# Progress.


@pytest.fixture
def clock(monkeypatch):
  """A clock that goes when a test sets its `now`."""
  made = types.SimpleNamespace(now=1000.0)
  monkeypatch.setattr(console.time, 'perf_counter', lambda: made.now)
  return made


@pytest.mark.parametrize(
  'total, before, calls, line',
  [
    # The first call compiles: its 60 s do not count.
    (100, 0, [(60, 10), (5, 20)], '20/100  2.0 steps/s  40 s left'),
    # A run that goes on: 10 steps in 10 s, and 89 are left.
    (200, 100, [(0, 101), (10, 111)], '111/200  1.0 steps/s  1 min 29 s left'),
    (5, 0, [(0, 5)], '5/5'),  # There is no rate yet.
  ],
)
def test_plain_lines(clock, capsys, total, before, calls, line):
  """The calls are (seconds that pass, steps done)."""
  with console.Progress('train', total, before) as progress:
    for seconds, done in calls:
      clock.now += seconds
      progress.update(done)
    progress.line(done, loss=0.123456, accuracy=0.5)
  shown = f'train {line}  loss 0.1235  accuracy 0.5\n'
  assert capsys.readouterr() == (shown, '')


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch, capsys):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  monkeypatch.setenv('TERM', 'xterm')
  with console.Progress('search', 10) as progress:
    progress.update(1)
    progress.update(10)
    progress.line(10, loss=0.5)
  assert re.search('search 10/10  .* steps/s .*  loss 0.5', terminal.getvalue())
  assert capsys.readouterr().out == ''


def test_a_download_says_megabytes_now_and_then(clock, capsys):
  with console.Progress('images.gz', 40_000_000, unit='bytes') as progress:
    for done in range(0, 40_000_000, 2_000_000):
      progress.update(done)
      clock.now += 1
  said = 'images.gz 20.0/40.0 MB  2.0 MB/s  10 s left\n'
  assert capsys.readouterr() == ('', said)


def test_a_table_holds_all_cells_in_a_pipe(capsys):
  cells = [['stem[/b]', '1,234'], [99 * 'x', '56']]
  console.table('Title', ['layer', 'MACs'], cells)
  out = capsys.readouterr().out
  for text in ('Title', 'layer', 'MACs', 'stem[/b]', '1,234', 99 * 'x'):
    assert text in out
  assert '\x1b' not in out  # No colours where they would be noise.
  rows = [line for line in out.splitlines() if '1,234' in line or '56' in line]
  ends = [re.search(r'(1,234|56)', line).end() for line in rows]
  assert len(set(ends)) == 1  # Numbers to the right.


# Errors.


def _raising(error):
  def function(*_):
    raise error

  return function


@pytest.mark.parametrize(
  'error, code, text',
  [
    (errors.UserError('x must be 1; got 2.'), 2, 'error: x must be 1; got 2.'),
    (errors.UserError('got \x1b[31m'), 2, 'error: got ?[31m'),
    (
      errors.Interrupted(15, 'train step 3'),
      143,
      'stopped by SIGTERM at train step 3; saved. The same command continues.',
    ),
    (
      errors.Interrupted(2, 'step 3'),
      130,
      'stopped by SIGINT at step 3; saved.',
    ),
    (KeyboardInterrupt(), 130, 'interrupted.'),
    (PermissionError(13, 'Denied', 'x'), 2, 'error: x cannot be used: Denied.'),
    (OSError(28, 'No space left'), 2, 'error: No space left.'),
    (MemoryError('No 9 GiB'), 2, 'error: not enough memory: No 9'),
    (RuntimeError('RESOURCE_EXHAUSTED: 1\n2'), 2, 'error: not enough memory'),
    (BrokenPipeError(32, 'Broken pipe'), 1, 'error: the reader of the'),
  ],
)
def test_errors_of_the_user_end_in_a_line_and_a_code(error, code, text, capsys):
  with pytest.raises(SystemExit) as e:
    console.guarded(_raising(error))([])
  assert e.value.code == code
  out, err = capsys.readouterr()
  assert out == '' and err.startswith(text) and err.count('\n') == 1


def test_an_output_that_is_full_keeps_the_exit_code(monkeypatch):
  monkeypatch.setattr(sys, 'stdout', full := open('/dev/full', 'w'))
  with pytest.raises(SystemExit):
    console.guarded(lambda: print() or _raising(errors.UserError('no'))())()
  assert sys.stdout is not full  # Python flushes it at its end.
  sys.stdout.close()
  with pytest.raises(OSError):
    full.close()


def test_a_guarded_function_returns_and_keeps_the_traceback_of_our_mistakes():
  assert console.guarded(lambda a, b: a + b)(1, 2) == 3
  with pytest.raises(ZeroDivisionError):
    console.guarded(_raising(ZeroDivisionError()))([])


@pytest.mark.parametrize(
  'error, expected',
  [
    (errors.UserError('no'), 'no'),
    (ValueError(''), 'ValueError'),
    (KeyError(), 'KeyError'),
    (TypeError('"quoted whole"'), 'quoted whole'),
    (KeyError("it\\'s"), "it's"),
    (
      ValueError('Traceback (most recent call last):\n  x\na.UserError: no\n'),
      'the config file fails: no',
    ),
    (OSError(''), 'the config file cannot be loaded: OSError'),
  ],
)
def test_flags_fail_in_one_line(error, expected, capsys):
  with pytest.raises(SystemExit) as e:
    console.guarded_parser(_raising(error))(['main.py'])
  assert e.value.code == 2
  assert capsys.readouterr().err == f'error: {expected}\n'
