"""Describes an export: manifest.json, metadata, and a model card."""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import numpy as np

from pfs_jax import data, errors, runs, storage, tables
from pfs_jax.data import decoding
from pfs_jax.export import onnx, stablehlo, weights
from pfs_jax.structures import Structure

SCHEMA = 'pfs_jax.export/2'
FILE, CARD = 'manifest.json', 'README.md'
# By default, a reader takes the first of these that is there.
FORMATS: dict[str, Any] = {
  'stablehlo': stablehlo,
  'safetensors': weights,
  'onnx': onnx,
}
# The largest difference allowed of a logit, over the largest logit.
TOLERANCES = {'stablehlo': 1e-5, 'safetensors': 1e-5, 'onnx': 1e-4}
BATCH_SIZES = (1, 5)  # Batches of random images for the comparison.

_Size = Annotated[int, msgspec.Meta(ge=1, le=2**13)]  # An image fits in memory.
_Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
_Deviation = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]


class Input(TypedDict):
  """The images that the network takes."""

  shape: tuple[Literal['N'], _Size, _Size, _Size]
  mean: list[_Number]
  std: list[_Deviation]
  centre_crop: Annotated[float, msgspec.Meta(gt=0, le=1)]
  dtype: str
  layout: str
  channels: str
  range: list[float]


class Output(TypedDict):
  """The output of the network."""

  shape: tuple[Literal['N'], Annotated[int, msgspec.Meta(ge=1, le=2**20)]]
  meaning: str


class Format(TypedDict):
  """One format, and the largest difference of its logits."""

  file: str
  bytes: int
  platforms: list[str]
  tolerance: float
  max_error: float | None


class Manifest(TypedDict):
  """All of manifest.json; docs/export.md explains the fields."""

  schema: str
  input: Input
  output: Output
  data: str
  class_names: list[str]
  structure: dict[str, Any]
  formats: dict[str, Format]
  files: dict[str, str]
  checked: NotRequired[dict[str, Any]]
  versions: NotRequired[dict[str, str]]


def of(
  folder: pathlib.Path,
  structure: Structure,
  spec: data.Spec,
  formats: Sequence[str],
) -> Manifest:
  """The manifest of a folder that holds the files of all formats."""
  kinds = {name: FORMATS[name] for name in formats}
  packages = sorted({p for kind in kinds.values() for p in kind.PACKAGES})
  files = [weights.STRUCTURE, CARD, *(kind.FILE for kind in kinds.values())]
  made: Any = {
    'schema': SCHEMA,
    'input': {
      'shape': ['N', spec.image_size, spec.image_size, spec.channels],
      'dtype': 'float32',
      'layout': 'NHWC',
      'channels': _colour(spec.channels),
      'range': [0.0, 1.0],
      'mean': list(spec.mean),
      'std': list(spec.std),
      'centre_crop': 1.0 if spec.in_memory else decoding.EVALUATION_CROP,
    },
    'output': {'shape': ['N', spec.num_classes], 'meaning': 'logits'},
    'data': spec.name,
    'class_names': list(spec.class_names),
    'structure': described(structure),
    'formats': {
      name: {
        'file': kind.FILE,
        'bytes': (folder / kind.FILE).stat().st_size,
        'platforms': list(kind.PLATFORMS),
        'tolerance': TOLERANCES[name],
        'max_error': None,
      }
      for name, kind in kinds.items()
    },
    'files': {f: storage.sha256((folder / f).read_bytes()) for f in files},
    'checked': {'platform': 'cpu', 'batch_sizes': list(BATCH_SIZES)},
    'versions': {**runs.versions(), **{p: version(p) for p in packages}},
  }
  return made


