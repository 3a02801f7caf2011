"""The budget: 10 to 70 % of the MACs, searched against uniform width.

  python main.py --config configs/studies/ratio.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/ratio.json ends;
`--config.report_only=True` prints its tables alone. `smoke` runs the code on
digits.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'ratio',
    arms=('searched', 'uniform'),
    seeds=(0, 1, 2),
    field='budget.keep',
    values=(0.1, 0.3, 0.5, 0.7),
    baseline='uniform',
    smoke={'seeds': (0,), 'values': (0.3, 0.5)},
  )
