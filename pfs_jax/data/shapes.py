"""A small set of JPEG files that needs no download: coloured shapes.

Made for smoke runs and tests of the path that ImageNet takes: real files in
class folders, of several sizes, which a small network learns in a minute.
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile

import numpy as np
from PIL import Image, ImageDraw

from pfs_jax.data import specs

_COLOURS = {'blue': (60, 90, 230), 'red': (230, 70, 60)}


def make_folder(root: pathlib.Path, spec: specs.Spec) -> pathlib.Path:
  """Writes train/<class>/*.JPEG and val/<class>/*.JPEG, whole or not at all.

  Args:
    root: Where; left as it is if it exists.
    spec: Numbers of images, classes ('<colour>_<shape>') and the size; images
      are 1 to 1.5 times as wide and high, each side on its own.

  Returns:
    `root`.
  """
  if root.exists():
    return root
  root.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.shapes_', dir=root.parent) as work:
    made = pathlib.Path(work) / 'made'
    for split, count in (
      ('train', spec.train_examples),
      ('val', spec.test_examples),
    ):
      _make_split(made / split, spec, split, count // spec.num_classes)
    try:
      made.rename(root)
    except OSError:  # Another process was first; the files are the same.
      shutil.rmtree(made)
  return root


def _make_split(
  folder: pathlib.Path, spec: specs.Spec, split: str, per_class: int
) -> None:
  for label, name in enumerate(spec.class_names):
    (folder / name).mkdir(parents=True)
    for i in range(per_class):
      rng = np.random.default_rng([split == 'train', label, i])
      image = draw(rng, name, spec.image_size)
      image.save(folder / name / f'{name}_{i:04d}.JPEG', quality=90)


def draw(rng: np.random.Generator, name: str, size: int) -> Image.Image:
  """One image of a class: a shape somewhere on a noisy, tinted ground.

  Args:
    rng: Draws place, size and colours.
    name: '<colour>_<shape>'.
    size: The image is 1 to 1.5 times as wide, and as high, in pixels.
  """
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
    corners = [(x, y - radius), (x - radius, bottom), (x + radius, bottom)]
    pen.polygon(corners, fill=fill)
  return image
