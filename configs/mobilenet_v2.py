"""MobileNetV2 on ImageNet: the paper's search, cut to half of the MACs.

Source: Wang et al., "Pruning from Scratch", AAAI 2020, ImageNet experiments.
The reference network has 300.8 M MACs and 3.5 M parameters.

  python main.py --config configs/mobilenet_v2.py --mode=search
  python main.py --config configs/mobilenet_v2.py --mode=train

The search is one pass at 100 images a step, with 50 images of each class held
out, validated every 500 steps. `train.batch_size` is that of all devices
together: make it 256 times their number; the rate follows it. On 8 devices
`search.batch_size` must be a multiple of 8, such as 128.

Variants: `expanded` searches base width 40 instead of 32 (1.25 times the MACs);
`published_site` puts the gates where the next BatchNorm cancels them
(docs/gate_sites.md); `scratch_b` trains for 300 epochs instead of 150; `smoke`
is a minute on two CPU cores, with JPEG files that it draws itself. Where the
data comes from: docs/imagenet.md.

Not run on ImageNet here: no accelerator and no data where this was written. To
compare with: AutoSlim reports 74.2 % top-1 at 305 M MACs, Group Fisher 73.42 %
at 290 M.
"""

from configs import mobilenet_v1
from pfs_jax import config

VARIANTS = {
  'full': {},
  'expanded': {'model.width': 40},
  'published_site': {'model.gate_site': 'published'},
  'smoke': mobilenet_v1.IMAGENET_SMOKE,
  'scratch_b': {'train.epochs': 300.0},
}


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  c = mobilenet_v1.imagenet('mobilenet_v2')
  c.model.base_width = 32
  return config.with_variant(c, variant, VARIANTS)
