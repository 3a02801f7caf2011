"""The sparsity ratio r, the mean gate that a search aims at.

  python main.py --config configs/studies/sparsity.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/sparsity.json ends;
`--config.report_only=True` prints its tables alone. `smoke` runs the code on
digits.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'sparsity',
    arms=('searched',),
    seeds=(0, 1, 2),
    field='search.sparsity',
    values=(0.1, 0.2, 0.5, 0.7, 0.9),
    baseline='searched, sparsity 0.5',
    smoke={
      'seeds': (0,),
      'values': (0.2, 0.5),
    },
  )
