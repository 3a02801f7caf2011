"""How short can a search be, and when do the counts stop changing?

0 epochs leave all gates at 1: uniform width.

  python main.py --config configs/studies/search_length.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/search_length.json ends;
`--config.report_only=True` prints its tables alone. `smoke` runs the code on
digits.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'search_length',
    arms=('searched',),
    seeds=(0, 1, 2),
    field='search.epochs',
    values=(0.0, 1.0, 2.0, 5.0, 10.0),
    baseline='searched, epochs 2',
    smoke={
      'seeds': (0,),
      'values': (0.0, 1.0),
      'baseline': 'searched, epochs 0',
    },
  )
