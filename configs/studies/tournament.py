"""Does a tournament lose nothing on networks that are well proportioned?

VGG16 at base width 16 (`full`) and ResNet-20 at base width 8 (`resnet20`), at
30 % and 10 % of the MACs. RESULTS.md has the plan and what came out.

Variants: `full` and `resnet20`, the networks, and `smoke`.

configs/studies/common.py has the command.
"""

from configs.studies import common

NETWORKS = {'full': ('vgg16', 16), 'resnet20': ('resnet20', 8)}


def get_config(variant='full'):
  """The study of one network, or its smoke variant."""
  base = common.contest()
  if variant in NETWORKS:
    base.model.name, base.model.base_width = NETWORKS[variant]
  return common.study(
    variant,
    'tournament_resnet20' if variant == 'resnet20' else 'tournament',
    known=NETWORKS,
    base=base,
    arms=common.CONTEST_ARMS,
    seeds=tuple(range(100, 108)),
    field='budget.keep',
    values=(0.3, 0.1),
    baseline='uniform',
    smoke={
      'arms': ('tournament', 'uniform'),
      'seeds': (0,),
      'field': '',
      'values': (),
    },
  )
