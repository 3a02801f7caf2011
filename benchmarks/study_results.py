"""Writes the tables and pictures of RESULTS.md anew from results/*.json.

  python -m benchmarks.study_results

A table stands between `<!-- NAME -->` and `<!-- end -->`, NAME being that of a
study, 'NAME similarity' for its table of structures, or 'NAME counts' for the
mean share kept of each layer. 'NAME picture P' is the picture P of the study's
report, kept as results/pictures/NAME-P.svg. What stands there is replaced.
Nothing is run.
"""

import functools
import importlib
import pathlib
import re

import numpy as np

from pfs_jax.report import study_page
from pfs_jax.studies import plan, results

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = 'results/pictures'
_PLACE = re.compile(
  r'<!-- (\w+)((?: similarity| counts| picture \w+)?) -->\n.*?<!-- end -->',
  re.DOTALL,
)


def markdown(columns, rows):
  """A table in Markdown; the first column to the left, numbers to the right."""
  rule = ['---', *['---:'] * (len(columns) - 1)]
  return '\n'.join(
    '| ' + ' | '.join(row) + ' |' for row in [columns, rule, *rows]
  )


def counts(records):
  """Mean share kept of each layer, by arm and variation."""
  rows = []
  for label, group in results.grouped(records).items():
    mean = np.mean([results.shares(r) for r in group], axis=0)
    rows.append([label, str(len(group)), *(f'{100 * v:.0f}' for v in mean)])
  return ['share kept, %', 'n', *records[0]['counts']], rows


@functools.cache
def study_of(name):
  """(study, finished records), from the committed results."""
  study = importlib.import_module(f'configs.studies.{name}').get_config()
  study.results_dir = str(ROOT / 'results')
  return study, results.mine(study, ROOT)


def table(study, records, kind):
  """A table of a study."""
  if kind == 'counts':
    return markdown(*counts(records))
  if kind == 'similarity':
    columns = ['between', *results.SIMILARITY_COLUMNS]
    return markdown(columns, results.similarity_rows(records))
  against = results.against(study)
  against = f'against {against}' if against else 'difference'
  columns = ['arm', 'n', 'mean', 'sd', against, '95 %', 'MACs', 'seconds']
  return markdown(columns, results.rows(study, records))


@functools.cache
def pictures(name):
  """{name: picture} of a study's report."""
  study, _ = study_of(name)
  return {p.name: p for p in study_page.build(study, ROOT / 'unused')[1]}


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
      found[f'{PICTURES}/{name}-{shown.name}.svg'] = shown.svg
  return found


def filled(text):
  """The text with every table and picture as the results are."""

  def new(match):
    name, kind = match[1], match[2].strip()
    study, records = study_of(name)
    shown = picture(name, kind) if kind.startswith('picture') else None
    if shown:
      body = f'![{shown.alt}]({PICTURES}/{name}-{shown.name}.svg)'
    elif not records or kind.startswith('picture'):
      body = '(not run yet)'
    else:
      body = table(study, records, kind)
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
