"""The code in docs/own_model.md runs as it is written."""

import pathlib
import re

DOCUMENT = pathlib.Path(__file__).parents[1] / 'docs' / 'own_model.md'


def test_the_code_of_the_document_runs(capsys):
  text = DOCUMENT.read_text()
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
