"""The similarity study with searches of 10 epochs, the paper's length.

After 2 epochs the gates are still on their way from 1, by layers and in every
seed alike; after 10 they are not (`search_length`).

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  base = common.fashion()
  base.search.epochs = 10.0
  return common.study(
    variant,
    'similarity10',
    base=base,
    arms=('searched+structure', 'searched+layer_mean+structure'),
    seeds=(0, 1, 2, 3, 4),
    field='arm.pretrain_epochs',
    values=(0.0, 1.0, 2.0, 4.0, 8.0),
    smoke={
      'arms': ('searched+structure',),
      'seeds': (0, 1),
      'values': (0.0, 1.0),
    },
  )
