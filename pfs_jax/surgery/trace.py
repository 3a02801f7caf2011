"""Marks the calls of layers in a trace, and says what the layers are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

LAYERS = (nn.Conv, nn.Dense, nn.BatchNorm)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A convolution, dense layer or BatchNorm as the trace showed it.

  Attributes:
    path: Module path, joined by '/'.
    kind: 'conv', 'depthwise', 'grouped', 'dense', 'norm' (BatchNorm); 'other'
      for what is counted but neither gated nor narrowed.
    inputs: Channels in.
    outputs: Channels out.
    ndim: Rank of the input.
    bias: Whether a bias is added.
    usable: Whether its channels are on the last axis only.
    dtype: Of the parameters.
    low_precision: Whether it computes in fewer than 32 bits.
  """

  path: str
  kind: str
  inputs: int
  outputs: int
  ndim: int
  bias: bool
  usable: bool
  dtype: Any
  low_precision: bool

  @property
  def multiplier(self) -> int:
    """Output channels of a depthwise convolution for each input channel."""
    return self.outputs // self.inputs if self.kind == 'depthwise' else 0


def layer_of(module: nn.Module, x, y) -> Layer:
  """What there is to know of one call of a layer."""
  kind, usable, inputs = 'other', True, x.shape[-1]
  if isinstance(module, nn.Conv):
    groups = module.feature_group_count
    depthwise = groups > 1 and groups == inputs
    kind = 'depthwise' if depthwise else 'grouped' if groups > 1 else 'conv'
  elif isinstance(module, nn.Dense):
    kind = 'dense'
  elif isinstance(module, nn.BatchNorm):
    kind = 'norm'
    axis = module.axis
    axis = axis if isinstance(axis, Sequence) else (axis,)
    usable = [a % x.ndim for a in axis] == [x.ndim - 1]
  return Layer(
    path='/'.join(module.path),
    kind=kind,
    inputs=inputs,
    outputs=y.shape[-1],
    ndim=x.ndim,
    bias=bool(getattr(module, 'use_bias', False)),
    usable=usable,
    dtype=getattr(module, 'param_dtype', np.float32),
    low_precision=y.dtype.itemsize < 4,
  )


def first_argument(args, kwargs) -> Any:
  """The array a layer is called with, by position or by name."""
  return args[0] if args else kwargs.get('inputs', kwargs.get('x'))


def intercept(
  around: Callable[[nn.Module, str, Any, Callable[[Any], Any]], Any],
  also: Callable[[nn.Module], bool] = lambda module: False,
) -> Callable[..., Any]:
  """An interceptor that hands each outermost layer call to `around`.

  A subclass that calls `super().__call__` is one call, not two.

  Args:
    around: (module, path, x, call: x -> y) -> y.
    also: Other modules to hand over.
  """
  active = set()

  def interceptor(next_fun, args, kwargs, context):
    module = context.module
    wanted = isinstance(module, LAYERS) or also(module)
    path = '/'.join(module.path) if wanted else ''
    if not wanted or context.method_name != '__call__' or path in active:
      return next_fun(*args, **kwargs)
    x = first_argument(args, kwargs)

    def call(x):
      if args:
        return next_fun(x, *args[1:], **kwargs)
      name = 'inputs' if 'inputs' in kwargs else 'x'
      return next_fun(**{**kwargs, name: x})

    active.add(path)
    try:
      return around(module, path, x, call)
    finally:
      active.discard(path)

  return interceptor


def _mark(name: str, function: Callable[..., Any], *args) -> jax.Array:
  """`function(*args)` as one jaxpr equation called `name`."""

  def marked(*args):
    return function(*args)

  marked.__name__ = marked.__qualname__ = name
  return jax.jit(marked)(*args)


ENTER, LEAVE, PEEK = 'pfs_enter:', 'pfs_leave:', 'pfs_peek:'


def _counted(module: nn.Module) -> bool:
  """Whether `costs` counts it although it is not one of `LAYERS`."""
  known = isinstance(module, nn.LayerNorm | nn.GroupNorm)
  return known or bool(getattr(type(module), 'macs_per_input', 0))


def trace(function: Callable[..., Any], *args) -> tuple[Any, dict[str, Layer]]:
  """The marked jaxpr of `function(*args)` and its layers by path.

  Args:
    function: Applies the model to `args`.
    *args: Trees of arrays or shapes; the first is the model's variables.
  """
  layers = {}

  def around(module, path, x, call):
    if not isinstance(module, LAYERS):
      y = call(_mark(PEEK + path, lambda x: x, x))
      layers.setdefault(path, layer_of(module, x, y))
      return y
    y = call(_mark(ENTER + path, lambda x: x, x))
    layers.setdefault(path, layer_of(module, x, y))
    return _mark(LEAVE + path, lambda x, y: y, x, y)

  interceptor = intercept(around, _counted)

  def traced(*args):
    with nn.intercept_methods(interceptor):
      return function(*args)

  return jax.make_jaxpr(traced)(*args), layers
