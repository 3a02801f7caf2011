"""ResNet-50 on ImageNet: the paper's search, cut to half of the MACs.

Source: Wang et al., "Pruning from Scratch", AAAI 2020, ImageNet experiments.
The reference network has 4.09 G MACs and 25.6 M parameters.

  python main.py --config configs/resnet50.py --mode=search
  python main.py --config configs/resnet50.py --mode=train

The search is one pass at 100 images a step, with 50 images of each class held
out, validated every 500 steps. `train.batch_size` is that of all devices
together: make it 256 times their number; the rate follows it. On 8 devices
`search.batch_size` must be a multiple of 8, such as 128.

Variants: `expanded` searches base width 80 instead of 64 (1.36 times the MACs);
`scratch_b` trains for 200 epochs instead of 150; `smoke` is a minute on two CPU
cores, with JPEG files that it draws itself. Where the data comes from:
docs/imagenet.md.

The source gives neither rate nor weight decay of this training: 0.1, and 1e-4
on every parameter, are ours.

Not run on ImageNet here: no accelerator and no data where this was written. To
compare with, near 2 G MACs: HALP 76.47 % top-1, EagleEye 76.4 %, CHIP 76.35 %;
a uniform 0.75x 74.8 % at 2.3 G.
"""

from configs import mobilenet_v1
from pfs_jax import config

VARIANTS = {
  'full': {},
  'expanded': {'model.width': 80},
  'smoke': {
    **mobilenet_v1.IMAGENET_SMOKE,
    'data.image_size': 48,
    'train.learning_rate': 0.1,
  },
  'scratch_b': {'train.epochs': 200.0},
}


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  c = mobilenet_v1.imagenet('resnet50')
  c.model.base_width = 64
  c.train.learning_rate = 0.1
  c.train.weight_decay = 1e-4
  c.train.decay_rule = 'all'
  c.train.schedule = 'step'
  c.train.decay_at = (0.3, 0.6, 0.9)
  c.train.crop_scale = 0.08
  return config.with_variant(c, variant, VARIANTS)
