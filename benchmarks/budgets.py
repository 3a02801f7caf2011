"""The tables of docs/budgets.md: the published cut beside the exact one.

  python -m benchmarks.budgets tests/golden

Needs the reference values of the published implementation (gates and answers).
"""

import json
import pathlib
import statistics
import sys
import time

import numpy as np

from pfs_jax import models, prune


def cases(golden: pathlib.Path):
  """(case, gates, cost model) of each recorded cut."""
  arrays = np.load(golden / 'bisection.npz')
  rows = json.loads((golden / 'bisection.json').read_text())
  for i, case in enumerate(rows):
    name, width = case['arch'].replace('_bn', ''), case['expanded_inchannel']
    imagenet = name.startswith('mobilenet') or name == 'resnet50'
    classes, size = (1000, 224) if imagenet else (10, 32)
    model = models.cost_model(name, classes, size, 3, width)
    parts = np.split(arrays[f'gates_{i:02d}'], np.cumsum(model.widths)[:-1])
    yield case, dict(zip(model.layers, parts, strict=True)), model


def label(case) -> str:
  """Such as 'resnet56/24, p 0.5'."""
  name = case['arch'].replace('_bn', '')
  return f'{name}/{case["expanded_inchannel"]}, p {case["ratio"]}'


def timed(function, *args, **kwargs):
  """(result, median milliseconds of 5 calls)."""
  times = []
  for _ in range(5):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    times.append(1000 * (time.perf_counter() - start))
  return result, statistics.median(times)


def published_table(golden: pathlib.Path) -> None:
  """The published answer against prune.fit, case by case."""
  print('| network, share to remove | budget | published | exact | exact, ms |')
  print('| --- | ---: | ---: | ---: | ---: |')
  over, under, exact, times, published_ms = 0, [], [], [], []
  for case, gates, model in cases(golden):
    budget = int(case['full_macs'] * (1 - case['ratio']))
    found, ms = timed(prune.fit, gates, model, budget)
    unused = budget - found.macs
    exact.append(unused / budget)
    times.append(ms)
    if 'fails' in case:
      answer = 'crashed: a layer without channels'
    else:
      assert found.macs <= budget
      arguments = (gates, model, case['ratio'], case['full_macs'])
      theirs, ms_published = timed(prune.published, *arguments)
      assert list(theirs.counts) == case['counts']
      published_ms.append(ms_published)
      gap = case['macs'] - budget
      over += gap > 0
      under += [-gap / budget] if gap <= 0 else []
      side = 'over' if gap > 0 else 'unused'
      answer = f'{abs(gap):,} {side} ({abs(gap) / budget:.3%})'
    print(
      f'| {label(case)} | {budget:,} | {answer} | {unused:,} unused '
      f'({unused / budget:.3%}) | {ms:.1f} |'
    )
  print(
    f'\nMedians: published {statistics.median(under):.3%} unused where under '
    f'({len(under)} cases), over the budget in {over} cases, '
    f'{statistics.median(published_ms):.1f} ms; exact '
    f'{statistics.median(exact):.3%} unused, never over, '
    f'{statistics.median(times):.1f} ms.\n'
  )


def rounded_table(golden: pathlib.Path) -> None:
  """Multiples inside the solver against rounding down afterwards."""
  print('| network | multiple | inside | rounded down after | gates kept |')
  print('| --- | ---: | ---: | ---: | ---: |')
  for case, gates, model in cases(golden):
    budget = int(case['full_macs'] * (1 - case['ratio']))
    for multiple in (8, 16, 32):
      try:
        inside = prune.fit(gates, model, budget, round_to=multiple)
      except prune.Infeasible as e:
        print(
          f'| {label(case)} | {multiple} | floor {e.floor / budget:.0%} of the '
          'budget: refused | | |'
        )
        continue
      free = prune.fit(gates, model, budget)
      least = np.array(prune.Budget(round_to=multiple).least(model))
      counts = np.maximum(np.array(free.counts) // multiple * multiple, least)
      after = model.macs(counts)
      ratio = kept_gates(gates, inside.counts) / kept_gates(gates, counts)
      print(
        f'| {label(case)} | {multiple} | {inside.macs / budget:.1%} | '
        f'{after / budget:.1%}{" (over)" if after > budget else ""} | '
        f'{ratio - 1:+.1%} |'
      )


def kept_gates(gates, counts) -> float:
  """Sum of the largest gates that the counts keep."""
  return sum(
    float(np.sort(g)[::-1][:n].sum())
    for g, n in zip(gates.values(), counts, strict=True)
  )


if __name__ == '__main__':
  published_table(pathlib.Path(sys.argv[1]))
  rounded_table(pathlib.Path(sys.argv[1]))
