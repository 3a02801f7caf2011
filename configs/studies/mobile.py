"""MobileNetV2 at base width 8, half of its MACs: uniform, searched, tournament.

  python main.py --config configs/studies/mobile.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/mobile.json ends;
`--config.report_only=True` prints its tables alone. `smoke` runs the code on
digits.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  base = common.contest()
  base.model.name = 'mobilenet_v2'
  base.model.base_width = 8
  base.budget.keep = (0.5,)
  return common.study(
    variant,
    'mobile',
    base=base,
    arms=('uniform', 'searched', 'tournament'),
    seeds=(100, 101, 102),
    baseline='uniform',
    smoke={
      'arms': ('tilt1+structure', 'uniform+structure'),
      'seeds': (0,),
      'baseline': '',
    },
  )
