"""The README's quick start, from the first command to named images."""

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pfs_jax import data, export
from tests import processes

pytestmark = pytest.mark.slow


def command(mode, workdir):
  config = '--config=configs/digits.py'
  return ['main.py', config, f'--mode={mode}', f'--workdir={workdir}']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of the digits run, and what the command printed."""
  workdir = tmp_path_factory.mktemp('digits')
  options = {'timeout': 600, 'env': processes.OPTIMIZED}
  return workdir, processes.output(command('run', workdir), **options)


@pytest.fixture(scope='module')
def exported(finished):
  """The folder of the run's export."""
  folder = finished[0] / 'export'
  shown = processes.output(command('export', finished[0]), timeout=300)
  made = export.read_manifest(folder)
  assert made['data'] == 'digits' and set(made['formats']) == {*export.FORMATS}
  for entry in made['formats'].values():
    assert entry['file'] in shown and f'{entry["bytes"]:,}' in shown
  return folder


def test_the_run(finished):
  """>= 95 % at <= 50 % of the reference's MACs, less than the searched's."""
  workdir, out = finished
  result = json.loads((workdir / 'result.json').read_text())
  assert result['test_accuracy'] >= 0.95
  assert result['reference_test_accuracy'] >= 0.95
  assert result['macs_share'] <= 0.5
  assert result['macs'] < result['searched_macs']
  structure = json.loads((workdir / 'structure.json').read_text())
  assert structure['macs'] == result['macs'] <= structure['budget']['max_macs']
  shown = f'{result["test_accuracy"]:.2%}'
  assert re.search(rf'narrow .*{re.escape(shown)}', out)
  assert re.search(r'reference .*100\.0%', out)
  for file in ('config.json', 'versions.json', 'kept.json'):
    assert (workdir / file).exists()
  events = list((workdir / 'search' / 'events').iterdir())
  assert events and all(e.stat().st_size for e in events)


@pytest.mark.parametrize('name', export.FORMATS)
def test_the_exported_network_is_the_trained_one(exported, name):
  """Its accuracy on all test images is that of result.json."""
  result = json.loads((exported.parent / 'result.json').read_text())
  digits = data.load('digits')
  x = export.normalised(digits.test_images, digits.spec.mean, digits.spec.std)
  right = export.load(exported, name)(x).argmax(1) == digits.test_labels
  assert right.mean() == pytest.approx(result['test_accuracy'], abs=1e-6)


def drawing(*strokes):
  """A digit as a person draws it: thick light lines on dark, 64x64."""
  image = Image.new('L', (64, 64))
  for points in strokes:
    ImageDraw.Draw(image).line(points, fill=255, width=8)
  return image


def test_predict_names_digits(exported, tmp_path):
  """The first of each in the test set, and a drawn 4, in another process."""
  digits = data.load('digits')
  first = [np.flatnonzero(digits.test_labels == i)[0] for i in range(10)]
  pixels = digits.test_images[first]
  for label in range(10):
    Image.fromarray(pixels[label, ..., 0]).save(tmp_path / f'{label}.png')
  four = drawing((28, 4, 18, 36, 52, 36), (42, 20, 38, 62))
  four.save(tmp_path / '4_drawn.png')
  paths = sorted(tmp_path.glob('*.png'))
  out = processes.output(
    ['-m', 'pfs_jax.predict', exported, *paths, '--format=onnx']
  )
  named = {}
  for line in out.splitlines():
    path, _, answer = line.rpartition(': ')
    named[pathlib.Path(path).stem] = answer.split()[0]
  assert len(named) == 11 and named['4_drawn'] == '4'
  classify = export.load(exported, 'onnx')
  x = export.normalised(pixels, digits.spec.mean, digits.spec.std)
  answers = [named[str(i)] for i in range(10)]
  assert answers == [str(label) for label in classify(x).argmax(1)]
  assert sum(a == str(i) for i, a in enumerate(answers)) >= 8, answers
