"""The registry of models: names to modules, groups, costs, sliced weights.

Arguments mean the same in all functions: `width` is the base width of a family
(None: its default), so channel expansion is a larger width; `counts` are the
channels of the gated layers, in the order of `gate_sizes` (None: all).

>>> sizes = gate_sizes('vgg16', 4)
>>> module = build('vgg16', 10, 4, counts=[2] * len(sizes))
>>> model = cost_model('vgg16', 10, 32, width=4)
>>> costs.count(module, (32, 32, 3)) == (model.macs([2] * 13), 568)
True
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pfs_jax import costs, cpu, errors, gating, groups, layers
from pfs_jax.models import mobilenet, resnet, vgg

# {name: the module of its family}. A module has WIDTHS, {name: the base width
# that None stands for}, CLASSES, {name: a `layers.Classifier`}, and
# gate_sizes(name, width).
_FAMILIES: dict[str, Any] = {
  name: module for module in (resnet, vgg, mobilenet) for name in module.WIDTHS
}
# Networks whose block outputs can be widened by a multiplier.
MULTIPLIED = ('mobilenet_v2', *resnet.BOTTLENECKS)

# Where a group's gates stand: at its last BatchNorm before the layer that mixes
# its channels ('acting'), or at the BatchNorm of the layer that makes them
# ('published'). Only the MobileNets' groups have more than one.
GATE_SITES = ('acting', 'published')


def _family(name: str) -> Any:
  """The module of a name's family; UserError with the known names."""
  if name not in _FAMILIES:
    raise errors.UserError(
      f'config.model.name must be one of {", ".join(_FAMILIES)}; got {name!r}.'
    )
  return _FAMILIES[name]


def default_width(name: str) -> int:
  """The base width of a network if none is given."""
  return _family(name).WIDTHS[name]


def gate_sizes(name: str, width: int | None = None) -> dict[str, int]:
  """{layer name: channels} of the gated layers, in forward order."""
  width = default_width(name) if width is None else width
  return _family(name).gate_sizes(name, width)


def build(
  name: str,
  num_classes: int,
  width: int | None = None,
  counts: Sequence[int] | None = None,
  gated: bool = False,
  multiplier: float = 1.0,
  dtype: Any = jnp.float32,
  gate_site: str = 'acting',
) -> nn.Module:
  """A Linen module: (x: [N, H, W, C], train=False) -> logits [N, num_classes].

  Args:
    name: A name of the registry.
    num_classes: Number of classes.
    width: Base width: by default 16 for the CIFAR ResNets, 64 for VGG and
      ResNet-50, 32 for the MobileNets.
    counts: Channels of the gated layers.
    gated: Whether gated layers have a [C] vector in the collection `gates`,
      which multiplies the output of their BatchNorm (`gating.gate`).
    multiplier: Widens block outputs, in the families that allow it.
    dtype: Dtype of the computation. Parameters and gates are float32, or
      float64 with dtype float64 (under `jax_enable_x64`).
    gate_site: Where the MobileNets' gates stand: 'acting', behind the depthwise
      convolution, or 'published', in front of it, where the next BatchNorm
      cancels them. It has no effect on the other families, or on the names of
      the gates.

  Raises:
    errors.UserError: Unknown name or gate site, wrong number of counts, counts
      below 1, or a multiplier for a family without one.
  """
  width = default_width(name) if width is None else width
  if width < 1:
    raise errors.UserError(f'config.model.width must be >= 1; got {width}.')
  if multiplier != 1.0 and name not in MULTIPLIED:
    raise errors.UserError(
      f'config.model.multiplier must be 1.0 for {name}; got {multiplier}.'
    )
  if gate_site not in GATE_SITES:
    raise errors.UserError(
      f'config.model.gate_site must be one of {", ".join(GATE_SITES)}; '
      f'got {gate_site!r}.'
    )
  sizes = gate_sizes(name, width)
  given = tuple(sizes.values() if counts is None else counts)
  counts = tuple(map(int, given))
  if len(counts) != len(sizes) or min(counts) < 1 or counts != given:
    raise errors.UserError(
      f'counts of {name} must be {len(sizes)} integers >= 1, one for each '
      f'gated layer; got {len(given)}, the least {min(given, default=None)}.'
    )
  made = _family(name).CLASSES[name]
  module = made(num_classes, counts, name, width, multiplier, dtype=dtype)
  if not gated:
    return module
  # The BatchNorms that carry the gates are the same for all sizes.
  found = table(name, 10, 32, dtype=dtype, gate_site=gate_site, counts=counts)
  return gating.gate(module, found)


