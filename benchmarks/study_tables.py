"""Writes the tables of RESULTS.md anew from results/*.json.

  python -m benchmarks.study_tables

A table stands between `<!-- NAME -->` and `<!-- end -->`, NAME being that of a
study, 'NAME similarity' for its table of structures, or 'NAME counts' for the
mean share kept of each layer; what stands there is replaced. Nothing is run.
"""

import importlib
import pathlib
import re

import numpy as np

from pfs_jax.studies import results

ROOT = pathlib.Path(__file__).parents[1]


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


def table(name, kind):
  """The table of a study, from the committed results."""
  module = importlib.import_module(f'configs.studies.{name}')
  study = module.get_config()
  study.results_dir = str(ROOT / 'results')
  records = results.mine(study, ROOT)
  if not records:
    return '(not run yet)'
  if kind == 'counts':
    return markdown(*counts(records))
  if kind == 'similarity':
    columns = ['between', 'pairs', 'correlation', 'overlap', 'by chance']
    return markdown(columns, results.similarity_rows(records))
  against = f'against {study.baseline}' if study.baseline else 'difference'
  columns = ['arm', 'n', 'mean', 'sd', against, '95 %', 'MACs', 'seconds']
  return markdown(columns, results.rows(study, records))


def main():
  """Replaces every table."""
  path = ROOT / 'RESULTS.md'
  pattern = r'<!-- (\w+)( similarity| counts)? -->\n.*?<!-- end -->'

  def new(match):
    name, kind = match[1], (match[2] or '').strip()
    opening = f'<!-- {name}{match[2] or ""} -->'
    return f'{opening}\n\n{table(name, kind)}\n\n<!-- end -->'

  path.write_text(re.sub(pattern, new, path.read_text(), flags=re.DOTALL))


if __name__ == '__main__':
  main()
