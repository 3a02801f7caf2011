"""Decodes an image file to uint8 pixels, on the host. Imports no JAX."""

import io
import math

import numpy as np
from PIL import Image, ImageOps

# Some other readers of Pillow start programs: EPS starts Ghostscript, and IPTC
# files may hold EPS.
FORMATS = ('JPEG', 'PNG')
MORE_FORMATS = (*FORMATS, 'BMP', 'GIF', 'JPEG2000', 'PPM', 'TIFF', 'WEBP')
EVALUATION_CROP = 224 / 256  # Share of the shorter side that ImageNet keeps.
_ORIENTATION = 0x0112  # The EXIF tag.


def crop_box(
  rng: np.random.Generator, width: int, height: int, scale: float
) -> tuple[int, int, int, int]:
  """A random crop (left, top, right, bottom) in whole pixels.

  Draws up to ten boxes (share of the area uniform in `scale`..1, ratio
  log-uniform in 3:4 to 4:3, place uniform) until one fits; after that, takes
  the largest centred box within the ratios.
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
  formats: tuple[str, ...] = FORMATS,
) -> np.ndarray:
  """Decodes one image: upright, cropped, resized (bilinear, antialiased).

  The content decides the format of a file, not its name. Grey and palette
  images become RGB, CMYK is converted, 16-bit grey is scaled to 8 bits, alpha
  is dropped, and EXIF's orientation is applied.

  >>> file = io.BytesIO()
  >>> Image.new('RGB', (60, 40), (200, 60, 90)).save(file, 'png')
  >>> pixels = decode(file.getvalue(), 16)
  >>> pixels.shape, pixels[0, 0].tolist()
  ((16, 16, 3), [200, 60, 90])

  Args:
    content: The file.
    size: Height and width of the result, uint8 [size, size, channels].
    scale: Least share of the area of a random crop; 0 takes the centre square.
    rng: Draws the random crop; without it, the centre square.
    keep: Share of the shorter side that the centre square keeps. Crop and
      resize are one operation, without rounding in between; a square image of
      `size` with `keep` 1 is returned as it is.
    channels: 3, or 1 for grey.
    formats: Pillow's names of the formats to try.

  Raises:
    Exception: Any type, if the content is no image, is damaged, or has more
      pixels than Pillow's limit against decompression bombs.
  """
  image: Image.Image = Image.open(io.BytesIO(content), formats=formats)
  wide = image.mode == 'I' and image.format not in ('PNG', 'PPM')  # 32 bits.
  if wide or image.mode == 'F':
    raise ValueError('its pixels have 32 bits: convert it to 8 or 16 bits')
  if image.getexif().get(_ORIENTATION, 1) != 1:  # Rare.
    image = ImageOps.exif_transpose(image)
  width, height = image.size
  box: tuple[float, float, float, float]
  if rng is None or not scale:
    side = min(width, height) * keep
    left, top = (width - side) / 2, (height - side) / 2
    box = left, top, left + side, top + side
  else:
    box = crop_box(rng, width, height, scale)
  shrink = min(box[2] - box[0], box[3] - box[1]) / size
  if image.format == 'JPEG' and shrink >= 2:
    # The decoder halves the image while the crop stays larger than the result.
    image.draft(None, (int(width / shrink), int(height / shrink)))
  if image.mode.startswith('I'):  # 16-bit grey, which Pillow would clip.
    values = np.rint(np.asarray(image).astype(np.float64) / 257)
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
  image = image.convert('L' if channels == 1 else 'RGB')
  x, y = image.width / width, image.height / height
  right, bottom = min(box[2] * x, image.width), min(box[3] * y, image.height)
  box = (box[0] * x, box[1] * y, right, bottom)
  image = image.resize((size, size), Image.Resampling.BILINEAR, box)
  return np.asarray(image).reshape(size, size, channels)


def size(content: bytes) -> tuple[int, int]:
  """(width, height) of an image, without decoding its pixels."""
  return Image.open(io.BytesIO(content), formats=FORMATS).size