@functools.lru_cache(maxsize=64)
def _marked_calls(
  name: str, num_classes: int, shape: tuple[int, ...], width, multiplier
) -> list[costs.Layer]:
  """The layer calls of a network with a mark as the size of each group."""
  marks = groups.marks(len(gate_sizes(name, width)))
  marked = build(name, num_classes, width, marks, multiplier=multiplier)
  return costs.record_module(marked, shape)


def table(
  name: str,
  num_classes: int,
  image_size: int,
  channels: int = 3,
  width: int | None = None,
  multiplier: float = 1.0,
  dtype: Any = jnp.float32,
  gate_site: str = 'acting',
  counts: Sequence[int] | None = None,
) -> groups.Table:
  """The channel groups of a network of the registry.

  Images are [image_size, image_size, channels]; the rest is as for `build`.
  """
  shape = (image_size, image_size, channels)
  sizes = gate_sizes(name, width)
  return groups.from_marks(
    _marked_calls(name, num_classes, shape, width, multiplier),
    dict(zip(sizes, counts or sizes.values(), strict=True)),
    carrier=-1 if gate_site == 'acting' else 0,
    dtype=layers.param_dtype(dtype),
  )


def gates_by_layer(name: str, gates: Mapping[str, Any]) -> dict[str, Any]:
  """The collection `gates` as {layer name: [C]}, in forward order."""
  return groups.by_name(gate_sizes(name), gates)


def slice_variables(
  name: str,
  variables: Mapping[str, Any],
  kept: Mapping[str, Any],
  *,
  width: int | None = None,
  gate_site: str = 'acting',
) -> dict[str, Any]:
  """The variables of the narrow network that keeps these channels.

  Evaluated, they give the logits of the wide network with all other gates 0.

  Args:
    name: A name of the registry.
    variables: `params` and `batch_stats` of the wide network.
    kept: {layer name: sorted indices}, as `prune.kept` gives them.
    width: Base width of the wide network.
    gate_site: The site of the gates by which the channels were chosen.

  Raises:
    errors.UserError: Wrong indices, or channels removed at the published gate
      site where it is not the acting one (`groups.Table.slice_variables`).
  """
  found = table(name, 10, 32, width=width, gate_site=gate_site)
  return found.slice_variables(variables, kept)


@functools.lru_cache(maxsize=64)
def cost_model(
  name: str,
  num_classes: int,
  image_size: int,
  channels: int = 3,
  width: int | None = None,
  multiplier: float = 1.0,
) -> costs.CostModel:
  """MACs and parameters as exact functions of the counts.

  The network is traced once, abstractly; each call of `.macs` or `.params` then
  takes microseconds. The arguments are those of `table`.
  """
  shape = (num_classes, image_size, channels)
  return table(name, *shape, width, multiplier).cost_model()


def init(
  module: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
  """New random variables of a module for images of shape (H, W, C).

  It is compiled, so that the forward pass in `module.init` is left out.
  """
  # Inside a traced function, JAX allows no compiler options.
  is_traced = isinstance(jnp.zeros(()), jax.core.Tracer)
  return (_init if is_traced else _compiled_init())(module, key, image_shape)


def _init(module: nn.Module, key: jax.Array, image_shape: Any) -> Any:
  x = jnp.zeros((1, *image_shape), jnp.float32)
  return nn.meta.unbox(module.init(key, x))  # Without names of mesh axes.


@functools.cache
def _compiled_init() -> Callable[..., Any]:
  options = cpu.options_to_run_once()
  return jax.jit(_init, static_argnums=(0, 2), compiler_options=options)
