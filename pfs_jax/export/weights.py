"""safetensors: the variables by path; a reader builds the network again."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pfs_jax import errors, models, storage, surgery
from pfs_jax.structures import Structure

FILE = 'model.safetensors'
STRUCTURE = 'structure.json'  # Written with every export.
PLATFORMS = ('cpu', 'cuda', 'tpu')
PACKAGES = ('safetensors',)


def write(
  folder: pathlib.Path,
  module: Any,
  variables: Mapping[str, Any],
  shape: tuple[int, int, int],
  facts: Mapping[str, str] | None = None,
) -> None:
  """Writes the variables, named like 'params/stem/conv/kernel', and facts."""
  import safetensors.flax

  del module, shape
  arrays = flax.traverse_util.flatten_dict(dict(variables), sep='/')
  content = safetensors.flax.save(arrays, dict(facts or {}))
  storage.write_bytes(folder / FILE, content)  # Readable for others, too.


def read(
  folder: pathlib.Path, shape: tuple[int, ...], factory: str = ''
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
  """(the network that the structure describes, its name in the file).

  Raises:
    errors.UserError: The arrays are not those of this network.
  """
  import safetensors

  structure = Structure.from_json(storage.read_text(folder / STRUCTURE))
  module, model = build(structure, factory), structure.model
  if (*[model.get('image_size')] * 2, model.get('channels')) != shape:
    raise errors.UserError(f'{FILE} takes other images than {list(shape)}.')
  image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  key = jax.random.key(0)
  init = nn.meta.unbox(jax.eval_shape(module.init, key, image))
  held = {k: init[k] for k in ('params', 'batch_stats') if k in init}
  expected = flax.traverse_util.flatten_dict(held, sep='/')
  with safetensors.safe_open(folder / FILE, 'flax') as file:
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = file.metadata() or {}
  for name in sorted({*arrays, *expected}):
    found, wanted = (
      f'{tree[name].dtype} {list(tree[name].shape)}' if name in tree else None
      for tree in (arrays, expected)
    )
    if found != wanted:
      raise errors.UserError(
        f'{FILE}: {name} is {found}; that of the network of {STRUCTURE} is '
        f'{wanted}.'
      )
  variables = flax.traverse_util.unflatten_dict(arrays, sep='/')
  apply = jax.jit(lambda variables, x: module.apply(variables, x))
  return lambda x: apply(variables, x), facts.get('network', '')


def build(structure: Structure, factory: str = '') -> Any:
  """The narrow network of a structure: the registry's, or a user's own.

  Building a user's own network runs the code of its factory. A structure is
  data, possibly from a stranger, so it must not choose that code: the caller
  names the factory, as in config.model.factory, and the structure must name the
  same one.

  Raises:
    errors.UserError: The structure names another factory, or does not fit.
  """
  model = structure.model
  recorded = model.get('factory') or ''
  if recorded != factory:
    raise errors.UserError(
      f'structure: model.factory is {recorded!r}; the factory given is '
      f'{factory!r}. A factory is code that runs here: if you trust it, name '
      'it yourself (--factory=package.module:callable).'
    )
  if not factory:
    return models.build_from(structure)
  classes = [k for k in ('call', 'norm', 'conv') if model.get(k)]
  if classes:
    raise errors.UserError(
      f'structure: model.{classes[0]} names code, which only a config may do. '
      'Let the factory return (module, call) and register its own classes.'
    )
  network = surgery.network_from_factory(
    factory,
    model['num_classes'],
    model['image_size'],
    model['channels'],
    jnp.float32,
    residual=model.get('residual', False),
    leave=model.get('leave', ()),
  )
  return network.narrow(structure.counts)
