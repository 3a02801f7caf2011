"""Does a search mend networks that are badly proportioned? 30 % of the MACs.

Three networks: VGG16 with 24 channels in every layer (`full`), VGG16 at base
width 16 with its first four layers tripled (`front`), and ResNet-20 with 24
channels in every block on a stream of 8, 16 and 32 (`resnet20`). RESULTS.md has
the plan and what came out.

Variants: `full`, `front` and `resnet20`, the networks, and `smoke`.

configs/studies/common.py has the command.
"""

from configs.studies import common

FRONT = (48, 48, 96, 96, 64, 64, 64, 128, 128, 128, 128, 128, 128)
NETWORKS = {
  'full': ('vgg16', 16, (24,) * 13),
  'front': ('vgg16', 16, FRONT),
  'resnet20': ('resnet20', 8, (24,) * 9),
}


def get_config(variant='full'):
  """The study of one network, or its smoke variant."""
  base = common.contest()
  if variant in NETWORKS:
    name, base_width, counts = NETWORKS[variant]
    base.model.name, base.model.base_width = name, base_width
    base.model.counts = counts
  suffix = {'front': '_front', 'resnet20': '_resnet20'}.get(variant, '')
  return common.study(
    variant,
    f'proportions{suffix}',
    known=NETWORKS,
    base=base,
    arms=common.CONTEST_ARMS,
    seeds=(100, 101, 102, 103, 104),
    baseline='uniform',
    smoke={'arms': ('sensitivity', 'uniform'), 'seeds': (0,)},
  )
