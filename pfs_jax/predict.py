"""Classifies images by an exported network.

python -m pfs_jax.predict exported_dir image.png [image2.png ...]
"""

import argparse
import pathlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from PIL import UnidentifiedImageError

from pfs_jax import console, devices, errors, export, storage
from pfs_jax.data import decoding, loading

_BATCH = 64  # Images in memory at a time.


def read_image(
  path: str, expected: Mapping[str, Any], invert: bool = False
) -> np.ndarray:
  """Reads an image file in the form of the images that the network evaluates.

  It is upright, and grey or RGB, uint8 [H, W, C]. Its centre square is resized;
  for networks of large images, the centre crop of the evaluation is (see
  `data.decoding.decode`). `expected` is the `input` of the manifest.

  Raises:
    errors.UserError: The file cannot be read.
  """
  _, size, _, channels = expected['shape']
  content = storage.read_regular_file(pathlib.Path(path))
  keep = expected['centre_crop']
  try:
    pixels = decoding.decode(
      content, size, keep=keep, channels=channels, formats=decoding.MORE_FORMATS
    )
  except Exception as e:  # Damaged files raise many types of errors.
    unknown = isinstance(e, UnidentifiedImageError)
    reason = 'its format is unknown' if unknown else loading.reason(e)
    raise errors.UserError(f'{path} cannot be read: {reason}.') from e
  return 255 - pixels if invert else pixels


def probabilities(
  classify: export.Exported, pixels: Sequence[np.ndarray]
) -> np.ndarray:
  """Probabilities [N, classes], which sum to 1 for each image."""
  expected = classify.manifest['input']
  logits = classify(
    export.normalised(np.stack(pixels), expected['mean'], expected['std'])
  ).astype(np.float64)
  if not np.isfinite(logits).all():
    raise errors.UserError("the network's logits are not finite.")
  powers = np.exp(logits - logits.max(axis=1, keepdims=True))
  return powers / powers.sum(axis=1, keepdims=True)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise errors.UserError(f'{message}; see --help.')


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog='python -m pfs_jax.predict', description=__doc__)
  parser.add_argument('directory', help='the folder of an export')
  parser.add_argument('images', nargs='+', metavar='image')
  parser.add_argument(
    '--format', help='stablehlo, safetensors or onnx; default: the first found'
  )
  parser.add_argument(
    '--factory',
    default='',
    help='package.module:callable that makes the network, for safetensors of '
    'your own model; it is code that runs',
  )
  parser.add_argument(
    '--top', type=int, default=1, help='classes to show for each image'
  )
  parser.add_argument(
    '--invert', action='store_true', help='exchange light and dark first'
  )
  return parser


@console.guarded
def main(argv: Sequence[str]) -> None:
  """Prints the likeliest classes of each image, each on a line."""
  asked = _parser().parse_args(argv)
  if asked.top < 1:
    raise errors.UserError(f'--top must be >= 1; got {asked.top}.')
  devices.check()
  warnings.filterwarnings('ignore', module=r'PIL\.')  # Odd EXIF and the like.
  classify = export.load(asked.directory, asked.format, asked.factory)
  expected = classify.manifest['input']
  if expected['shape'][3] not in (1, 3):
    raise errors.UserError(
      f'{asked.directory}: predict reads grey and RGB images; this network '
      f'takes {expected["shape"][3]} channels.'
    )
  names = classify.manifest['class_names']
  for i in range(0, len(asked.images), _BATCH):
    paths = asked.images[i : i + _BATCH]
    pixels = [read_image(p, expected, asked.invert) for p in paths]
    found = probabilities(classify, pixels)
    for path, shares in zip(paths, found, strict=True):
      for label in np.argsort(-shares, kind='stable')[: asked.top]:
        name = names[label] if names else f'class {label}'
        console.say(f'{path}: {name} {shares[label]:.1%}')


if __name__ == '__main__':
  main(sys.argv[1:])
