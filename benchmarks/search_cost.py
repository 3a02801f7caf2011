"""What a search costs beside a training: operations and time of one step each.

  python -m benchmarks.search_cost

VGG16 at base width 16, batches of 128 of 28x28x1 (the studies' network). The
operations are those that XLA counts in the compiled step; the times are taken
in turns, so that other load on the machine falls on both.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import config, cpu, models, search, train

ROUNDS = 10


def timed(step, state, x, y):
  """Seconds of one step."""
  start = time.perf_counter()
  jax.block_until_ready(step(state, x, y))
  return time.perf_counter() - start


def main():
  """Prints operations and median milliseconds of both steps."""
  network = models.network('vgg16', 10, 28, 1, base_width=16)
  key = jax.random.key(0)
  x = jax.random.normal(key, (128, 28, 28, 1))
  y = jnp.arange(128) % 10
  wide = models.init(network.gated, key, (28, 28, 1))
  gated = search.init(
    network.gated, wide, sparsity=0.5, balance=0.5, learning_rate=0.01
  )
  recipe = config.default().train
  plain = train.init(
    network.reference,
    {k: v for k, v in wide.items() if k != 'gates'},
    train.optimizer(recipe, 100),
  )
  steps = {'search': (search.step, gated), 'training': (train.step, plain)}
  options = cpu.compiler_options()
  compiled = {
    name: step.lower(state, x, y).compile(options)
    for name, (step, state) in steps.items()
  }
  times = {name: [] for name in steps}
  for _ in range(ROUNDS):
    for name, (_, state) in steps.items():
      times[name].append(timed(compiled[name], state, x, y))
  for name, program in compiled.items():
    operations = program.cost_analysis()['flops']
    median = 1000 * np.median(times[name])
    print(f'{name}: {operations:.3e} operations, {median:.0f} ms a step')


if __name__ == '__main__':
  main()
