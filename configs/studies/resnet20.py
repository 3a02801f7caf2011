"""The headline study on ResNet-20 at base width 8, 30 % of the MACs.

Only the first convolution of a block is gated; the residual stream stays.

configs/studies/common.py has the command.
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
    smoke={'arms': ('searched+layer_mean+structure', 'uniform'), 'seeds': (0,)},
  )
