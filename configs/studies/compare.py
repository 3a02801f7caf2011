"""Method table: ways to get a structure and to train it, VGG16/16 at 30 %.

Scratch-E trains all for the same epochs, Scratch-B (+scratch_b) for the compute
of the full network's training, +fine_tune from the weights the channels were
scored at (rate 0.01, as many epochs as Scratch-E), +rewind from the same
channels' first random values (`filters+rewind` is the lottery ticket). The wide
network that `pretrained`, `filters` and `slimming` start from is trained by the
same recipe on the search's 9,000 images.

configs/studies/common.py has the command.
"""

from configs.studies import common

ARMS = (
  'searched',
  'uniform',
  'random',
  'pretrained',
  'filters',
  'slimming',
  'filters+rewind',
  'searched+rewind',
  'filters+fine_tune',
  'slimming+fine_tune',
  'pretrained+fine_tune',
  'full',
  'searched+scratch_b',
  'uniform+scratch_b',
  'random+scratch_b',
  'slimming+scratch_b',
)


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'compare',
    arms=ARMS,
    seeds=(0, 1, 2),
    baseline='uniform',
    smoke={
      'arms': (
        'pretrained+fine_tune',
        'filters+rewind+scratch_b',
        'slimming+structure',
      ),
      'seeds': (0,),
      'baseline': '',
    },
  )
