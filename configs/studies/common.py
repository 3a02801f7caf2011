"""What the configs of the studies share: networks, data, recipes.

  python main.py --config configs/studies/headline.py --mode=study
    --workdir=runs/studies --config.results_dir=results
    --config.base.data.source_dir=/usr/share/datasets/fashion-mnist

(one line) goes on where results/headline.json ends. The other studies run in
the same way; `--config.report_only=True` prints the tables alone, and the
variant `smoke` (headline.py:smoke) runs the code on digits in half a minute.

`fashion` is what the committed results were made with. It sets every value that
may change in configs/fashion.py, so that results stay comparable.
"""

from configs import fashion as fashion_config
from pfs_jax import config, studies

HEADLINE_ARMS = (
  'searched',
  'uniform',
  'random',
  'searched+layer_mean',
  'searched+cost0.5',
  'shuffled',
  'searched+cost1',
  'full',
  'searched+cost1+min_share',
)

# Of the studies of the tournament, see the plan in RESULTS.md.
CONTEST_ARMS = (
  'uniform',
  'searched',
  'seeing',
  'seeing+epochs10',
  'layer_mean',
  'sensitivity',
  'tournament',
)


def fashion():
  """VGG16 at base width 16, 10,000 Fashion-MNIST images, 30 % of the MACs."""
  c = fashion_config.get_config()
  c.model.width = 0
  c.data.augment = False
  c.search.epochs = 2.0
  c.search.sparsity = 0.5
  c.budget.keep = (0.3,)
  c.budget.ranking = 'global'
  c.train.epochs = 8.0
  c.log_steps = 78  # An epoch.
  return c


def contest():
  """`fashion` with probes and tournaments that fit so short a training.

  The shares are no limits here: RESULTS.md reports what was spent.
  """
  c = fashion()
  c.probe.share = 1.0
  c.tournament.epochs = 1.0
  c.tournament.share = 20.0
  return c


def digits():
  """A ResNet-8 of base width 2 on 8x8 digits: the studies' code, quickly."""
  c = config.default()
  c.model.name = 'resnet8'
  c.model.base_width = 2
  c.data.name = 'digits'
  c.data.validation_examples = 300
  c.search.epochs = 1.0
  c.search.batch_size = 100
  c.budget.keep = (0.7,)
  c.train.epochs = 2.0
  c.train.batch_size = 100
  c.probe.epochs = 1.0
  c.probe.draws = 2
  c.probe.share = 2.0
  c.tournament.candidates = ('tilt1',)
  c.tournament.seeds = 2
  c.tournament.share = 20.0
  return c


def study(variant, name, *, smoke, base=None, known=('full',), **fields):
  """The study, or its smoke variant: digits, and the fields of `smoke`.

  Args:
    variant: 'full', 'smoke', or one of `known`.
    name: Of the study.
    smoke: Fields of the study that its smoke variant has.
    base: The config of one run.
    known: Names of the study's variants, if 'full' is not the only one.
    **fields: Of `studies.default`.
  """
  if variant == 'smoke':
    return studies.default(name, digits(), **{**fields, **smoke})
  c = studies.default(name, base or fashion(), **fields)
  return config.with_variant(c, variant, dict.fromkeys([*known, 'smoke'], {}))