def _colour(channels: int) -> str:
  return {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')


def described(structure: Structure) -> dict[str, Any]:
  """What a manifest says about a structure."""
  found = {
    'model': dict(structure.model),
    'counts': dict(zip(structure.layers, structure.counts, strict=True)),
    'macs': structure.macs,
    'params': structure.params,
  }
  return dict(json.loads(json.dumps(found)))  # As in the file.


def network_name(description: Mapping[str, Any]) -> str:
  """A name made of what `described` returns; each file of an export has it."""
  text = json.dumps(description, sort_keys=True)
  return f'pfs_jax_{storage.sha256(text.encode())[:16]}'


def version(package: str) -> str:
  """The version of a package; raises UserError where it is not installed."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError as e:
    raise errors.UserError(
      f"{package} is not installed: pip install 'pfs_jax[export]', or ask for "
      'other formats (--formats).'
    ) from e


def read(directory: str | os.PathLike[str]) -> Manifest:
  """Reads manifest.json of an export; raises UserError if there is none."""
  path = storage.expanded(directory) / FILE
  schema = storage.read_json(path, dict[str, Any]).get('schema')
  if schema != SCHEMA:
    raise errors.UserError(
      f'{path}: schema must be {SCHEMA}; got {schema!r}. Export again.'
    )
  found: Manifest = storage.read_json(path, Manifest)
  channels, classes = found['input']['shape'][3], found['output']['shape'][1]
  lengths = (len(found['input']['mean']), len(found['input']['std']))
  names = found['class_names']
  named = len(names) in (0, classes) and ''.join(names).isprintable()
  if lengths != (channels, channels) or not named:
    raise errors.UserError(
      f'{path}: input, output and (printable) class_names do not fit.'
    )
  return found


def normalised(pixels: np.ndarray, mean: Any, std: Any) -> np.ndarray:
  """uint8 [N, H, W, C] -> float32 (pixels / 255 - mean) / std.

  >>> normalised(np.full((1, 1, 1, 1), 255, np.uint8), [0.5], [0.25]).item()
  2.0
  """
  mean, std = (np.reshape(np.float32(v), (1, 1, 1, -1)) for v in (mean, std))
  return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def facts(structure: Structure, spec: data.Spec) -> dict[str, str]:
  """The metadata of ONNX and safetensors files; lists are JSON."""
  return {
    'network': network_name(described(structure)),
    'data': spec.name,
    'class_names': json.dumps(list(spec.class_names)),
    'mean': json.dumps(list(spec.mean)),
    'std': json.dumps(list(spec.std)),
    'structure': json.dumps(json.loads(structure.to_json())),
  }


def card(
  structure: Structure, spec: data.Spec, measured: Mapping[str, str]
) -> str:
  """The model card in Markdown; `measured` has further rows of its table."""
  name = structure.model.get('name') or structure.model.get('factory')
  size, colour = spec.image_size, _colour(spec.channels)
  shape = f'float32 [N, {size}, {size}, {spec.channels}], {colour}'
  rows = [
    ['data', spec.name],
    ['input', shape],
    ['normalisation', f'(pixels / 255 - {list(spec.mean)}) / {list(spec.std)}'],
    ['output', f'logits of {spec.num_classes} classes'],
    ['MACs of one image', f'{structure.macs:,}'],
    ['parameters', f'{structure.params:,}'],
    *map(list, measured.items()),
  ]
  counts = zip(structure.layers, map(str, structure.counts), strict=True)
  classes = enumerate(spec.class_names)
  parts = [
    f'# {name or "A network"}, pruned, for {spec.name}',
    f'An image classifier of {size} x {size} images. pfs_jax chose its channel '
    'counts for a budget (after "Pruning from Scratch", AAAI 2020); then its '
    'weights were trained. It can name only the classes below, and only on '
    'images like those that it was trained on.',
    tables.markdown('', ['', 'value'], rows),
    '## Use\n\n```sh\npython -m pfs_jax.predict . image.png\n```',
    'manifest.json says how each file was checked. Without this code: '
    '`jax.export.deserialize` reads model.stablehlo, any ONNX runtime reads '
    'model.onnx.',
    tables.markdown('Channels', ['layer', 'kept'], list(map(list, counts))),
    tables.markdown(
      'Classes', ['label', 'class'], [[str(i), name] for i, name in classes]
    ),
  ]
  return '\n\n'.join(parts) + '\n'
