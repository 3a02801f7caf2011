"""Writes the tables and pictures of RESULTS.md anew from results/*.json.

  python -m benchmarks.study_results

A table stands between `<!-- NAME -->` and `<!-- end -->`, where NAME is that of
a study. It compares the arms by accuracy; 'NAME loss' compares them by test
loss. 'NAME similarity' is the study's table of structures, 'NAME counts' the
mean share that the arms keep of each layer, 'NAME parameters' their numbers of
parameters, 'NAME costs' what finding a structure took, and 'NAME picture P' the
picture P of its report, kept as results/pictures/NAME-P.svg. What stands there
is replaced. No study is run.
"""

import collections
import functools
import importlib
import pathlib
import re

import numpy as np

from pfs_jax import tables as writers
from pfs_jax.report import figures, study_page
from pfs_jax.studies import plan, results, tables

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = 'results/pictures'
_PLACE = re.compile(
  r'<!-- (\w+)((?: loss| similarity| counts| parameters| costs| picture \w+)?)'
  r' -->\n.*?<!-- end -->',
  re.DOTALL,
)


@functools.cache
def study_of(name):
  """(study, finished records), from the committed results.

  The name is that of a config, or with '_front' the variant front of it.
  """
  folder, variant = ROOT / 'configs' / 'studies', 'full'
  if not (folder / f'{name}.py').exists():
    name, _, variant = name.rpartition('_')
  module = importlib.import_module(f'configs.studies.{name}')
  study = module.get_config(variant)
  study.results_dir = str(ROOT / 'results')
  return study, results.mine(study, ROOT)


@functools.cache
def pictures(name):
  """{name: (name, caption, SVG)} of the pictures of a study's report."""
  study, _ = study_of(name)
  with figures.style():
    page = study_page.build(study, ROOT / 'unused')
  return {n: (n, page.captions[n], svg) for n, svg in page.pictures.items()}


def picture(name, kind):
  """The picture that 'picture P' means; None until enough cells are there."""
  study, records = study_of(name)
  found = pictures(name).get(kind.split()[1]) if records else None
  if found is None and len(records) == len(plan.cells(study)):
    raise KeyError(f'{name} has no {kind}')
  return found


def drawn(text):
  """{path: bytes} of the pictures that a text asks for."""
  found = {}
  for name, kind in _PLACE.findall(text):
    shown = picture(name, kind) if ' picture ' in kind else None
    if shown:
      found[f'{PICTURES}/{name}-{shown[0]}.svg'] = shown[2]
  return found


def costs(records):
  """Seconds of search, probe or tournament, and what tournaments chose."""
  rows = []
  for label, group in tables.grouped(records).items():
    found = [r.get('tournament', {}) for r in group]
    seconds = [
      r.get('search_seconds') or r.get('probe_seconds') or t.get('seconds', 0)
      for r, t in zip(group, found, strict=True)
    ]
    trained = [r['seconds'] for r in group]
    share = np.median(np.divide(seconds, trained))
    chosen = collections.Counter(t['chosen'] for t in found if t)
    said = ', '.join(f'{n} x {name}' for name, n in chosen.most_common())
    medians = f'{np.median(seconds):.0f}', f'{np.median(trained):.0f}'
    rows.append([label, str(len(group)), *medians, f'{share:.2f}', said])
  columns = ('seconds to find', 'seconds to train', 'share', 'chosen')
  return writers.Table('Costs, medians', ['arm', 'n', *columns], rows)


def parameters(records):
  """Parameters of the arms that are cut to the MACs of uniform width."""
  groups = tables.grouped(records)
  uniform = np.mean([r['params'] for r in groups['uniform']])
  rows = []
  for label, group in groups.items():
    found = [r['params'] for r in group]
    if label != 'full':
      numbers = min(found), round(np.mean(found)), max(found)
      share = f'{np.mean(found) / uniform:.2f}'
      rows.append([label, str(len(group)), *(f'{n:,}' for n in numbers), share])
  columns = ('least', 'mean', 'most', 'share of uniform')
  return writers.Table('Parameters', ['arm', 'n', *columns], rows)


def filled(text):
  """The text with every table and picture as the results are."""

  def new(match):
    name, kind = match[1], match[2].strip()
    study, records = study_of(name)
    shown = picture(name, kind) if kind.startswith('picture') else None
    if shown:
      body = f'![{shown[1]}]({PICTURES}/{name}-{shown[0]}.svg)'
    elif not records or kind.startswith('picture'):
      body = '(not run yet)'
    else:
      table = {
        '': lambda: tables.comparison(study, records),
        'loss': lambda: tables.comparison(study, records, tables.LOSS),
        'costs': lambda: costs(records),
        'parameters': lambda: parameters(records),
        'counts': lambda: tables.counts(tables.grouped(records)),
        'similarity': lambda: tables.similarity(records),
      }[kind]()
      body = writers.markdown('', *table[1:])
    return f'<!-- {name}{match[2]} -->\n\n{body}\n\n<!-- end -->'

  return _PLACE.sub(new, text)


def main():
  """Replaces every table and picture."""
  page = ROOT / 'RESULTS.md'
  text = page.read_text()
  (ROOT / PICTURES).mkdir(exist_ok=True)
  for path, content in drawn(text).items():
    (ROOT / path).write_bytes(content)
  page.write_text(filled(text))


if __name__ == '__main__':
  main()
