"""Estimates of memory and time for ImageNet: the table of docs/accelerators.md.

  python -m benchmarks.estimate

Nothing here ran on an accelerator. Operations are 2 per MAC; a training step
costs 3 forward passes, a search step 2 (no gradient of a weight). The
utilisation is an assumption, printed with the result. Activation memory is what
XLA's CPU compiler plans for the compiled step (`memory_analysis`), per image,
bfloat16, from a batch of 16; an accelerator's compiler plans differently.
"""

import jax
import jax.numpy as jnp
import optax

from pfs_jax import models, search, train

BATCH = 16
IMAGES = 1_281_167
# Name: (peak bfloat16 operations per second, memory bytes a chip, chips).
MACHINES = {
  'TPU v4-8': (4 * 275e12, 32 * 2**30, 4),
  'H100 SXM': (989e12, 80 * 2**30, 1),
}
# Depthwise convolutions keep a matrix unit mostly idle.
UTILISATION = {'resnet50': 0.35, 'mobilenet_v1': 0.10, 'mobilenet_v2': 0.08}
EPOCHS = {'resnet50': 150, 'mobilenet_v1': 150, 'mobilenet_v2': 150}


def abstract(module):
  """Shapes of a module's variables and of a batch."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  x = jax.ShapeDtypeStruct((BATCH, 224, 224, 3), jnp.float32)
  y = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
  return jax.eval_shape(module.init, key, x), x, y


def step_bytes(step, state, x, y) -> int:
  """Temporary bytes of a compiled step, per image."""
  compiled = jax.jit(step).lower(state, x, y).compile()
  return compiled.memory_analysis().temp_size_in_bytes // BATCH


def main() -> None:
  """Prints the table."""
  print(
    '| network | MACs | search, MB/image | train, MB/image | machine | largest '
    'batch a chip (train) | search, 1 epoch | train, 150 epochs |'
  )
  print('| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |')
  for name, utilisation in UTILISATION.items():
    model = models.cost_model(name, 1000, 224)
    macs = model.macs(model.widths)
    gated = models.build(name, 1000, gated=True, dtype=jnp.bfloat16)
    plain = models.build(name, 1000, dtype=jnp.bfloat16)
    variables, x, y = abstract(gated)
    state = jax.eval_shape(
      lambda v, m=gated: search.init(
        m, v, sparsity=0.5, balance=0.05, learning_rate=0.01
      ),
      variables,
    )
    searching = step_bytes(search.step, state, x, y)
    variables, _, _ = abstract(plain)
    state = jax.eval_shape(
      lambda v, m=plain: train.init(m, v, optax.sgd(0.1, 0.9)), variables
    )
    training = step_bytes(train.step, state, x, y)
    for machine, (peak, memory, chips) in MACHINES.items():
      rate = peak * utilisation / (2 * macs)  # Forward passes a second.
      search_minutes = IMAGES * 2 / rate / 60
      train_hours = EPOCHS[name] * IMAGES * 3 / rate / 3600
      print(
        f'| {name} | {macs / 1e6:,.0f} M | {searching / 2**20:.0f} | '
        f'{training / 2**20:.0f} | {machine} ({chips} chip'
        f'{"s" * (chips > 1)}, {utilisation:.0%} of {peak / 1e12:.0f} TFLOP/s) '
        f'| {memory * 0.9 / training:,.0f} | {search_minutes:.1f} min | '
        f'{train_hours:.1f} h |',
        flush=True,
      )


if __name__ == '__main__':
  main()
