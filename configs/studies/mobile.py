"""MobileNetV2 at base width 8, half of its MACs: uniform, searched, tournament.

configs/studies/common.py has the command.
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
