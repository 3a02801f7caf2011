"""Does a tournament lose nothing on networks that are well proportioned?

VGG16 at base width 16 (`full`) and ResNet-20 at base width 8 (`resnet20`), at
30 % and 10 % of the MACs. RESULTS.md has the plan and what came out.

  python main.py --config configs/studies/tournament.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line; `tournament.py:resnet20` is the other network) goes on where
results/tournament.json ends; `--config.report_only=True` prints its tables
alone. `smoke` runs the code on digits.
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
