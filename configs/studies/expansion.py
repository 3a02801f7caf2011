"""Channel expansion: searched networks of 0.5 to 2 times the base width.

All cut to 30 % of the MACs at base width 16. At width 8 the whole network costs
25 %: nothing is cut.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'expansion',
    arms=('searched',),
    seeds=(0, 1, 2),
    field='model.width',
    values=(8, 12, 16, 20, 24, 32),
    baseline='searched, width 16',
    smoke={
      'arms': ('searched+structure',),
      'seeds': (0,),
      'values': (2, 3),
      'baseline': '',
    },
  )
