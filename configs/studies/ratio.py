"""The budget: 10 to 70 % of the MACs, searched against uniform width.

configs/studies/common.py has the command.
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
    smoke={'seeds': (0,), 'values': (0.5, 0.7)},
  )
