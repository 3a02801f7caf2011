"""The sparsity ratio r, the mean gate that a search aims at.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'sparsity',
    arms=('searched',),
    seeds=(0, 1, 2),
    field='search.sparsity',
    values=(0.1, 0.2, 0.5, 0.7, 0.9),
    baseline='searched, sparsity 0.5',
    smoke={'seeds': (0,), 'values': (0.2, 0.5)},
  )
