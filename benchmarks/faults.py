"""A campaign of faults: kills, damage, full disks, NaN, two processes.

  python -m benchmarks.faults [--minutes=10] [--seed=1] [--table=FILE.md]

Every trial prints its seed. Whatever happens, a run must end with the numbers
of an undisturbed run, or with an error of one to three lines, and the same
command must go on after it. The table of what was tried and survived is put
into the Markdown file of --table. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from benchmarks import damage
from configs import digits

FIELDS = {
  **{'model.base_width': 2, 'model.width': 3, 'search.epochs': 3.0},
  **{'train.epochs': 4.0, 'train.reference': False},
  **{'checkpoint_steps': 5, 'log_steps': 4},
}
ENVIRONMENT = {
  **os.environ,
  **{'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
  'PFS_JAX_HEARTBEAT': '5',
}
PROMISES = {
  'SIGKILL at a random moment': (
    'The same command continues and gives the same bits: gates, structure, '
    'weights, accuracy, metrics.'
  ),
  'damage to one file': (
    'Every mode gives the same numbers, or refuses in one to three lines with '
    'exit code 2.'
  ),
  'full disk': (
    'One to three lines with exit code 2 say what could not be written and how '
    'much is missing; no incomplete file stays; with more space the same '
    'command ends with the same bits.'
  ),
  'numbers that are not finite': (
    'The training stops in one line with exit code 2 and keeps the last good '
    'state.'
  ),
  'SIGKILL of one of two processes': (
    'The other one ends within a minute with one line that names the dead one; '
    'the same commands end with the same bits.'
  ),
  'read-only folder': (
    'A finished run can be evaluated, exported and reported elsewhere, and '
    'shown; nothing is written into it.'
  ),
  'long run': 'Resident memory, open files and threads stay flat.',
}


class Wrong(Exception):
  """A promise that was not kept."""


def expect(condition: bool, what: str) -> None:
  """Raises `Wrong` unless a condition holds."""
  if not condition:
    raise Wrong(what)


def arguments(mode: str, workdir: pathlib.Path, **fields) -> list[str]:
  """The command line of one mode."""
  return [
    *(sys.executable, 'main.py', '--config=configs/digits.py'),
    *(f'--mode={mode}', f'--workdir={workdir}'),
    *(f'--config.{k}={v}' for k, v in {**FIELDS, **fields}.items()),
  ]


def start(command: Sequence[str], devices: int = 1) -> subprocess.Popen:
  """Starts a command; its output is kept."""
  return subprocess.Popen(
    command,
    env={**ENVIRONMENT, 'JAX_NUM_CPU_DEVICES': str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen, timeout: float = 900) -> tuple[int, str]:
  """(exit code, stderr); a process that hangs is killed and is wrong."""
  try:
    _, shown = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    raise Wrong(f'it hung for {timeout:.0f} s') from None
  return process.returncode, shown


def succeed(process: subprocess.Popen) -> None:
  """Waits for a command that must succeed."""
  code, shown = finish(process)
  expect(code == 0, f'exit code {code}: {shown[-500:]}')


def refused(code: int, shown: str, expected: int = 2) -> str:
  """What a command that must be refused said, in one to three lines."""
  lines = [line for line in shown.splitlines() if line.strip()]
  expect(code == expected, f'exit code {code}: {shown[-500:]}')
  expect(1 <= len(lines) <= 3, f'{len(lines)} lines: {shown[-1500:]}')
  return shown


def outcome(workdir: pathlib.Path) -> dict[str, object]:
  """What must be equal to the last bit, whatever happened on the way."""
  result = json.loads((workdir / 'result.json').read_text())
  found: dict[str, object] = {
    'accuracy': result['test_accuracy'],
    'counts': result['counts'],
  }
  with np.load(workdir / 'search' / 'gates.npz') as gates:
    found['gates'] = {k: gates[k].tobytes() for k in gates}
  for stage in ('search', 'train'):
    lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found[stage] = [{**r, 'seconds': 0} for r in records]
  checks = (workdir / 'train' / 'checkpoints').glob('*/default/check.json')
  found['weights'] = max(checks, key=lambda p: int(p.parts[-3])).read_text()
  return found


def same(workdir: pathlib.Path, reference: pathlib.Path) -> None:
  """Raises `Wrong` where two finished runs differ."""
  found, expected = outcome(workdir), outcome(reference)
  differ = [k for k in expected if found[k] != expected[k]]
  expect(not differ, f'{", ".join(differ)} differ')


class Campaign:
  """The faults, each a method that takes a random generator.

  Args:
    folder: For everything.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.reference = folder / 'reference'
    self.two_reference = folder / 'two'
    began = time.monotonic()
    succeed(start(arguments('run', self.reference)))
    self.seconds = time.monotonic() - began
    self.answers: dict[str, str] = {}
    self.config = digits.get_config()
    self.config.update_from_flattened_dict(FIELDS)

  def scratch(self) -> pathlib.Path:
    """A folder that is not there."""
    shutil.rmtree(self.folder / 'scratch', ignore_errors=True)
    return self.folder / 'scratch'

  def kill(self, rng: random.Random) -> str:
    """SIGKILL, once to three times in one run."""
    workdir, kills = self.scratch(), 0
    for _ in range(rng.choice([1, 1, 2, 3])):
      process = start(arguments('run', workdir))
      delay = rng.uniform(0, 1.1 * self.seconds)
      try:
        process.communicate(timeout=delay)
      except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        kills += 1
    succeed(start(arguments('run', workdir)))
    same(workdir, self.reference)
    return f'{kills} kills'

  def damaged(self, rng: random.Random) -> str:
    """One damage to one file, under one mode, in this process."""
    mode = rng.choice(damage.MODES)
    if mode not in self.answers:
      workdir = shutil.copytree(self.reference, self.scratch())
      found = damage.answer(mode, self.config, workdir)
      expect(isinstance(found, str), f'{mode}: {found}')
      self.answers[mode] = str(found)
    paths = [p for p in damage.files(self.reference) if p.name != '.lock']
    inside = [p for p in paths if 'checkpoints' in p.parts]
    others = [p for p in paths if p not in inside]
    path = rng.choice(inside if rng.random() < 0.3 else others)
    kind = rng.choice(damage.KINDS)
    try:
      found = damage.check(
        mode,
        self.reference,
        self.scratch(),
        self.config,
        self.answers[mode],
        path,
        kind,
        str(rng.random()),
      )
    except AssertionError as e:
      raise Wrong(str(e)) from e
    return f'{mode}, {path}, {kind}: {found}'

  def full(self, rng: random.Random) -> str:
    """A small tmpfs that fills; then a larger one."""
    place = self.scratch()
    place.mkdir()
    size = int(2 ** rng.uniform(3, 10.5))
    if not _mount(place, f'size={size}k'):
      return ''
    try:
      workdir = place / 'w'
      code, shown = finish(start(arguments('run', workdir)))
      if code:
        shown = refused(code, shown)
        expect('No space left' in shown, shown)
        left = [p.name for p in workdir.rglob('*') if 'tmp' in p.name]
        expect(not left, f'left behind: {left}')
      subprocess.run(
        ['mount', '-o', 'remount,size=64m', str(place)], check=True
      )
      succeed(start(arguments('run', workdir)))
      same(workdir, self.reference)
    finally:
      subprocess.run(['umount', str(place)], check=True)
    return f'{size} kB: exit code {code}'

  def not_finite(self, rng: random.Random) -> str:
    """A learning rate with which the weights overflow."""
    rate = 10.0 ** rng.uniform(5, 6)
    workdir = shutil.copytree(self.reference, self.scratch())
    for name in ('train', 'result.json'):
      path = workdir / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = arguments('run', workdir, **{'train.learning_rate': rate})
    shown = refused(*finish(start(command)))
    expect('is nan at' in shown or 'is inf at' in shown, shown)
    expect(not (workdir / 'result.json').exists(), 'there is a result')
    return f'learning rate {rate:.1g}'

  def two(self, rng: random.Random) -> str:
    """SIGKILL of one of two processes."""
    if not self.two_reference.exists():
      for process in self._pair(self.two_reference):
        succeed(process)
    workdir, victim = self.scratch(), rng.randrange(2)
    pair = self._pair(workdir)
    delay = rng.uniform(0.2, 1.3) * self.seconds
    time.sleep(delay)
    running = pair[victim].poll() is None
    pair[victim].kill()
    began = time.monotonic()
    code, shown = finish(pair[1 - victim])
    took = time.monotonic() - began
    finish(pair[victim])
    if running and code:
      refused(code, shown, 1)
      expect(took < 60, f'it took {took:.0f} s')
    for process in self._pair(workdir):
      succeed(process)
    same(workdir, self.two_reference)
    return f'process {victim} after {delay:.0f} s: exit code {code}'

  def _pair(self, workdir: pathlib.Path) -> list[subprocess.Popen]:
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      where = f'--coordinator=127.0.0.1:{s.getsockname()[1]}'
    return [
      start(
        [*arguments('run', workdir), where, '--processes=2', f'--process={i}'],
        devices=2,
      )
      for i in range(2)
    ]

  def read_only(self, rng: random.Random) -> str:
    """Every mode that reads, on a finished run that cannot be written."""
    workdir = shutil.copytree(self.reference, self.scratch())
    out = self.folder / 'out'
    shutil.rmtree(out, ignore_errors=True)
    if not _mount(workdir, 'bind', str(workdir)):
      return ''
    try:
      subprocess.run(
        ['mount', '-o', 'remount,ro,bind', str(workdir)], check=True
      )
      before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
      modes = ['run', 'eval', 'info', 'train', 'export', 'report']
      for mode in rng.sample(modes, 3):
        more = [f'--out={out / mode}'] if mode in ('export', 'report') else []
        succeed(start([*arguments(mode, workdir), *more]))
      after = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
      expect(before == after, 'something was written')
    finally:
      subprocess.run(['umount', str(workdir)], check=True)
    return 'three modes'

  def long_run(self, rng: random.Random, seconds: float) -> str:
    """Memory, open files and threads of one training, beside the faults."""
    workdir = self.folder / 'long'
    fields = {'search.epochs': 0.2, 'train.epochs': 1e5, 'checkpoint_steps': 50}
    process = start(['nice', *arguments('run', workdir, **fields)])
    samples, end = [], time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
      time.sleep(seconds / 60)
      samples.append(_usage(process.pid))
    process.send_signal(signal.SIGTERM)
    code, shown = finish(process)
    expect(code == 128 + signal.SIGTERM, f'exit code {code}: {shown[-500:]}')
    warm, last = samples[len(samples) // 6], samples[-1]
    text = '; '.join(
      f'{name} {a:,.0f} -> {b:,.0f}{unit}'
      for name, a, b, unit in zip(
        ('memory', 'files', 'threads'), warm, last, (' MB', '', ''), strict=True
      )
    )
    text = f'{seconds / 60:.0f} min: {text}'
    flat = last[0] < 1.05 * warm[0] and last[1:] == warm[1:]
    expect(flat, text)
    return text


def _mount(place: pathlib.Path, options: str, what: str = 'tmpfs') -> bool:
  kind = ['--bind'] if options == 'bind' else ['-t', 'tmpfs', '-o', options]
  done = subprocess.run(
    ['mount', *kind, what, str(place)], capture_output=True, text=True
  )
  return done.returncode == 0


def _usage(pid: int) -> tuple[float, int, int]:
  """(resident MB, open files, threads) of a process."""
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  number = {
    name: int(re.search(rf'^{name}:\s+(\d+)', status, re.M)[1])
    for name in ('VmRSS', 'Threads')
  }
  files = len(os.listdir(f'/proc/{pid}/fd'))
  return number['VmRSS'] / 1024, files, number['Threads']


def campaign(minutes: float, seed: int) -> dict[str, collections.Counter]:
  """Runs all faults in turn until the time is over; what came of each."""
  end = time.monotonic() + 60 * minutes
  found = {name: collections.Counter() for name in PROMISES}
  with tempfile.TemporaryDirectory() as folder:
    made = Campaign(pathlib.Path(folder))
    turns: list[tuple[str, Callable[[random.Random], str], int]] = [
      ('damage to one file', made.damaged, 25),
      ('SIGKILL at a random moment', made.kill, 1),
      ('full disk', made.full, 1),
      ('numbers that are not finite', made.not_finite, 1),
      ('SIGKILL of one of two processes', made.two, 1),
      ('read-only folder', made.read_only, 1),
    ]
    number, seconds = 0, 60 * minutes
    with futures.ThreadPoolExecutor() as pool:
      pool.submit(
        *(trial, 'long run', lambda r: made.long_run(r, seconds)),
        *(f'{seed}/long', found),
      )
      while time.monotonic() < end:
        for name, fault, times in turns:
          for _ in range(times):
            if time.monotonic() < end:
              trial(name, fault, f'{seed}/{number}', found)
              number += 1
  return found


def trial(name, fault, seed: str, found) -> None:
  """One fault; prints and counts what came of it."""
  try:
    said = fault(random.Random(seed))
    kind = 'survived' if said else 'skipped: needs root'
    if said.endswith('not done'):  # This damage does not fit this file.
      return
  except Wrong as e:
    kind, said = 'wrong', str(e)
  except Exception:
    kind, said = 'wrong', traceback.format_exc()
  found[name][kind] += 1
  if name == 'long run':
    found[name][said] = 0
  print(f'{name} [{seed}] {kind}: {said}', flush=True)


def table(found, minutes: float, seed: int) -> str:
  """What was tried, in Markdown."""
  lines = [
    f'`python -m benchmarks.faults --minutes={minutes:g} --seed={seed}` on '
    f'{platform.machine()}, {os.cpu_count()} cores:',
    '',
    '| fault | tried | survived | promise |',
    '| --- | ---: | ---: | --- |',
  ]
  for name, counts in found.items():
    tried = counts['survived'] + counts['wrong']
    more = ''.join(f' ({k})' for k in counts if not counts[k] and 'min' in k)
    skipped = next((f' ({k})' for k in counts if 'root' in k), '')
    lines.append(
      f'| {name}{skipped} | {tried} | {counts["survived"]} | '
      f'{PROMISES[name]}{more} |'
    )
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the campaign and writes its table; 1 if a promise was not kept."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--minutes', type=float, default=10.0)
  parser.add_argument('--seed', type=int, default=random.randrange(10**6))
  parser.add_argument('--table', type=pathlib.Path)
  asked = parser.parse_args(argv)
  print(f'seed {asked.seed}', flush=True)
  found = campaign(asked.minutes, asked.seed)
  text = table(found, asked.minutes, asked.seed)
  print(text)
  if asked.table:
    marks = '<!-- faults -->\n', '\n<!-- end -->'
    before, _, rest = asked.table.read_text().partition(marks[0])
    after = rest.partition(marks[1])[2]
    asked.table.write_text(before + marks[0] + text + marks[1] + after)
  return int(any(counts['wrong'] for counts in found.values()))


if __name__ == '__main__':
  sys.exit(main())
