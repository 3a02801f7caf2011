"""The search: frozen random weights, one gate per channel (paper, section 3).

The loss is the mean cross-entropy plus

  balance * (m - sparsity)^2,   m = sum over all gates of |g| / K,

with K the number of gates of the network: one global mean, pulled towards
`sparsity`, the mean gate aimed at (a share to *keep*). Gates start at 1, are
moved by Adam and clipped to [0, 1] after each step. Weights, convolutions and
BatchNorm's scale and bias alike, are frozen; BatchNorm uses batch statistics.

A gate that reaches 0 never returns: ReLU'(0) = 0 stops the gradient of the
cross-entropy (`jax.nn.relu`; `jnp.maximum(x, 0)` would give 0.5), sign(0) = 0
that of the regulariser.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pfs_jax import train


class SearchState(flax.struct.PyTreeNode):
  """All that changes in a search, and what it needs to go on.

  Attributes:
    step: Steps made.
    params: The frozen weights.
    batch_stats: BatchNorm's running statistics, updated.
    gates: The collection of gates.
    opt_state: State of the optimiser.
    sparsity: r, the mean gate aimed at, 0..1.
    balance: lambda, the weight of the regulariser.
    rng: Key data (uint32 [2]) that dropout draws from, with the step.
    module: The gated module (static).
    optimizer: The masked optimiser over {params, gates} (static).
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  gates: Any
  opt_state: Any
  sparsity: jax.Array
  balance: jax.Array
  rng: jax.Array
  module: nn.Module = flax.struct.field(pytree_node=False)
  optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)

  @property
  def variables(self) -> dict[str, Any]:
    """The variables of the module, to apply it with."""
    return {
      'params': self.params,
      'batch_stats': self.batch_stats,
      'gates': self.gates,
    }


@functools.cache
def optimizer(learning_rate: float) -> optax.GradientTransformation:
  """Adam on the gates, nothing on the weights.

  Both masks are needed: `optax.masked` alone passes the other gradients through
  as updates. Cached, since jit compares transformations by identity.
  """
  return optax.chain(
    optax.masked(optax.adam(learning_rate), {'params': False, 'gates': True}),
    optax.masked(optax.set_to_zero(), {'params': True, 'gates': False}),
  )


def init(
  module: nn.Module,
  variables: Mapping[str, Any],
  *,
  sparsity: float,
  balance: float,
  learning_rate: float,
  key: jax.Array | None = None,
) -> SearchState:
  """The state before the first step.

  Args:
    module: Any Linen module with the collection `gates`.
    variables: Its `params`, `batch_stats` and `gates`; where the gates are
      absent they start at 1 (`module.unit_gates()`).
    sparsity: r, the mean gate aimed at, 0..1.
    balance: lambda, >= 0.
    learning_rate: Of Adam.
    key: For a model with dropout; key 0 if None.
  """
  params = variables['params']
  gates = variables['gates'] if 'gates' in variables else module.unit_gates()
  tx = optimizer(float(learning_rate))
  dtype = jnp.result_type(*jax.tree.leaves(gates))
  return SearchState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    gates=gates,
    opt_state=tx.init({'params': params, 'gates': gates}),
    sparsity=jnp.asarray(sparsity, dtype),
    balance=jnp.asarray(balance, dtype),
    rng=jax.random.key_data(jax.random.key(0) if key is None else key),
    module=module,
    optimizer=tx,
  )


def mean_gate(gates: Any) -> jax.Array:
  """m = sum |g| / K over all gates of the network.

  Written as sign(g) * g, since JAX's derivative of `abs` at 0 is 1, not 0: it
  would pull gates back from 0.
  """
  leaves = jax.tree.leaves(gates)
  total = sum((jnp.sign(g) * g).sum() for g in leaves)
  return total / sum(g.size for g in leaves)


def density(gates: Any) -> jax.Array:
  """Share (0..1) of the gates that are not zero."""
  leaves = jax.tree.leaves(gates)
  return sum((g != 0).sum() for g in leaves) / sum(g.size for g in leaves)


def regulariser(
  gates: Any, sparsity: jax.Array, balance: jax.Array
) -> jax.Array:
  """balance * (m - sparsity)^2.

  Its gradient is 2 * balance * (m - sparsity) * sign(g) / K, 0 at g = 0.
  """
  return balance * (mean_gate(gates) - sparsity) ** 2


def loss(
  trained: Mapping[str, Any], state: SearchState, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
  """(loss, (batch_stats, metrics)) at trained = {params, gates}."""
  logits, updates = state.module.apply(
    {**trained, 'batch_stats': state.batch_stats},
    x,
    train=True,
    mutable=['batch_stats'],
    rngs={'dropout': train.dropout_key(state)},
  )
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  gates = trained['gates']
  reg = regulariser(gates, state.sparsity, state.balance)
  metrics = {
    'ce': ce,
    'reg': reg,
    'mean_gate': mean_gate(gates),
    'density': density(gates),
  }
  return ce + reg, (updates.get('batch_stats', {}), metrics)


@jax.jit
def step(
  state: SearchState, x: jax.Array, y: jax.Array
) -> tuple[SearchState, dict[str, jax.Array]]:
  """One step of the search.

  No gradient of a weight is computed: nothing uses it, since the masked update
  of the weights is zero, and the compiler drops it.

  Args:
    state: From `init` or the step before.
    x: Normalised, augmented images, float [N, H, W, C].
    y: Labels, int [N].

  Returns:
    The next state and the metrics of the loss at the gates before the step:
    'ce', 'reg', 'mean_gate' and 'density' (share of non-zero gates).
  """
  trained = {'params': state.params, 'gates': state.gates}
  gradient = jax.grad(loss, has_aux=True)
  grads, (batch_stats, metrics) = gradient(trained, state, x, y)
  updates, opt_state = state.optimizer.update(grads, state.opt_state, trained)
  # The weights' updates are zeros; adding them would copy every weight in every
  # step (and turn -0.0 into 0.0), so only the gates are moved.
  gates = optax.apply_updates(state.gates, updates['gates'])
  gates = jax.tree.map(lambda g: jnp.clip(g, 0.0, 1.0), gates)
  state = state.replace(
    step=state.step + 1,
    batch_stats=batch_stats,
    gates=gates,
    opt_state=opt_state,
  )
  return state, metrics


def select(records: Iterable[Mapping[str, Any]], sparsity: float) -> int | None:
  """The step whose gates are kept (the published selection rule).

  The best validation accuracy among the evaluations whose share of non-zero
  gates is at most `sparsity`, the earliest among equals; if there is none, or
  no validation, the last: None.

  Args:
    records: Of the metrics log, with 'step' and, where evaluated,
      'gates_density' and 'validation_accuracy'.
    sparsity: r.
  """
  candidates = [
    r
    for r in records
    if 'validation_accuracy' in r and r['gates_density'] <= sparsity
  ]
  if not candidates:
    return None
  best = max(candidates, key=lambda r: (r['validation_accuracy'], -r['step']))
  return best['step']
