"""What an export says of itself: a model card, and metadata in its files."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pfs_jax import data, tables
from pfs_jax.structures import Structure


def metadata(structure: Structure, spec: data.Spec) -> dict[str, str]:
  """What ONNX and safetensors files carry; values are JSON but for the data."""
  return {
    'data': spec.name,
    'class_names': json.dumps(list(spec.class_names)),
    'mean': json.dumps(list(spec.mean)),
    'std': json.dumps(list(spec.std)),
    'structure': json.dumps(json.loads(structure.to_json())),
  }


def text(
  structure: Structure, spec: data.Spec, measured: Mapping[str, str]
) -> str:
  """The model card in Markdown.

  Args:
    structure: Counts and costs.
    spec: The data that the network was trained on.
    measured: What is known besides, in words, such as the test accuracy.
  """
  model = structure.model
  name = model.get('name') or model.get('factory') or 'a network'
  size = f'{spec.image_size} x {spec.image_size}'
  colour = 'grey' if spec.channels == 1 else 'RGB'
  facts = [
    ['data', spec.name],
    [
      'input',
      f'float32 [N, {size.replace(" x ", ", ")}, {spec.channels}], {colour}',
    ],
    ['normalisation', f'(pixels / 255 - {list(spec.mean)}) / {list(spec.std)}'],
    ['output', f'logits of {spec.num_classes} classes'],
    ['MACs of one image', f'{structure.macs:,}'],
    ['parameters', f'{structure.params:,}'],
    *([k, v] for k, v in measured.items()),
  ]
  counts = zip(structure.layers, map(str, structure.counts), strict=True)
  classes = [[str(i), name] for i, name in enumerate(spec.class_names)]
  parts = [
    f'# {name}, pruned, for {spec.name}',
    f'An image classifier of {size} images. Its channel counts were found by a '
    'search over gates on random weights ("Pruning from Scratch", AAAI 2020); '
    'its weights were then trained from scratch. It can name only the classes '
    'below, and only on images like those that it was trained on.',
    tables.markdown('', ['', 'value'], facts),
    '## Use',
    '```sh\npython -m pfs_jax.predict . image.png\n```',
    'manifest.json says how each file was checked. Without this code: '
    '`jax.export.deserialize` reads model.stablehlo, any ONNX runtime reads '
    'model.onnx.',
    '## Channels',
    tables.markdown('', ['layer', 'channels'], [list(c) for c in counts]),
  ]
  if classes:
    parts += ['## Classes', tables.markdown('', ['label', 'class'], classes)]
  return '\n\n'.join(parts) + '\n'
