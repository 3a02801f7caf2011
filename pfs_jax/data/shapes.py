"""A small set of JPEG files that needs no download: coloured shapes.

It is meant for smoke runs and tests of the code that reads ImageNet: real files
in class folders, of several sizes, which a small network learns in a minute.
"""

import contextlib
import pathlib
import tempfile

import numpy as np
from PIL import Image, ImageDraw

from pfs_jax.data import specs

_COLOURS = {'blue': (60, 90, 230), 'red': (230, 70, 60)}


def make_folder(root: pathlib.Path, spec: specs.Spec) -> pathlib.Path:
  """Writes train/<class>/*.JPEG and val/<class>/*.JPEG, whole or not at all.

  A folder that exists is left as it is. Each side of an image is 1 to 1.5 times
  as long as `spec` says, independently of the other. Returns `root`.
  """
  if root.exists():
    return root
  root.parent.mkdir(parents=True, exist_ok=True)
  counts = {'train': spec.train_examples, 'val': spec.test_examples}
  with tempfile.TemporaryDirectory(prefix='.shapes_', dir=root.parent) as work:
    made = pathlib.Path(work) / 'made'
    for split, count in counts.items():
      for label, name in enumerate(spec.class_names):
        folder = made / split / name
        folder.mkdir(parents=True)
        for i in range(count // spec.num_classes):
          rng = np.random.default_rng([split == 'train', label, i])
          image = draw(rng, name, spec.image_size)
          image.save(folder / f'{name}_{i:04d}.JPEG', quality=90)
    # Another process may have been first; the files are the same.
    with contextlib.suppress(OSError):
      made.rename(root)
  return root


def draw(rng: np.random.Generator, name: str, size: int) -> Image.Image:
  """One image of '<colour>_<shape>' at a random place on a noisy background."""
  colour, shape = name.split('_')
  width, height = rng.integers(size, size * 3 // 2 + 1, 2).tolist()
  ground = rng.integers(60, 190, 3) + rng.normal(0, 12, (height, width, 3))
  image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
  pen = ImageDraw.Draw(image)
  radius = int(rng.uniform(0.28, 0.4) * min(width, height))
  x = int(rng.integers(radius, width - radius + 1))
  y = int(rng.integers(radius, height - radius + 1))
  tint = np.array(_COLOURS[colour]) + rng.integers(-25, 26, 3)
  fill: tuple[int, ...] = tuple(tint.clip(0, 255).tolist())
  box = (x - radius, y - radius, x + radius, y + radius)
  if shape == 'circle':
    pen.ellipse(box, fill=fill)
  elif shape == 'ring':
    pen.ellipse(box, outline=fill, width=max(2, radius // 3))
  elif shape == 'square':
    pen.rectangle(box, fill=fill)
  else:
    bottom = y + radius
    pen.polygon(
      [(x, y - radius), (x - radius, bottom), (x + radius, bottom)], fill=fill
    )
  return image
