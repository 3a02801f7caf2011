"""How fast images come: decoding on a core, threads, and what a step waits.

  python -m benchmarks.input_pipeline

Draws JPEG files of ImageNet's usual sizes and prints: images a CPU second of
decode + crop + resize to 224 px, with and without the JPEG decoder's own
halving; images a second of the decoding threads; the share of a training step's
time that is spent waiting. Numbers are the median of `--repeats` interleaved
runs, with the range. docs/imagenet.md has the results.
"""

import argparse
import io
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image, JpegImagePlugin

from pfs_jax.data import decoding, listing, loading

SIZES = [(500, 375)] * 6 + [(375, 500)] * 2 + [(500, 333)] * 2 + [(400, 300)]
LARGE = (2048, 1536)


def draw(rng, width, height):
  """A picture with detail at all scales: about 110 kB at 500x375."""
  array = np.zeros((height, width, 3))
  for scale in (4, 16, 64, 256):
    shape = (max(2, height * scale // 512), max(2, width * scale // 512))
    for channel in range(3):
      part = Image.fromarray(rng.normal(size=shape).astype(np.float32))
      part = part.resize((width, height), Image.Resampling.BICUBIC)
      array[..., channel] += np.asarray(part) / (scale / 4) ** 0.5
  array = 128 + 55 * array + rng.normal(size=array.shape) * 6
  return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def make_folder(root):
  """Writes 88 usual images and 4 large ones, a class each."""
  rng = np.random.default_rng(0)
  for i in range(92):
    size = LARGE if i >= 88 else SIZES[i % len(SIZES)]
    path = root / ('large' if i >= 88 else 'usual') / f'{i:03d}.JPEG'
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(rng, *size).save(path, quality=(80, 90)[i % 2])
  return root


def shown(values):
  """Median and range."""
  low, high = min(values), max(values)
  return f'{statistics.median(values):8.1f}  ({low:.1f} to {high:.1f})'


def decode_rates(listed, repeats):
  """Prints images a CPU second of this thread."""
  kinds = {'usual': [], 'large': []}
  for i in range(len(listed)):
    kinds[listed.classes[listed.labels[i]]].append(listed.read(i)[0])
  draft = JpegImagePlugin.JpegImageFile.draft
  rates = {}
  for _ in range(repeats):
    for halving in (True, False):
      JpegImagePlugin.JpegImageFile.draft = draft if halving else _no_draft
      for kind, contents in kinds.items():
        for scale in (0.25, 0.08, 0.0):
          rng = np.random.default_rng(0)
          start = time.process_time()
          n = 2 * len(contents)
          for i in range(n):
            decoding.decode(contents[i % len(contents)], 224, scale, rng)
          rate = n / (time.process_time() - start)
          rates.setdefault((kind, scale, halving), []).append(rate)
  JpegImagePlugin.JpegImageFile.draft = draft
  tiny = io.BytesIO()
  draw(np.random.default_rng(0), 8, 8).save(tiny, 'jpeg')
  start = time.process_time()
  for _ in range(500):
    decoding.decode(tiny.getvalue(), 8, 0.25, np.random.default_rng(0))
  held = (time.process_time() - start) / 500 * 1000
  print(f'Python around the decoder, an upper bound: {held:.2f} ms an image')
  print('decode + crop + resize to 224, images a CPU second')
  for (kind, scale, halving), values in sorted(rates.items()):
    what = f'crop scale {scale}' if scale else 'evaluation'
    note = '' if halving else ', no halving'
    print(f'  {kind}, {what}{note}: {shown(values)}')


def _no_draft(*_):
  return None


def serving(listed, batch_size, count, repeats, steps):
  """Prints images a second of so many decoding threads."""
  usual = np.flatnonzero(listed.labels == listed.classes.index('usual'))
  batches = loading.Batches(
    listed,
    np.tile(usual, 8),
    batch_size,
    np.arange(batch_size),
    224,
    key=(1, 2),
    scale=0.25,
  )
  rates = []
  for _ in range(repeats):
    with loading.Reader(batches, count) as reader:
      for step in range(4):
        reader.batch(step)
      start = time.perf_counter()
      for step in range(4, steps + 4):
        reader.batch(step)
      rates.append(steps * batch_size / (time.perf_counter() - start))
  print(
    f'{count} threads, batches of {batch_size}, 224 px, crop 0.25: '
    f'{shown(rates)} images/s'
  )


def waiting(root, steps):
  """Prints the share of a training step's time that waits for images."""
  import jax

  from pfs_jax import config, data, models, train

  c = config.default()
  c.data.name = 'imagenet2012'
  c.data.source_dir = str(root)
  c.data.num_classes = 2
  c.data.validation_examples = 0
  c.data.workers = 1
  c.train.batch_size = 16
  c.train.colour_jitter, c.train.lighting = 0.4, 0.1
  source = data.open_set(c, root).train_source('train', hold_out=False)
  module = models.build('mobilenet_v1', 2)
  variables = models.init(module, jax.random.key(0), (224, 224, 3))
  state = train.init(module, variables, train.optimizer(c.train, 100), 0.1)
  call = train.compiled_call(train.step, source.draw)
  with source:
    state, _ = call(state, source.resident, source.chunk(0, 1))
    jax.block_until_ready(state)
    before, start = source.seconds_waited, time.perf_counter()
    for step in range(1, steps + 1):
      state, _ = call(state, source.resident, source.chunk(step, 1))
      jax.block_until_ready(state.step)
    seconds = time.perf_counter() - start
  waited = source.seconds_waited - before
  print(
    f'mobilenet_v1 at 224 px, batch 16, 1 thread, {jax.default_backend()}: '
    f'{16 * steps / seconds:.1f} images/s, {waited / seconds:.2%} waiting'
  )


def main():
  """Runs all."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--steps', type=int, default=10)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as work:
    root = pathlib.Path(work)
    make_folder(root / 'train')
    make_folder(root / 'val')
    listed = listing.scan(root / 'train')
    print('load average', os.getloadavg()[0], 'on', os.cpu_count(), 'cores')
    decode_rates(listed, args.repeats)
    serving(listed, args.batch_size, args.workers, args.repeats, args.steps)
    waiting(root, args.steps)


if __name__ == '__main__':
  main()
