"""How short can a search be, and when do the counts stop changing?

0 epochs leave all gates at 1: uniform width.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'search_length',
    arms=('searched',),
    seeds=(0, 1, 2),
    field='search.epochs',
    values=(0.0, 1.0, 2.0, 5.0, 10.0),
    baseline='searched, epochs 2',
    smoke={
      'seeds': (0,),
      'values': (0.0, 1.0),
      'baseline': 'searched, epochs 0',
    },
  )
