"""VGG16 on CIFAR-10: the paper's search, cut to half of the MACs.

Source: Wang et al., "Pruning from Scratch", AAAI 2020, CIFAR-10 experiments.
The reference network has 313.2 M MACs and 14.7 M parameters.

  python main.py --config configs/vgg16.py --mode=search
  python main.py --config configs/vgg16.py --mode=train

Variants: `expanded` searches base width 80 instead of 64 (1.56 times the MACs);
`r0.2` is the published script's sparsity ratio; `scratch_b` trains as long as
the reference network computes; `smoke` runs the code on scikit-learn's digits.

Not run on CIFAR-10 here: no accelerator and no network where this was written.
"""

from configs import resnet56
from pfs_jax import config

VARIANTS = {**resnet56.CIFAR_VARIANTS, 'expanded': {'model.width': 80}}


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  c = resnet56.cifar('vgg16')
  return config.with_variant(c, variant, VARIANTS)
