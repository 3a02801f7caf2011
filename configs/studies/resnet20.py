"""The headline study on ResNet-20 at base width 8, 30 % of the MACs.

Only the first convolution of a block is gated; the residual stream stays.

  python main.py --config configs/studies/resnet20.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/resnet20.json ends;
`--config.report_only=True` prints its tables alone. `smoke` runs the code on
digits.
"""

from configs.studies import common

ARMS = (
  'searched',
  'uniform',
  'random',
  'searched+layer_mean',
  'searched+cost0.5',
  'searched+cost1',
  'shuffled',
  'full',
)


def get_config(variant='full'):
  """The study, or its smoke variant."""
  base = common.fashion()
  base.model.name = 'resnet20'
  base.model.base_width = 8
  return common.study(
    variant,
    'resnet20',
    base=base,
    arms=ARMS,
    seeds=(0, 1, 2, 3, 4),
    baseline='uniform',
    smoke={
      'base': common.digits('resnet20'),
      'arms': ('searched+layer_mean+structure', 'uniform'),
      'seeds': (0,),
    },
  )
