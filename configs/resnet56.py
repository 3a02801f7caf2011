"""ResNet-56 on CIFAR-10: the paper's search, cut to half of the MACs.

Source: Wang et al., "Pruning from Scratch", AAAI 2020, CIFAR-10 experiments.
The reference network has 125.8 M MACs and 0.86 M parameters.

  python main.py --config configs/resnet56.py --mode=search
  python main.py --config configs/resnet56.py --mode=train

Variants: `expanded` searches base width 20 instead of 16 (1.56 times the MACs);
`r0.2` is the published script's sparsity ratio; `scratch_b` trains as long as
the reference network computes; `smoke` runs the code on scikit-learn's digits.

Not run on CIFAR-10 here: no accelerator and no network where this was written.
"""

from pfs_jax import config

# Variants that every CIFAR-10 config has.
CIFAR_VARIANTS = {
  'full': {},
  'r0.2': {'search.sparsity': 0.2},
  'scratch_b': {'train.scratch': 'B'},
  'smoke': {
    'data.name': 'digits',
    'data.validation_examples': 300,
    'search.epochs': 0.2,
    'train.epochs': 0.2,
  },
}
VARIANTS = {**CIFAR_VARIANTS, 'expanded': {'model.width': 20}}


def cifar(name):
  """The paper's CIFAR-10 run of a network."""
  c = config.default()
  c.model.name = name
  c.tournament.share = 0.4  # Two of its candidates are searches of 10 epochs.
  return c


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  return config.with_variant(cifar('resnet56'), variant, VARIANTS)
