"""The user's own model as a `models.Network`, for the stages."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from pfs_jax import console, described, errors, models, user_code
from pfs_jax.surgery import nnx_models
from pfs_jax.surgery.check import narrow_linen
from pfs_jax.surgery.discover import discover


def network(
  model: Any,
  x: Any,
  *,
  description: Mapping[str, Any] | None = None,
  **options: Any,
) -> models.Network:
  """A model of the user's own as a `models.Network`, which the stages take.

  The reference network is the model itself at full width.

  Args:
    model: A Linen module, or an NNX module.
    x: One image [1, H, W, C] or its `jax.ShapeDtypeStruct`.
    description: What structure files say about the model.
    **options: `call`, `residual` and `leave`, as for `discover`.

  Raises:
    errors.UserError: As for `discover`, or no channel can carry a gate.
  """
  model = nnx_models.as_linen(model)
  table = discover(model, x, **options)
  model_costs = table.cost_model()
  made = models.Network(
    module=model,
    table=table,
    reference=narrow_linen(model, table, model_costs.widths),
    reference_macs=model_costs.macs(model_costs.widths),
    reference_params=model_costs.params(model_costs.widths),
    build=lambda counts: narrow_linen(model, table, counts),
    description=dict(description or {}),
  )
  axes = sorted({c.axis_name for c in table.calls if c.axis_name})
  if axes:
    _say_left_out(axes[0])
  made.gated  # noqa: B018  Refuses a model without a group.
  return made


@functools.cache  # Each process says it once.
def _say_left_out(axis_name: str) -> None:
  console.note(
    f"BatchNorm's axis_name={axis_name!r} is left out: statistics are of the "
    'whole batch, over all devices.'
  )


def network_from_factory(
  spec: str,
  num_classes: int,
  image_size: int,
  channels: int,
  dtype: Any = jnp.float32,
  *,
  residual: bool = False,
  leave: Sequence[str] = (),
  call: str = '',
  norm: str = '',
  conv: str = '',
) -> models.Network:
  """The model that `package.module:callable` makes, as a `models.Network`.

  The callable is given those of `num_classes`, `dtype` and `rngs` that its
  signature names (or one positional argument: `num_classes`) and returns a
  Linen module, an NNX module, or a pair (module, call) with `call` as for
  `discover`.

  Args:
    spec: 'package.module:callable', importable from here.
    num_classes: Number of classes.
    image_size: Side of the square images.
    channels: Channels of the images.
    dtype: Dtype of the computation; must be float32 if the callable takes none.
    residual: As for `discover`.
    leave: As for `discover`.
    call: 'package.module:function', (module, x, train) -> logits; '' if the
      callable returns it, or the model needs none (see `discover`).
    norm: 'package.module:Class' of a BatchNorm of the user's own
      (`described.register_norm`); '' for none.
    conv: The same for a convolution (`described.register_conv`).

  Raises:
    errors.UserError: A spec, module, attribute or result is wrong, the user's
      code raises an error, or as for `network`.
  """
  if norm:
    described.register_norm(user_code.imported('model.norm', norm))
  if conv:
    described.register_conv(user_code.imported('model.conv', conv))
  factory = user_code.imported('model.factory', spec)
  available = {'num_classes': num_classes, 'dtype': dtype}
  available['rngs'] = nnx.Rngs(0)  # NNX draws weights at once.
  how = user_code.imported('model.call', call) if call else None
  x = jax.ShapeDtypeStruct((1, image_size, image_size, channels), jnp.float32)
  given = {'leave': list(leave), 'call': call, 'norm': norm, 'conv': conv}
  with user_code.blamed('model.factory', spec):
    model = _model_from(spec, factory, available)
    if isinstance(model, tuple) and len(model) == 2:
      model, how = model[0], how or model[1]
    if not isinstance(model, nn.Module | nnx.Module):
      raise _error(spec, f'returned {type(model).__name__}, no Flax module')
    made = network(
      model,
      x,
      call=how,
      residual=residual,
      leave=leave,
      description={
        'factory': spec,
        'residual': residual,
        'num_classes': num_classes,
        'image_size': image_size,
        'channels': channels,
        **{k: v for k, v in given.items() if v},
      },
    )
    # A label without a logit would only be noticed as a loss of NaN.
    shapes = _output_shapes(made.reference, x)
  wanted = (1, num_classes)
  shape = next((s for s in shapes if s != wanted), wanted)
  if shape != wanted:
    raise _error(
      spec,
      f'the model must return logits [N, {num_classes}], one for each class; '
      f'got {"several outputs" if shape is None else f"shape {shape}"}',
    )
  return made


def _output_shapes(module: nn.Module, x: Any) -> list[Any]:
  """Outside of training and in it, by what a checkpoint holds."""

  def outputs(key, x):
    drawn = module.init(key, x)
    held = {k: drawn[k] for k in ('params', 'batch_stats') if k in drawn}
    rngs, mutable = dict.fromkeys(('params', 'dropout'), key), ['batch_stats']
    return [
      module.apply(held, x, train=train, mutable=mutable, rngs=rngs)[0]
      for train in (False, True)
    ]

  found = jax.eval_shape(outputs, jax.random.key(0), x)
  return [getattr(output, 'shape', None) for output in found]


def _error(spec: str, problem: str) -> errors.UserError:
  return errors.UserError(f'config.model.factory={spec}: {problem}.')


def _model_from(
  spec: str, factory: Callable[..., Any], available: Mapping[str, Any]
) -> Any:
  """The model of a factory, called with those values that it can take."""
  make: Any = factory
  if isinstance(make, type):
    if not issubclass(make, nn.Module | nnx.Module):
      raise _error(spec, 'is a class, but of no Flax module')
    if issubclass(make, nnx.Module):
      make = make.__init__  # NNX's metaclass hides the arguments of a class.
  parameters = dict(inspect.signature(make).parameters)
  parameters.pop('self', None)
  known = {k: v for k, v in available.items() if k in parameters}
  if 'dtype' not in known and available['dtype'] != jnp.float32:
    raise _error(spec, 'takes no dtype, so config.dtype must be float32')
  required = [
    p.name
    for p in parameters.values()
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    and p.name not in known
  ]
  if len(required) == 1 and 'num_classes' not in known:
    return factory(available['num_classes'], **known)
  if required:
    raise _error(spec, f'needs {", ".join(required)}, which has no default')
  return factory(**known)
