"""MobileNetV1 on ImageNet: the paper's search, cut to half of the MACs.

Source: Wang et al., "Pruning from Scratch", AAAI 2020, ImageNet experiments.
The reference network has 568.8 M MACs and 4.2 M parameters.

  python main.py --config configs/mobilenet_v1.py --mode=search
  python main.py --config configs/mobilenet_v1.py --mode=train

The search is one pass at 100 images a step, with 50 images of each class held
out, validated every 500 steps. `train.batch_size` is that of all devices
together: make it 256 times their number; the rate follows it. On 8 devices
`search.batch_size` must be a multiple of 8, such as 128.

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

# What `smoke` changes in every ImageNet config: it draws its JPEG files itself.
IMAGENET_SMOKE = {
  'data.name': 'shapes',
  'data.validation_examples': 80,
  'data.eval_batch_size': 80,
  'data.workers': 1,
  'model.base_width': 8,
  'search.epochs': 1.0,
  'search.batch_size': 32,
  'search.evaluate_steps': 0,
  'budget.keep': (0.8,),  # So narrow a network has a floor of 2/3.
  'train.epochs': 4.0,
  'train.batch_size': 32,
  'train.learning_rate': 0.8,
  'log_steps': 15,
}
VARIANTS = {
  'full': {},
  'expanded': {'model.width': 40},
  'published_site': {'model.gate_site': 'published'},
  'smoke': IMAGENET_SMOKE,
  'scratch_b': {'train.epochs': 300.0},
}


def imagenet(name):
  """The paper's ImageNet runs, with the training of its MobileNets."""
  c = config.default()
  c.model.name = name
  c.data.name = 'imagenet2012'
  c.data.validation_examples = 50000
  c.search.epochs = 1.0
  c.search.batch_size = 100
  c.search.balance = 0.05
  c.search.evaluate_steps = 500
  c.search.crop_scale = 0.25
  c.train.epochs = 150.0
  c.train.batch_size = 256
  c.train.learning_rate = 0.05
  c.train.scale_rate = True
  c.train.nesterov = True
  c.train.weight_decay = 4e-5
  c.train.decay_rule = 'dense'
  c.train.schedule = 'cosine'
  c.train.label_smoothing = 0.1
  c.train.crop_scale = 0.25
  c.train.colour_jitter = 0.4
  c.train.lighting = 0.1
  c.steps_per_call = 1  # Batches come from the host.
  c.log_steps = 100
  c.checkpoint_steps = 1000
  return c


def get_config(variant='full'):
  """The config, with the overrides of a variant."""
  c = imagenet('mobilenet_v1')
  c.model.base_width = 32
  return config.with_variant(c, variant, VARIANTS)
