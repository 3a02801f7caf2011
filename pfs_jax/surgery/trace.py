"""Marks the calls of layers in a trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from pfs_jax import costs, described

# Names of equations: a layer begins, a layer ends, a layer that is looked into.
ENTER, LEAVE, PEEK = 'pfs_enter:', 'pfs_leave:', 'pfs_peek:'


def _mark(name: str, function: Callable[..., Any], *args) -> jax.Array:
  """`function(*args)` as one jaxpr equation called `name`."""

  def marked(*args):
    return function(*args)

  marked.__name__ = marked.__qualname__ = name
  return jax.jit(marked)(*args)


def trace(
  function: Callable[..., Any], *args: Any
) -> tuple[Any, list[costs.Layer]]:
  """The marked jaxpr of `function(*args)` and its layer calls in forward order.

  Args:
    function: Applies the model to `args`.
    *args: Trees of arrays or shapes; the first is the model's variables.
  """
  calls, seen = [], set()

  def around(module, path, x, call):
    looked_into = described.is_pool(module)
    mark = PEEK if looked_into else ENTER
    axis = getattr(module, 'axis_name', None) or ''  # Before it is left out.
    y = call(_mark(mark + path, lambda x: x, x))
    layer = costs.describe(module, path, x, y)
    again = path in seen
    calls.append(dataclasses.replace(layer, axis_name=axis, again=again))
    seen.add(path)
    if looked_into:
      return y
    return _mark(LEAVE + path, lambda x, y: y, x, y)

  def traced(*args):
    with nn.intercept_methods(costs.intercept(around)):
      return function(*args)

  return jax.make_jaxpr(traced)(*args), calls
