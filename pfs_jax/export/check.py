"""The fresh process that reads an export back.

python -m pfs_jax.export.check DIRECTORY IMAGES.npz LOGITS.npz [FACTORY]
"""

import pathlib
import sys

from pfs_jax import console, storage
from pfs_jax.export import bundle, manifest


@console.guarded
def main(directory: str, asked: str, answered: str, factory: str = '') -> None:
  """Writes the logits '<format>/<i>' of each format and each batch i."""
  batches = storage.read_arrays(pathlib.Path(asked))
  logits = {}
  for name in manifest.read(directory)['formats']:
    classify = bundle.load(directory, name, factory)
    for i, images in batches.items():
      logits[f'{name}/{i}'] = classify(images)
  storage.write_arrays(pathlib.Path(answered), logits)


if __name__ == '__main__':
  main(*sys.argv[1:])
