"""Does what holds after 8 epochs hold after 20, on all 60,000 images?

VGG16 at base width 16, 30 % of the MACs, with crop and flip.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  base = common.contest()
  base.data.train_examples = 0
  base.data.augment = True
  base.train.epochs = 20.0
  base.probe.epochs = 1.0
  base.tournament.epochs = 0.5
  return common.study(
    variant,
    'long',
    base=base,
    arms=('uniform', 'tournament', 'full'),
    seeds=(100, 101, 102),
    baseline='uniform',
    smoke={
      'arms': ('seeing+structure', 'full+structure'),
      'seeds': (0,),
      'baseline': '',
    },
  )
