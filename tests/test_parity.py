"""We are held against the published PyTorch implementation, in float64."""

import json

import pytest

from tests import processes


@pytest.mark.parametrize('name', ['resnet20', 'vgg16'])
def test_twenty_search_steps(name, golden):
  path = golden / f'search_{name}_w8.npz'
  out = processes.output(
    ['-m', 'tests.parity', name, str(path)],
    x64=True,
    timeout=400,
    env=processes.OPTIMIZED,
  )
  found = json.loads(out.splitlines()[-1])
  assert found['steps'] == 20
  assert found['dtypes'] == ['float64']
  layers = {'resnet20': 9, 'vgg16': 13}[name]
  assert len(found['worst']) == 3 + 2 * layers  # logits0, ce, reg; two a layer.
  for what, error in found['worst'].items():
    assert error < 1e-9, what
  # PyTorch's running variance is the unbiased one: loosely only.
  assert found['eval'] < 0.02
