"""ResNet-20 at base width 8 on scikit-learn's 8x8 digits: the quick start.

  python main.py --config configs/digits.py --mode=run

The data (1,797 real images, 1,500 to train, 297 to test) comes with
scikit-learn: nothing is downloaded. The network is searched, cut to half of the
reference network's MACs, trained from new random weights, and compared with the
reference network trained the same way.
"""

from pfs_jax import config

VARIANTS = {
  'full': {},
  'smoke': {
    'search.epochs': 0.5,
    'train.epochs': 1.0,
    'train.reference': False,
  },
}


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  c = config.default()
  c.model.name = 'resnet20'
  c.model.base_width = 8
  c.model.width = 10
  c.data.name = 'digits'
  c.data.validation_examples = 300
  c.search.epochs = 8.0
  c.search.batch_size = 64
  c.train.epochs = 25.0
  c.train.batch_size = 64
  c.train.reference = True
  c.probe.share = 0.4  # So short a training has no 5 % for it.
  c.tournament.share = 4.0
  c.log_steps = 115
  return config.with_variant(c, variant, VARIANTS)
