"""The folder of an export: how it comes to be, how it is read.

    directory/  manifest.json structure.json README.md
                model.stablehlo model.safetensors model.onnx

Everything is written into a folder beside the target, read back from there in a
fresh process, compared, and only then given the target's name: a folder that is
there is one that was right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pfs_jax import data, errors, storage
from pfs_jax.export import card, manifest, weights
from pfs_jax.export.manifest import BATCH_SIZES, FORMATS, TOLERANCES, normalised
from pfs_jax.structures import Structure

_SEED = 0
_TIMEOUT = 1800  # Seconds until the fresh process is given up.
_LARGEST = 2**34  # Bytes of a file that is read.


# Writing.


def save(
  directory: str | os.PathLike[str],
  module: Any,
  variables: Mapping[str, Any],
  structure: Structure,
  spec: data.Spec,
  *,
  formats: Sequence[str] = tuple(FORMATS),
  factory: str = '',
  measured: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> manifest.Manifest:
  """Writes a trained network in several formats, each checked.

  In a fresh process on the CPU each is read back; its logits of fixed random
  images, batches of 1 and 5, must be those of `module.apply(variables, x)` to
  1e-5 of the largest (ONNX: 1e-4).

  Args:
    directory: What to make; its parent is made too.
    module: Anything with `apply(variables, images) -> logits [N, classes]`;
      images are normalised float32 [N, H, W, C]. Must take any N.
    variables: Its collections, in evaluation mode.
    structure: Its counts, MACs and parameters.
    spec: Image size, channels, normalisation and class names.
    formats: Some of 'stablehlo', 'safetensors', 'onnx'.
    factory: 'package.module:callable' that makes a network of the user's own,
      as in config.model.factory; '' for one of the registry. Only safetensors
      need it, because their reader builds the network anew.
    measured: What the model card says besides, such as the test accuracy.
    overwrite: Whether an export of another structure in `directory` is
      replaced; one of the same structure always is, anything else never.

  Returns:
    The manifest; see docs/export.md.

  Raises:
    errors.UserError: A format or operator is unknown, `directory` holds
      something else, or an export differs. Then nothing is left behind.
  """
  target = pathlib.Path(os.path.abspath(directory))
  _check_formats(formats)
  _check_target(target, structure, overwrite)
  shape = (spec.image_size, spec.image_size, spec.channels)
  variables = jax.tree.map(np.asarray, jax.device_get(dict(variables)))
  batches = _batches(shape, spec)
  wanted = [_logits(module, variables, x, spec.num_classes) for x in batches]
  with _beside(target) as folder:
    storage.write_text(folder / weights.STRUCTURE, structure.to_json() + '\n')
    text = card.text(structure, spec, measured or {})
    storage.write_text(folder / manifest.CARD, text)
    facts = card.metadata(structure, spec)
    if 'safetensors' in formats:
      weights.build(structure, factory)  # Refuses here, not in the reader.
    for name in formats:
      FORMATS[name].write(folder, module, variables, shape, facts)
    made = manifest.of(folder, structure, spec, formats)
    storage.write_json(folder / manifest.FILE, made)
    found = _in_fresh_process(folder, batches, factory)
    for name in formats:
      error = max(map(_difference, found[name], wanted))
      _check_error(name, error)
      made['formats'][name]['max_error'] = error
    storage.write_json(folder / manifest.FILE, made)
    _put(folder, target)
  return made


def _check_formats(formats: Sequence[str]) -> None:
  for name in formats:
    if name not in FORMATS:
      raise errors.UserError(
        f'formats must be some of {", ".join(FORMATS)}; got {name!r}.'
      )
    for package in FORMATS[name].PACKAGES:
      manifest.version(package)
  if not formats or len(set(formats)) != len(formats):
    raise errors.UserError(
      f'formats must be one or more, each once; got {list(formats)}.'
    )


def _check_target(target: pathlib.Path, structure, overwrite: bool) -> None:
  """Refuses to replace what is not an export, or not one of this structure."""
  if not target.exists() or (target.is_dir() and not os.listdir(target)):
    return
  if not (target / manifest.FILE).is_file():
    raise errors.UserError(
      f'{target} exists and holds no export: give another directory.'
    )
  if overwrite:
    return
  try:
    there = manifest.read(target)['structure']
  except errors.UserError:
    there = None
  if there != manifest.described(structure):
    raise errors.UserError(
      f'{target} holds the export of another structure: delete it, or give '
      'another directory.'
    )


def _batches(shape, spec: data.Spec) -> list[np.ndarray]:
  """Random images, normalised."""
  random = np.random.default_rng(_SEED)
  sizes = [(n, *shape) for n in BATCH_SIZES]
  pixels = [random.integers(0, 256, size, np.uint8) for size in sizes]
  return [normalised(x, spec.mean, spec.std) for x in pixels]


def _logits(module, variables, x: np.ndarray, classes: int) -> np.ndarray:
  """The checkpoint's answer, in full precision."""
  try:
    device = jax.devices('cpu')[0]
  except RuntimeError:  # Only an accelerator: then its highest precision.
    device = None
  apply = jax.jit(lambda variables, x: module.apply(variables, x))
  with jax.default_device(device), jax.default_matmul_precision('highest'):
    logits = np.asarray(apply(variables, x))
  if logits.shape != (len(x), classes):
    raise errors.UserError(
      f'the model must give logits [N, {classes}]; got {list(logits.shape)} '
      f'for {len(x)} images.'
    )
  if not np.isfinite(logits).all():
    raise errors.UserError("the model's logits are not finite.")
  return logits


