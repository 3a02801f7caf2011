"""Writes and reads the folder of an export.

    directory/  manifest.json structure.json README.md
                model.stablehlo model.safetensors model.onnx

All files are written into a folder beside the target, read back from there in a
fresh process, and compared. Only then is the folder renamed to the target, so
that every export that exists has passed the check.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pfs_jax import data, errors, storage
from pfs_jax.export import manifest, weights
from pfs_jax.export.manifest import BATCH_SIZES, FORMATS, TOLERANCES
from pfs_jax.structures import Structure

_TIMEOUT = 1800  # Seconds that the fresh process may take.
_LARGEST = 2**34  # Most bytes of a file that is read.


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

  A fresh process on the CPU reads each format back. For fixed random images x,
  in batches of 1 and 5, its logits must equal `module.apply(variables, x)` up
  to 1e-5 of the largest logit (ONNX: 1e-4).

  Args:
    directory: The folder to make; its parent is made too.
    module: Anything with `apply(variables, images) -> logits [N, classes]`;
      images are normalised float32 [N, H, W, C]. It must take any N.
    variables: Its collections, in evaluation mode.
    structure: Its counts, MACs and parameters.
    spec: Image size, channels, normalisation and class names.
    formats: Some of 'stablehlo', 'safetensors', 'onnx'.
    factory: 'package.module:callable' that makes a network of the user's own,
      as in config.model.factory; '' for one of the registry. Only safetensors
      need it, because their reader builds the network anew.
    measured: Further rows of the model card, such as the test accuracy.
    overwrite: Whether an export of another structure in `directory` is
      replaced. One of the same structure always is, and anything else never.

  Returns:
    The manifest; see docs/export.md.

  Raises:
    errors.UserError: A format or operator is unknown, `directory` holds
      something else, or the logits differ. Then nothing is written.
  """
  target = pathlib.Path(os.path.realpath(storage.expanded(directory)))
  unknown = set(formats) - set(FORMATS)
  if unknown or not formats:
    raise errors.UserError(
      f'formats must be some of {", ".join(FORMATS)}; got {list(formats)}.'
    )
  for name in formats:
    for package in FORMATS[name].PACKAGES:
      manifest.version(package)
  _check_target(target, structure, overwrite)
  shape = (spec.image_size, spec.image_size, spec.channels)
  variables = jax.tree.map(np.asarray, jax.device_get(dict(variables)))
  random = np.random.default_rng(0)
  pixels = [random.integers(0, 256, (n, *shape), np.uint8) for n in BATCH_SIZES]
  batches = [manifest.normalised(p, spec.mean, spec.std) for p in pixels]
  wanted = [_logits(module, variables, x, spec.num_classes) for x in batches]
  if 'safetensors' in formats:
    weights.build(structure, factory)  # Refuses before anything is written.
  with _replacing(target) as folder:
    storage.write_text(folder / weights.STRUCTURE, structure.to_json() + '\n')
    card = manifest.card(structure, spec, measured or {})
    storage.write_text(folder / manifest.CARD, card)
    facts = manifest.facts(structure, spec)
    for name in formats:
      with _blamed(f'the model as {name}'):
        FORMATS[name].write(folder, module, variables, shape, facts)
    made = manifest.of(folder, structure, spec, formats)
    storage.write_json(folder / manifest.FILE, made)
    arrays = _read_back(folder, batches, factory)
    for name in formats:
      found = [arrays[f'{name}/{i}'] for i in range(len(batches))]
      made['formats'][name]['max_error'] = _error(name, found, wanted)
    storage.write_json(folder / manifest.FILE, made)
  return made


def _check_target(
  target: pathlib.Path, structure: Structure, overwrite: bool
) -> None:
  """Refuses to replace other files, or an export of another structure."""
  if not target.exists():
    return
  if os.path.ismount(target):
    raise errors.UserError(f'{target} is a mount point: give a folder in it.')
  if target.is_dir() and not os.listdir(target):
    return
  ours = {manifest.FILE, manifest.CARD, weights.STRUCTURE}
  ours |= {kind.FILE for kind in FORMATS.values()}
  other = target.is_dir() and sorted(set(os.listdir(target)) - ours)
  if other or not (target / manifest.FILE).is_file():
    holds = f'holds {other[0]}' if other else 'holds no export'
    raise errors.UserError(
      f'{target} exists and {holds}: give another directory.'
    )
  there = None
  with contextlib.suppress(errors.UserError):
    there = manifest.read(target)['structure']
  if not overwrite and there != manifest.described(structure):
    raise errors.UserError(
      f'{target} holds the export of another structure: delete it, or give '
      'another directory.'
    )


def _logits(module, variables, x: np.ndarray, classes: int) -> np.ndarray:
  """The logits of the module itself, in full precision."""
  device = None
  with contextlib.suppress(RuntimeError):  # No CPU: the highest precision.
    device = jax.devices('cpu')[0]
  apply = jax.jit(lambda variables, x: module.apply(variables, x))
  with jax.default_device(device), jax.default_matmul_precision('highest'):
    logits = jax.device_get(apply(variables, x))
  shape = getattr(logits, 'shape', 'several outputs')
  if shape != (len(x), classes):
    raise errors.UserError(
      f'the model must give logits [N, {classes}]; got {shape} for {len(x)} '
      'images.'
    )
  if not np.isfinite(logits).all():
    raise errors.UserError("the model's logits are not finite.")
  return logits


