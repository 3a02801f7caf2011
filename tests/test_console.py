"""Words for durations, progress lines, and errors in a line or three."""

import io
import re
import sys

import pytest
from absl import flags

from pfs_jax import console, errors


@pytest.mark.parametrize(
  'seconds, expected',
  [
    (0, '0 s'),
    (0.4, '0 s'),
    (59.4, '59 s'),
    (59.6, '1 min 00 s'),
    (61, '1 min 01 s'),
    (200, '3 min 20 s'),
    (3599.4, '59 min 59 s'),
    (3600, '1 h 00 min'),
    (7500, '2 h 05 min'),
    (100 * 3600, '100 h 00 min'),
  ],
)
def test_durations_in_words(seconds, expected):
  assert console.duration(seconds) == expected


# Progress.


class Time:
  """A clock that goes when it is told."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(console.time, 'perf_counter', lambda: self.now)


def test_plain_lines_have_numbers_rate_and_time_left(monkeypatch, capsys):
  time = Time(monkeypatch)
  with console.Progress('train', 100) as progress:
    time.now += 60  # The first step compiles: it does not count.
    progress.update(10)
    time.now += 5
    progress.update(20)
    progress.line(20, loss=0.123456, accuracy=0.5)
  out, err = capsys.readouterr()
  assert out == (
    'train 20/100  2.0 steps/s  40 s left  loss 0.1235  accuracy 0.5\n'
  )
  assert err == ''


def test_rates_count_from_where_a_run_goes_on(monkeypatch, capsys):
  time = Time(monkeypatch)
  with console.Progress('train', 2000, done=1000) as progress:
    progress.update(1001)
    time.now += 10
    progress.update(1101)
    progress.line(1101, loss=1)
  # 100 steps in 10 s; 899 are left.
  assert '10.0 steps/s  1 min 30 s left' in capsys.readouterr().out


def test_a_line_after_one_call_has_no_rate_yet(monkeypatch, capsys):
  Time(monkeypatch)
  with console.Progress('train', 5) as progress:
    progress.update(5)
    progress.line(5, loss=1)
  out = capsys.readouterr().out
  assert out == 'train 5/5  loss 1\n'


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


def test_a_download_says_megabytes_now_and_then(monkeypatch, capsys):
  time = Time(monkeypatch)
  with console.Progress('images.gz', 40_000_000, unit='bytes') as progress:
    for done in range(0, 40_000_000, 2_000_000):
      progress.update(done)
      time.now += 1
  out, err = capsys.readouterr()
  assert out == '' and err == ('images.gz 20.0/40.0 MB  2.0 MB/s  10 s left\n')


def test_a_table_holds_all_cells_in_a_pipe(capsys):
  console.table(
    'Title', ['layer', 'MACs'], [['stem', '1,234'], ['stage1/block2', '56']]
  )
  out = capsys.readouterr().out
  for text in ('Title', 'layer', 'MACs', 'stem', '1,234', 'stage1/block2'):
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
  ],
)
def test_errors_of_the_user_end_in_a_line_and_a_code(error, code, text, capsys):
  with pytest.raises(SystemExit) as e:
    console.guarded(_raising(error))([])
  assert e.value.code == code
  out, err = capsys.readouterr()
  assert out == '' and err.startswith(text) and err.count('\n') == 1


def test_our_own_mistakes_keep_their_traceback():
  with pytest.raises(ZeroDivisionError):
    console.guarded(_raising(ZeroDivisionError()))([])


def test_a_guarded_function_returns_what_it_returns():
  assert console.guarded(lambda a, b: a + b)(1, 2) == 3


@pytest.mark.parametrize(
  'error, expected',
  [
    (flags.Error('Unknown command line flag'), 'Unknown command line flag'),
    (errors.UserError('no'), 'no'),
    (ValueError(''), 'ValueError'),
    (KeyError(), 'KeyError'),
    (
      AttributeError('\'lrr\'\nDid you mean "lr" instead of "lrr"?'),
      '\'lrr\' Did you mean "lr" instead of "lrr"?',
    ),
    (AttributeError('"quoted whole"'), 'quoted whole'),
    (KeyError("it\\'s"), "it's"),
    (
      ValueError('Traceback (most recent call last):\n  File x\nKeyError: 1\n'),
      'the config file fails: KeyError: 1',
    ),
    (OSError(''), 'the config file cannot be loaded: OSError'),
    (
      OSError('Failed loading config file\nlooked in a\nno such file: x.py'),
      'the config file cannot be loaded: no such file: x.py',
    ),
    (
      FileNotFoundError(2, 'No such file', 'x.py'),
      "the config file cannot be loaded: [Errno 2] No such file: 'x.py'",
    ),
  ],
)
def test_flags_fail_in_one_line(error, expected, capsys):
  with pytest.raises(SystemExit) as e:
    console.guarded_parser(_raising(error))(['main.py'])
  assert e.value.code == 2
  assert capsys.readouterr().err == f'error: {expected}\n'


def test_help_is_no_error():
  with pytest.raises(SystemExit) as e:
    console.guarded_parser(_raising(SystemExit(1)))(['main.py', '--help'])
  assert e.value.code == 0
