"""The search: frozen random weights, one gate per channel (paper, section 3).

The loss is the mean cross-entropy plus

  balance * (m - sparsity)^2,   m = sum over all gates of |g| / K,

with K the number of gates of the network: one global mean, pulled towards
`sparsity`, the mean gate aimed at (a share to *keep*). Gates start at 1, are
moved by Adam and clipped to [0, 1] after each step. All weights, also
BatchNorm's scale and bias, are frozen; BatchNorm uses batch statistics.

Random frozen weights include those of the classifier, which keep the
cross-entropy near chance. `init(..., classifier=path)` trains that one layer
along with the gates, by the same optimiser. The paper does not do this. The
result of a search is its gates alone, in both cases.

With ReLU and ReLU6, a gate that reaches 0 never returns: their derivative at 0
is 0 (`jax.nn.relu`; `jnp.maximum(x, 0)` would give 0.5), which stops the
gradient of the cross-entropy, and sign(0) = 0 stops that of the regulariser.
SiLU, GELU and hard swish have the derivative 0.5 there, so gates can return.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from pfs_jax import errors, train


class SearchState(flax.struct.PyTreeNode):
  """Everything that changes during a search, and its static parts.

  `step` counts the steps made, `optimizer` updates {params, gates}, and
  `classifier` is the path of a layer in `params` that is trained too. `init`
  describes the rest.
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
  classifier: str | None = flax.struct.field(pytree_node=False, default=None)

  @property
  def variables(self) -> dict[str, Any]:
    """The variables that the module is applied with."""
    return {
      'params': self.params,
      'batch_stats': self.batch_stats,
      'gates': self.gates,
    }


def _trained_mask(classifier: str | None, tree: Any) -> Any:
  """True for the leaves of {params, gates} that are trained, else False."""
  if classifier is None:
    return {'params': False, 'gates': True}

  def trained(path: tuple[Any, ...], _: Any) -> bool:
    inside = '/'.join(path).startswith(f'params/{classifier}/')
    return inside or path[0] == 'gates'

  return flax.traverse_util.path_aware_map(trained, tree)


@functools.cache
def optimizer(
  learning_rate: float, classifier: str | None = None
) -> optax.GradientTransformation:
  """Adam for the gates (and the classifier), zero updates for the weights.

  Both masks are needed: `optax.masked` alone passes the other gradients through
  as updates. Cached, because jit compares optimisers by identity.
  """
  trained = functools.partial(_trained_mask, classifier)

  def frozen(tree: Any) -> Any:
    return jax.tree.map(lambda on: not on, trained(tree))

  return optax.chain(
    optax.masked(optax.adam(learning_rate), trained),
    optax.masked(optax.set_to_zero(), frozen),
  )


def init(
  module: nn.Module,
  variables: Mapping[str, Any],
  *,
  sparsity: float,
  balance: float,
  learning_rate: float,
  key: jax.Array | None = None,
  classifier: str | None = None,
) -> SearchState:
  """The state before the first step.

  Args:
    module: Any Linen module with the collection `gates`.
    variables: Its `params`, `batch_stats` and `gates`; where the gates are
      absent they start at 1 (`module.unit_gates()`).
    sparsity: r, the mean gate aimed at, 0..1.
    balance: lambda, >= 0.
    learning_rate: Adam's learning rate.
    key: The key of a model's dropout; None: key 0.
    classifier: Path of the layer in `params` that is trained along with the
      gates; None: all weights stay frozen (the paper).

  Raises:
    errors.UserError: There are no weights at `classifier`.
  """
  params = variables['params']
  gates = variables['gates'] if 'gates' in variables else module.unit_gates()
  paths = flax.traverse_util.flatten_dict(params, sep='/')
  layers = list(dict.fromkeys(path.rpartition('/')[0] for path in paths))
  if classifier not in (None, *layers):
    raise errors.UserError(
      f'config.search.classifier must be a layer of the model; got '
      f'{classifier!r}. The last ones: {", ".join(layers[-5:])}.'
    )
  tx = optimizer(float(learning_rate), classifier)
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
    classifier=classifier,
  )


def mean_gate(gates: Any) -> jax.Array:
  """m = sum |g| / K over all gates of the network.

  |g| is written as sign(g) * g: JAX's derivative of `abs` at 0 is 1, which
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
  logits, batch_stats = train.logits(state, trained, x)
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  gates = trained['gates']
  reg = regulariser(gates, state.sparsity, state.balance)
  metrics = {
    'ce': ce,
    'reg': reg,
    'mean_gate': mean_gate(gates),
    'density': density(gates),
  }
  return ce + reg, (batch_stats, metrics)


@jax.jit
def step(
  state: SearchState, x: jax.Array, y: jax.Array
) -> tuple[SearchState, dict[str, jax.Array]]:
  """One step of the search.

  No gradient of a frozen weight is computed: its masked update is zero, so that
  nothing uses the gradient, and the compiler drops it.

  Args:
    state: The state before the step.
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
  gates = optax.apply_updates(state.gates, updates['gates'])
  gates = jax.tree.map(lambda g: jnp.clip(g, 0.0, 1.0), gates)
  state = state.replace(
    step=state.step + 1,
    params=_moved_classifier(state, updates['params']),
    batch_stats=batch_stats,
    gates=gates,
    opt_state=opt_state,
  )
  return state, metrics


def _moved_classifier(state: SearchState, updates: Any) -> Any:
  """The weights after a step, which changes those of the classifier alone.

  The other updates are zeros. Adding them would copy every weight in every step
  (and turn -0.0 into 0.0).
  """
  if state.classifier is None:
    return state.params
  tree = {'params': state.params}
  return jax.tree.map(
    lambda on, weight, update: weight + update if on else weight,
    _trained_mask(state.classifier, tree)['params'],
    state.params,
    updates,
  )


def select(records: Iterable[Mapping[str, Any]], sparsity: float) -> int | None:
  """The step whose gates are kept, by the published rule; None: the last.

  It is the step of the best validation accuracy among the evaluations whose
  share of non-zero gates is at most `sparsity` (r), and the earliest of equals.

  Args:
    records: The metrics log: 'step' and, for evaluations, 'gates_density' and
      'validation_accuracy'.
    sparsity: r, 0..1.
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