def _in_fresh_process(folder: pathlib.Path, batches, factory: str):
  """{format: [logits of each batch]} as another process reads the export.

  On the CPU: it is everywhere, and a TPU belongs to one process at a time.
  """
  with tempfile.TemporaryDirectory() as scratch:
    asked, answered = (pathlib.Path(scratch) / n for n in ('x.npz', 'y.npz'))
    storage.write_arrays(asked, {str(i): x for i, x in enumerate(batches)})
    program = (sys.executable, '-m', 'pfs_jax.export.check')
    done = subprocess.run(
      [*program, folder, asked, answered, factory],
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': os.pathsep.join(_import_path()),
      },
      capture_output=True,
      text=True,
      timeout=_TIMEOUT,
    )
    if done.returncode:
      lines = done.stderr.strip().splitlines() or ['it said nothing']
      raise errors.UserError(
        f'the export cannot be read back: {lines[-1].removeprefix("error: ")}'
      )
    arrays = storage.read_arrays(answered)
    return {
      name: [arrays[f'{name}/{i}'] for i in range(len(batches))]
      for name in manifest.read(folder)['formats']
    }


def _import_path() -> list[str]:
  """Where this process imports from, this package first."""
  package = str(pathlib.Path(__file__).parents[2])
  return [package, *(os.path.abspath(p) for p in sys.path if p != package)]


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
  if found.shape != wanted.shape:
    return float('inf')
  largest = max(float(np.abs(wanted).max()), 1e-38)
  return float(np.abs(found - wanted).max()) / largest


def _check_error(name: str, error: float) -> None:
  if not error <= TOLERANCES[name]:  # Not even a NaN passes.
    raise errors.UserError(
      f'{name}: the logits read back differ from those of the checkpoint by '
      f'{error:.2g} of the largest; allowed are {TOLERANCES[name]:g}. Nothing '
      'was written.'
    )


@contextlib.contextmanager
def _beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder beside the target that is gone at the end, if still there."""
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent)
  except OSError as e:
    storage.refuse_write(target, e, 0)
  try:
    yield pathlib.Path(folder)
  except OSError as e:  # A full disk.
    storage.refuse_write(target, e, 0)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _put(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a folder the target's name; a former export goes away."""
  umask = os.umask(0)
  os.umask(umask)
  folder.chmod(0o777 & ~umask)  # mkdtemp's own are the owner's alone.
  if target.exists():
    with _beside(target) as former:
      os.replace(target, former / 'former')
      os.replace(folder, target)
  else:
    os.replace(folder, target)


# Reading.


@dataclasses.dataclass(frozen=True)
class Exported:
  """A network that was read back: images -> logits.

  Attributes:
    format: The format it was read from.
    manifest: What manifest.json says.
  """

  format: str
  manifest: manifest.Manifest
  _function: Callable[[np.ndarray], Any]

  def __call__(self, images: Any) -> np.ndarray:
    """Normalised float [N, H, W, C] -> logits [N, classes]."""
    images = np.asarray(images)
    shape = tuple(self.manifest['input']['shape'][1:])
    good = np.issubdtype(images.dtype, np.floating) and images.ndim == 4
    if not good or images.shape[1:] != shape or not len(images):
      raise errors.UserError(
        f'images must be normalised float [N, {", ".join(map(str, shape))}]; '
        f'got {images.dtype} {list(images.shape)}.'
      )
    with _blamed(self.manifest['formats'][self.format]['file']):
      logits = np.asarray(self._function(images.astype(np.float32)))
      expected = (len(images), self.manifest['output']['shape'][1])
      if logits.shape != expected:
        raise ValueError(f'it gives {logits.shape} in place of {expected}')
    return logits


def load(
  directory: str | os.PathLike[str],
  format: str | None = None,
  factory: str = '',
) -> Exported:
  """Reads an export; runs no code that a file in it names.

  Args:
    directory: What `save` made.
    format: 'stablehlo', 'safetensors' or 'onnx'; None is the first of these
      that is there.
    factory: As for `save`, for the safetensors of a user's own network; must be
      the one that the export records.

  Returns:
    A function: normalised float [N, H, W, C], any N >= 1 -> logits
    [N, classes].

  Raises:
    errors.UserError: It is no export, has not this format, or a file is not
      what was written.
  """
  folder = pathlib.Path(directory)
  found = manifest.read(folder)
  there = [name for name in FORMATS if name in found['formats']]
  format = format or next(iter(there), None)
  if format not in there:
    raise errors.UserError(
      f'{folder}: format must be one of {", ".join(there)}; got {format!r}.'
    )
  room = FORMATS[format]
  for package in room.PACKAGES:
    manifest.version(package)
  for file in (weights.STRUCTURE, room.FILE):
    content = storage.read_bytes(folder / file, _LARGEST)
    if storage.sha256(content) != found['files'].get(file):
      raise errors.UserError(
        f'{folder / file} is damaged or was changed: its SHA-256 is not that '
        f'in {manifest.FILE}. Export again.'
      )
  shape = tuple(found['input']['shape'][1:])
  with _blamed(str(folder / room.FILE)):
    function = room.read(folder, shape, factory)
  return Exported(format, found, function)


@contextlib.contextmanager
def _blamed(file: str) -> Iterator[None]:
  """Turns whatever a library raises about a file into one line."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as e:  # Every library has kinds of its own.
    reason = next(iter(str(e).strip().splitlines()), '') or type(e).__name__
    raise errors.UserError(f'{file} cannot be used: {reason}') from e
