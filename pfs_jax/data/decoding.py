"""One image file to uint8 pixels, on the host. Imports no JAX.

>>> import io
>>> file = io.BytesIO()
>>> Image.new('RGB', (60, 40), (200, 60, 90)).save(file, 'png')
>>> pixels = decode(file.getvalue(), 16)
>>> pixels.shape, pixels[0, 0].tolist()
((16, 16, 3), [200, 60, 90])
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageOps

# Some other readers of Pillow start programs (EPS starts Ghostscript).
FORMATS = ('JPEG', 'PNG')
EVALUATION_CROP = 224 / 256  # Share of the shorter side that ImageNet keeps.
_ORIENTATION = 0x0112  # The EXIF tag.


def crop_box(
  rng: np.random.Generator, width: int, height: int, scale: float
) -> tuple[int, int, int, int]:
  """A random crop of `scale`..1 of the area, sides 3:4 to 4:3.

  Draws up to ten boxes (area uniform, ratio log-uniform, place uniform) until
  one fits; after that, takes the largest centred box within the ratios.

  Args:
    rng: Draws the box.
    width: Of the image, in pixels.
    height: Of the image, in pixels.
    scale: Least share of the area, 0..1.

  Returns:
    (left, top, right, bottom), whole pixels.
  """
  for _ in range(10):
    area = rng.uniform(scale, 1.0) * width * height
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(0, width - w + 1))
      top = int(rng.integers(0, height - h + 1))
      return left, top, left + w, top + h
  w = max(1, min(width, round(height * 4 / 3)))
  h = max(1, min(height, round(width * 4 / 3)))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def decode(
  content: bytes,
  size: int,
  scale: float = 0.0,
  rng: np.random.Generator | None = None,
  *,
  keep: float = EVALUATION_CROP,
  channels: int = 3,
  formats: tuple[str, ...] | None = FORMATS,
) -> np.ndarray:
  """Decodes one image: upright, cropped, resized (bilinear, antialiased).

  The content decides what a file is, not its name. Grey and palette images
  become RGB, CMYK is converted, 16-bit grey is scaled to 8 bits, alpha is
  dropped, and EXIF's orientation is followed.

  Args:
    content: The file.
    size: Height and width of the result.
    scale: Least share of the area of a random crop; 0 takes the centre square.
    rng: Draws the random crop; without it, the centre square.
    keep: Share of the shorter side that the centre square keeps. Crop and
      resize are one operation, without rounding in between; a square image of
      `size` with `keep` 1 is returned as it is.
    channels: 3, or 1 for grey.
    formats: Pillow's names of the formats to try; None: all.

  Returns:
    uint8 [size, size, channels].

  Raises:
    Exception: Of many kinds, where the content is no image, is damaged, or has
      more pixels than Pillow's limit against decompression bombs.
  """
  image: Image.Image = Image.open(io.BytesIO(content), formats=formats)
  turned = image.getexif().get(_ORIENTATION, 1) != 1
  if turned:  # Rare.
    image = ImageOps.exif_transpose(image)
  width, height = image.size
  if rng is None or not scale:
    left, top, right, bottom = _centre(width, height, keep)
  else:
    left, top, right, bottom = crop_box(rng, width, height, scale)
  if not turned:
    _halve(image, min(right - left, bottom - top) / size)
  image = _eight_bits(image).convert('L' if channels == 1 else 'RGB')
  x, y = image.width / width, image.height / height
  right, bottom = min(right * x, image.width), min(bottom * y, image.height)
  box = (left * x, top * y, right, bottom)
  image = image.resize((size, size), Image.Resampling.BILINEAR, box)
  return np.asarray(image).reshape(size, size, channels)


def size(content: bytes) -> tuple[int, int]:
  """(width, height) of an image, without decoding its pixels."""
  return Image.open(io.BytesIO(content), formats=FORMATS).size


def _eight_bits(image: Image.Image) -> Image.Image:
  """16-bit grey to 8-bit, which Pillow would clip instead of scale."""
  if not image.mode.startswith('I'):
    return image
  values = np.asarray(image).astype(np.float64) / 257
  return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def _centre(
  width: int, height: int, keep: float
) -> tuple[float, float, float, float]:
  side = min(width, height) * keep
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def _halve(image: Image.Image, shrink: float) -> None:
  """Lets a JPEG decoder halve, while the crop stays larger than the result."""
  if image.format == 'JPEG' and shrink >= 2:
    width, height = image.size
    image.draft(None, (int(width / shrink), int(height / shrink)))
