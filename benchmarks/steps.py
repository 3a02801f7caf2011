"""Where the time of a step goes, for every family.

  python -m benchmarks.steps                     # all nets, or some:
  python -m benchmarks.steps resnet20 vgg16

Two processes for each net and step. The first takes the median time of a step
on all cores. The second runs on one core, where XLA runs one operation after
the other, and adds up the times that JAX's profiler notes for each of them; on
several cores it would note only how long an operation took to be handed out. An
operation belongs to the first part below whose words its program text holds.
The table is printed and written to docs/speed.md.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import versus_pytorch

STEPS = 5
# Part -> words of an operation's own text or of the operations fused in it.
PARTS = {
  'convolutions': r' (convolution|dot)\(',
  'transposes': r' transpose\(',
  'sums': r' (reduce|reduce-window)\(',
  'shifts': r' (pad|slice|concatenate)\(',
  'rest': r'',
}
COLUMNS = ('forward', 'gradient', *list(PARTS)[1:])


def operations(program: str) -> dict[str, str]:
  """{name: text, with that of the operations fused in it} of a program."""
  found, bodies, body = {}, {}, []
  for line in program.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      body = bodies.setdefault(line.split()[line.startswith('ENTRY')], [])
    elif match := re.match(r' +(?:ROOT )?(%[\w.-]+) = ', line):
      body.append(line)
      found[match[1]] = line
  for name, line in found.items():
    called = re.search(r'calls=(%[\w.-]+)', line)
    if called:
      found[name] = '\n'.join([line, *bodies.get(called[1], [])])
  return found


def column(text: str) -> str:
  """The column of the table that an operation belongs to."""
  part = next(name for name, words in PARTS.items() if re.search(words, text))
  if part != 'convolutions':
    return part
  # A kernel's gradient loses its name where XLA transposes its operands.
  is_forward = 'op_name' in text and 'transpose(jvp' not in text
  return 'forward' if is_forward else 'gradient'


def profiled(name: str, mode: str) -> dict[str, float]:
  """{column: milliseconds of a step on the one core of this process}."""
  import jax

  step, state, x, y = versus_pytorch.our_step(name, mode)
  program = step.lower(state, x, y).compile()
  state, _ = jax.block_until_ready(program(state, x, y))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        state, _ = jax.block_until_ready(program(state, x, y))
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    profile = jax.profiler.ProfileData.from_file(str(path))
  texts = operations(program.as_text())
  found: collections.Counter[str] = collections.Counter()
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        operation = dict(event.stats).get('hlo_op')
        if operation is not None:
          text = texts.get(f'%{operation}', '')
          found[column(text)] += event.duration_ns / 1e6 / STEPS
  return {name: round(found[name], 1) for name in COLUMNS}


def timed(name: str, mode: str) -> dict[str, float]:
  """{'step': median milliseconds on all cores}."""
  import jax

  step, state, x, y = versus_pytorch.our_step(name, mode)
  times = []
  for _ in range(STEPS + 2):
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, x, y))
    times.append(1000 * (time.perf_counter() - start))
  return {'step': round(float(np.median(times[2:])), 1)}


def measured(name: str, mode: str) -> dict[str, float]:
  """Both kinds of times, each from a process of its own."""
  found = {}
  for kind in ('timed', 'profiled'):
    command = [sys.executable, '-m', 'benchmarks.steps', name]
    done = subprocess.run(
      [*command, f'--{kind}={mode}'],
      cwd=versus_pytorch.ROOT,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    found |= json.loads(done.stdout)
  return found


def row(name: str, mode: str, times: dict[str, float]) -> str:
  """A row of the table: the step, and the shares of its parts in per cent."""
  total = sum(times[c] for c in COLUMNS)
  shares = ' | '.join(f'{100 * times[c] / total:.0f}' for c in COLUMNS)
  step = f'{times["step"]:.0f} | {total:.0f}'
  return f'| {name}, {mode} | {step} | {shares} |'


def main() -> None:
  """Measures the nets asked for; prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='*', default=list(versus_pytorch.FAMILIES))
  parser.add_argument('--timed', help='(one of the processes)')
  parser.add_argument('--profiled', help='(one of the processes)')
  args = parser.parse_args()
  if args.timed:
    print(json.dumps(timed(args.names[0], args.timed)))
    return
  if args.profiled:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(json.dumps(profiled(args.names[0], args.profiled)))
    return
  titles = ' | '.join(COLUMNS)
  lines = [
    f'| net, step | ms | ms on one core | {titles} |',
    '| --- |' + ' ---: |' * (2 + len(COLUMNS)),
  ]
  print('\n'.join(lines))
  for name in args.names:
    for mode in versus_pytorch.VARIANTS:
      lines.append(row(name, mode, measured(name, mode)))
      print(lines[-1], flush=True)
  versus_pytorch.write_table('steps', '\n'.join(lines) + '\n')


if __name__ == '__main__':
  main()
