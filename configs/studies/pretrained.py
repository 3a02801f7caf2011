"""Accuracy of structures from random against pre-trained weights.

Searched from weights trained 0 (random) to 8 epochs; every structure is trained
from new random weights.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'pretrained',
    arms=('searched',),
    seeds=(0, 1, 2),
    field='arm.pretrain_epochs',
    values=(0.0, 1.0, 2.0, 4.0, 8.0),
    baseline='searched, pretrain_epochs 0',
    smoke={'seeds': (0,), 'values': (0.0, 1.0)},
  )
