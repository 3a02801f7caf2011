"""The code in docs/own_model.md and docs/quickstart.ipynb runs as written."""

import json
import pathlib
import re

import pytest

DOCUMENTS = pathlib.Path(__file__).parents[1] / 'docs'


def test_the_code_of_the_document_runs(capsys):
  text = (DOCUMENTS / 'own_model.md').read_text()
  blocks = re.findall(r'^```python\n(.*?)^```', text, re.M | re.S)
  assert len(blocks) == 2
  names = {'__name__': 'own_model'}
  exec('\n'.join(blocks), names)
  printed = capsys.readouterr().out.strip()
  assert f'```\n{printed}\n```' in text, (
    'the table shown is not the one printed'
  )
  assert names['structure'].macs <= names['budget']
  assert names['metrics']['loss'] < 3


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
  notebook = json.loads((DOCUMENTS / 'quickstart.ipynb').read_text())
  cells = [c for c in notebook['cells'] if c['cell_type'] == 'code']
  monkeypatch.chdir(tmp_path)
  names = {'__name__': 'quickstart'}
  for cell in cells:
    exec(''.join(cell['source']), names)
  printed = capsys.readouterr().out.splitlines()
  [predicted] = [line for line in printed if line.startswith('predicted')]
  exported = printed[-1].removeprefix('from the export')
  assert exported == predicted.removeprefix('predicted')
  assert names['result']['test_accuracy'] > 0.9
