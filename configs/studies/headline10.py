"""The headline study at 10 % of the MACs.

configs/studies/common.py has the command.
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
