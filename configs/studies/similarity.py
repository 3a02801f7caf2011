"""Are structures alike? Of other seeds, and after more pre-training.

No training of narrow networks: correlation of the share kept of each layer
between seeds, for searches from weights trained 0 (random) to 8 epochs, and the
overlap (Jaccard index) of the kept channels against that of chance. The other
rankings of the same gates show what is due to the layers and what to the
channels; `random` is the control.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'similarity',
    arms=(
      'searched+structure',
      'searched+layer_mean+structure',
      'searched+cost0.5+structure',
      'random+structure',
    ),
    seeds=(0, 1, 2, 3, 4),
    field='arm.pretrain_epochs',
    values=(0.0, 1.0, 2.0, 4.0, 8.0),
    smoke={
      'arms': ('searched+structure', 'random+structure'),
      'seeds': (0, 1),
      'values': (0.0, 1.0),
    },
  )