def _read_back(
  folder: pathlib.Path, batches: Sequence[np.ndarray], factory: str
) -> dict[str, np.ndarray]:
  """{'<format>/<i>': logits} of each batch i of images in another process.

  That process uses the CPU, because a TPU belongs to one process at a time.
  """
  asked, answered = (folder.with_name(name) for name in ('x.npz', 'y.npz'))
  storage.write_arrays(asked, {str(i): x for i, x in enumerate(batches)})
  program = (sys.executable, '-m', 'pfs_jax.export.check')
  root = str(pathlib.Path(__file__).parents[2])
  path = map(os.path.abspath, [root, *sys.path])
  environment = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(path)}
  try:
    done = subprocess.run(
      [*program, folder, asked, answered, factory],
      env={**os.environ, **environment},
      capture_output=True,
      text=True,
      timeout=_TIMEOUT,
    )
  except subprocess.TimeoutExpired as e:
    raise errors.UserError(
      f'the export cannot be read back within {_TIMEOUT} s.'
    ) from e
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['it said nothing']
    raise errors.UserError(
      f'the export cannot be read back: {lines[-1].removeprefix("error: ")}'
    )
  return storage.read_arrays(answered)


def _error(
  name: str, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]
) -> float:
  """The largest difference of a logit over the largest logit of its batch."""
  error = 0.0
  for x, y in zip(found, wanted, strict=True):
    same = x.shape == y.shape
    largest = max(float(np.abs(y).max()), 1e-38)
    difference = float(np.abs(x - y).max()) / largest if same else np.inf
    if not difference <= TOLERANCES[name]:  # A NaN fails, too.
      raise errors.UserError(
        f'{name}: the logits read back differ from those of the checkpoint by '
        f'{difference:.2g} of the largest; allowed are {TOLERANCES[name]:g}. '
        'Nothing was written.'
      )
    error = max(error, difference)
  return error


@contextlib.contextmanager
def _replacing(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder that becomes the target if no error occurs."""
  scratch = target.with_name(f'.{target.name}.{os.getpid()}')
  try:
    shutil.rmtree(scratch, ignore_errors=True)  # Left by a killed process.
    (scratch / 'new').mkdir(parents=True)
    yield scratch / 'new'
    if target.exists():
      os.replace(target, scratch / 'former')
    os.replace(scratch / 'new', target)
  except OSError as e:  # A full disk.
    storage.refuse_write(target, e, 0)
  finally:
    if not target.exists() and (scratch / 'former').exists():
      os.replace(scratch / 'former', target)
    shutil.rmtree(scratch, ignore_errors=True)


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
    format: 'stablehlo', 'safetensors' or 'onnx'; None: the first that is there.
    factory: As for `save`, for the safetensors of a user's own network; must be
      the one that the export records.

  Returns:
    A function: normalised float [N, H, W, C], N >= 1 -> logits [N, classes].

  Raises:
    errors.UserError: The folder holds no export, the format is missing, or a
      file was changed or belongs to another structure.
  """
  folder = storage.expanded(directory)
  found = manifest.read(folder)
  there = [name for name in FORMATS if name in found['formats']]
  format = format or next(iter(there), None)
  if format not in there:
    raise errors.UserError(
      f'{folder}: format must be one of {", ".join(there)}; got {format!r}.'
    )
  kind = FORMATS[format]
  for package in kind.PACKAGES:
    manifest.version(package)
  for file in (weights.STRUCTURE, kind.FILE):
    content = storage.read_bytes(folder / file, _LARGEST)
    if storage.sha256(content) != found['files'].get(file):
      raise errors.UserError(
        f'{folder / file} is damaged or was changed: its SHA-256 is not that '
        f'in {manifest.FILE}. Export again.'
      )
  with _blamed(str(folder / kind.FILE)):
    shape = tuple(found['input']['shape'][1:])
    function, network = kind.read(folder, shape, factory)
  text = storage.read_text(folder / weights.STRUCTURE)
  structure = manifest.described(Structure.from_json(text, folder))
  described = manifest.network_name(structure)
  for file, name in ((weights.STRUCTURE, described), (kind.FILE, network)):
    if name != manifest.network_name(found['structure']):
      raise errors.UserError(
        f'{folder / file} is not of the structure in {manifest.FILE}: it '
        'belongs to another network. Export again.'
      )
  return Exported(format, found, function)


@contextlib.contextmanager
def _blamed(file: str) -> Iterator[None]:
  """Turns an exception about a file or a model into an error of one line."""
  try:
    yield
  except (errors.UserError, OSError):
    raise
  except Exception as e:  # Every library has its own types.
    reason = next(iter(str(e).strip().splitlines()), '') or type(e).__name__
    raise errors.UserError(f'{file} cannot be used: {reason}') from e
