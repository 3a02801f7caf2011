"""MobileNetV1 on ImageNet: the paper's search, cut to half of the MACs.

Source: Wang et al., "Pruning from Scratch", AAAI 2020, ImageNet experiments.
The reference network has 568.8 M MACs and 4.2 M parameters.

  python main.py --config configs/mobilenet_v1.py --mode=search
  python main.py --config configs/mobilenet_v1.py --mode=train

The search is one pass at 100 images a step, with 50 images of each class held
out, validated every 500 steps. `train.batch_size` is that of all devices
together: make it 256 times their number; the rate follows it.

Variants: `expanded` searches base width 40 instead of 32 (1.55 times the MACs);
`published_site` puts the gates where the next BatchNorm cancels them
(docs/gate_sites.md); `scratch_b` trains for 300 epochs instead of 150; `smoke`
is a minute on two CPU cores, with JPEG files that it draws itself. Where the
data comes from: docs/imagenet.md.

Not run on ImageNet here: no accelerator and no data where this was written. To
compare with: AutoSlim reports 73.0 % top-1 at 572 M MACs, EagleEye 70.9 % at
284 M.
"""

from pfs_jax import config

VARIANTS = {
  'full': {},
  'expanded': {'model.width': 40},
  'published_site': {'model.gate_site': 'published'},
  'smoke': config.IMAGENET_SMOKE,
  'scratch_b': {'train.epochs': 300.0},
}


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  c = config.imagenet('mobilenet_v1')
  c.model.base_width = 32
  return config.with_variant(c, variant, VARIANTS)
