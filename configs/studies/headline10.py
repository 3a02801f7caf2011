"""The headline study at 10 % of the MACs.

  python main.py --config configs/studies/headline10.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/headline10.json ends;
`--config.report_only=True` prints its tables alone. `smoke` runs the code on
digits.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  base = common.fashion()
  base.budget.keep = (0.1,)
  return common.study(
    variant,
    'headline10',
    base=base,
    arms=common.HEADLINE_ARMS,
    seeds=(0, 1, 2, 3, 4),
    baseline='uniform',
    smoke={
      'arms': ('shuffled+structure', 'random+structure', 'full+structure'),
      'seeds': (0,),
      'baseline': '',
    },
  )
