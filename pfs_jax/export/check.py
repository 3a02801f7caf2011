"""The fresh process that reads an export back.

python -m pfs_jax.export.check DIRECTORY IMAGES.npz LOGITS.npz [FACTORY]
"""

import pathlib
import sys

import numpy as np

from pfs_jax import console
from pfs_jax.export import bundle


@console.guarded
def main(directory: str, asked: str, answered: str, factory: str = '') -> None:
  """Writes '<format>/<i>' for each format there and each batch asked."""
  with np.load(asked) as arrays:
    batches = [arrays[name] for name in arrays.files]
  logits = {}
  for name in bundle.read_manifest(directory)['formats']:
    classify = bundle.load(directory, name, factory)
    for i, images in enumerate(batches):
      logits[f'{name}/{i}'] = classify(images)
  with pathlib.Path(answered).open('wb') as file:
    np.savez(file, **logits)  # type: ignore[arg-type]


if __name__ == '__main__':
  main(*sys.argv[1:])
