"""The folder of an export: what is in it, how it comes to be, how it is read.

    directory/  manifest.json structure.json
                model.stablehlo model.safetensors model.onnx

Everything is written into a folder beside the target, read back from there in a
fresh process, compared, and only then given the target's name: a folder that is
there is one that was right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pfs_jax import data, errors, runs, storage
from pfs_jax.export import onnx, stablehlo, weights
from pfs_jax.structures import Structure

SCHEMA = 'pfs_jax.export/1'
MANIFEST = 'manifest.json'

# In the order in which a reader tries them.
FORMATS = {'stablehlo': stablehlo, 'safetensors': weights, 'onnx': onnx}
# Largest difference of a logit, over the largest logit.
TOLERANCES = {'stablehlo': 1e-5, 'safetensors': 1e-5, 'onnx': 1e-4}
BATCH_SIZES = (1, 5)  # Of the random images that are compared.
SEED = 0
_TIMEOUT = 1800  # Seconds until the fresh process is given up.

# Centre crop of evaluation on sets that are streamed (`data.decoding.decode`).
_CROP = 224 / 256


# Writing.


def save(
  directory: str | os.PathLike,
  module: Any,
  variables: Mapping[str, Any],
  structure: Structure,
  spec: data.Spec,
  *,
  formats: Sequence[str] = tuple(FORMATS),
  factory: str = '',
  overwrite: bool = False,
) -> dict[str, Any]:
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
    (folder / weights.STRUCTURE).write_text(structure.to_json() + '\n')
    if 'safetensors' in formats:
      weights.build(structure, factory)  # Refuses here, not in the reader.
    for name in formats:
      FORMATS[name].write(folder, module, variables, shape)
    manifest = _manifest(folder, structure, spec, formats)
    _write_json(folder / MANIFEST, manifest)
    found = _in_fresh_process(folder, batches, factory)
    for name in formats:
      error = max(map(_difference, found[name], wanted))
      _check_error(name, error)
      manifest['formats'][name]['max_error'] = error
    _write_json(folder / MANIFEST, manifest)
    _put(folder, target)
  return manifest


def _check_formats(formats: Sequence[str]) -> None:
  for name in formats:
    if name not in FORMATS:
      raise errors.UserError(
        f'formats must be some of {", ".join(FORMATS)}; got {name!r}.'
      )
    for package in FORMATS[name].PACKAGES:
      _version(package)
  if not formats or len(set(formats)) != len(formats):
    raise errors.UserError(
      f'formats must be one or more, each once; got {list(formats)}.'
    )


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError as e:
    raise errors.UserError(
      f'{package} is not installed: pip install {package}, or ask for other '
      'formats.'
    ) from e


def _check_target(target: pathlib.Path, structure, overwrite: bool) -> None:
  """Refuses to replace what is not an export, or not one of this structure."""
  if not target.exists() or (target.is_dir() and not os.listdir(target)):
    return
  if not (target / MANIFEST).is_file():
    raise errors.UserError(
      f'{target} exists and holds no export: give another directory.'
    )
  if overwrite:
    return
  try:
    there = read_manifest(target)['structure']
  except errors.UserError:
    there = None
  if there != _described(structure):
    raise errors.UserError(
      f'{target} holds the export of another structure: delete it, or give '
      'another directory.'
    )


def _described(structure: Structure) -> dict[str, Any]:
  counts = dict(zip(structure.layers, structure.counts, strict=True))
  described = {
    'model': dict(structure.model),
    'counts': counts,
    'macs': structure.macs,
    'params': structure.params,
  }
  return json.loads(json.dumps(described))  # As it will be read.


def _batches(shape, spec: data.Spec) -> list[np.ndarray]:
  """Random images, normalised."""
  random = np.random.default_rng(SEED)
  sizes = [(n, *shape) for n in BATCH_SIZES]
  pixels = [random.integers(0, 256, size, np.uint8) for size in sizes]
  return [normalised(x, spec.mean, spec.std) for x in pixels]


def normalised(
  pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
  """uint8 [N, H, W, C] -> float32 (pixels / 255 - mean) / std."""
  m, s = (np.reshape(v, (1, 1, 1, -1)).astype(np.float32) for v in (mean, std))
  return (pixels.astype(np.float32) / np.float32(255) - m) / s


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


def _manifest(folder, structure, spec: data.Spec, formats):
  packages = sorted({p for f in formats for p in FORMATS[f].PACKAGES})
  return {
    'schema': SCHEMA,
    'input': {
      'shape': ['N', spec.image_size, spec.image_size, spec.channels],
      'dtype': 'float32',
      'layout': 'NHWC',
      'channels': 'grey' if spec.channels == 1 else 'RGB',
      'range': [0.0, 1.0],
      'mean': list(spec.mean),
      'std': list(spec.std),
      'centre_crop': 1.0 if spec.in_memory else _CROP,
    },
    'output': {'shape': ['N', spec.num_classes], 'meaning': 'logits'},
    'data': spec.name,
    'class_names': list(spec.class_names),
    'structure': _described(structure),
    'formats': {name: _format(folder, name) for name in formats},
    'files': {
      weights.STRUCTURE: _sha256(folder / weights.STRUCTURE),
      **{FORMATS[f].FILE: _sha256(folder / FORMATS[f].FILE) for f in formats},
    },
    'checked': {'platform': 'cpu', 'batch_sizes': list(BATCH_SIZES)},
    'versions': {**runs.versions(), **{p: _version(p) for p in packages}},
  }


def _format(folder: pathlib.Path, name: str) -> dict[str, Any]:
  file = FORMATS[name].FILE
  return {
    'file': file,
    'bytes': (folder / file).stat().st_size,
    'platforms': list(FORMATS[name].PLATFORMS),
    'tolerance': TOLERANCES[name],
    'max_error': None,
  }


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + '\n')


def _in_fresh_process(folder: pathlib.Path, batches, factory: str):
  """{format: [logits of each batch]} as another process reads the export.

  On the CPU: it is everywhere, and a TPU belongs to one process at a time.
  """
  with tempfile.TemporaryDirectory() as scratch:
    asked, answered = (pathlib.Path(scratch) / n for n in ('x.npz', 'y.npz'))
    np.savez(asked, *batches)
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
    with np.load(answered) as arrays:
      return {
        name: [arrays[f'{name}/{i}'] for i in range(len(batches))]
        for name in read_manifest(folder)['formats']
      }


def _import_path() -> list[str]:
  """Where this process imports from, this package first."""
  package = str(pathlib.Path(__file__).parents[2])
  return [package, *(os.path.abspath(p) for p in sys.path if p != package)]


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
  if found.shape != wanted.shape:
    return float('inf')
  largest = max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
  return float(np.abs(found - wanted).max()) / largest


def _check_error(name: str, error: float) -> None:
  if not error <= TOLERANCES[name]:  # Not even a NaN passes.
    raise errors.UserError(
      f'{name}: the logits read back differ from those of the checkpoint by '
      f'{error:.2g} of the largest; allowed are {TOLERANCES[name]:g}. Nothing '
      'was written.'
    )


@contextlib.contextmanager
def _beside(target: pathlib.Path):
  """A new folder beside the target that is gone at the end, if still there."""
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent)
  except OSError as e:
    raise errors.UserError(f'{target} cannot be written: {e}.') from e
  try:
    yield pathlib.Path(folder)
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
  manifest: Mapping[str, Any]
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
    return np.asarray(self._function(images.astype(np.float32)))


def load(
  directory: str | os.PathLike, format: str | None = None, factory: str = ''
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
  manifest = read_manifest(folder)
  there = [name for name in FORMATS if name in manifest['formats']]
  format = format or next(iter(there), None)
  if format not in there:
    raise errors.UserError(
      f'{folder}: format must be one of {", ".join(there)}; got {format!r}.'
    )
  for package in FORMATS[format].PACKAGES:
    _version(package)
  for file in (weights.STRUCTURE, FORMATS[format].FILE):
    _check_file(folder / file, manifest['files'].get(file))
  return Exported(format, manifest, FORMATS[format].read(folder, factory))


_FIELDS = {
  'input': dict,
  'output': dict,
  'class_names': list,
  'structure': dict,
  'formats': dict,
  'files': dict,
}


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
  """manifest.json of an export; raises UserError where it is none."""
  path = pathlib.Path(directory) / MANIFEST
  manifest = storage.read_json(path)
  schema = manifest.get('schema') if isinstance(manifest, dict) else None
  if schema != SCHEMA:
    raise errors.UserError(f'{path}: schema must be {SCHEMA}; got {schema!r}.')
  for name, kind in _FIELDS.items():
    if not isinstance(manifest.get(name), kind):
      raise errors.UserError(f'{path}: {name} is missing or of a wrong type.')
  if not _is_whole(manifest):
    raise errors.UserError(
      f'{path}: input, output and class_names do not fit each other.'
    )
  return manifest


def _is_whole(manifest: Mapping[str, Any]) -> bool:
  """Whether what a reader relies on is there; a person may have edited it."""
  try:
    expected = manifest['input']
    _, height, width, channels = expected['shape']
    _, classes = manifest['output']['shape']
    numbers = [*expected['mean'], *expected['std'], expected['centre_crop']]
    return (
      all(type(n) is int and n > 0 for n in (height, width, channels, classes))
      and len(expected['mean']) == len(expected['std']) == channels
      and all(isinstance(n, (int, float)) for n in numbers)
      and len(manifest['class_names']) in (0, classes)
    )
  except (KeyError, TypeError, ValueError):
    return False


def _check_file(path: pathlib.Path, expected: str | None) -> None:
  try:
    found = _sha256(path)
  except OSError as e:
    raise errors.UserError(f'{path} cannot be read: {e.strerror}.') from e
  if found != expected:
    raise errors.UserError(
      f'{path} is damaged or was changed: its SHA-256 is not that in '
      f'{MANIFEST}. Export again.'
    )
