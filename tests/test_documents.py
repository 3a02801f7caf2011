"""The documents: their code runs as written, and the names in them exist."""

import importlib.util
import json
import pathlib
import re

import pytest

from pfs_jax import command, config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])
PAGES.remove(ROOT / 'CHANGELOG.md')  # It has the names of former versions.
OF_STUDIES = ('results_dir', 'report_only')  # Fields of studies alone.


def is_field(name):
  section = config.default()
  for part in name.split('.'):
    if part not in section:
      return name in OF_STUDIES or hasattr(config, name)
    section = section[part]
  return True


def is_module(name):
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_the_names_in_a_document_exist(page):
  """Modes, fields, modules, files and links."""
  text = page.read_text()

  def missing(pattern, exists):
    return [n for n in set(re.findall(pattern, text)) if not exists(n)]

  files = {p.name for p in ROOT.rglob('*.py') if '.venv' not in p.parts}
  files |= {'fields.txt', 'budget.txt'}  # The second one is in a workdir.
  field = r'\bconfig\.(?!py|json|md)([a-z_]+(?:\.[a-z_]+)?)'
  assert not missing(r'--mode=(\w+)', command.MODES.__contains__)
  assert not missing(field, is_field)
  assert not missing(r'python -m ((?:pfs_jax|benchmarks)[\w.]*)', is_module)
  assert not missing(r'`(?:[\w/]+/)?(\w+\.(?:py|txt))`', files.__contains__)
  link = r'\]\((?!http|#)([^)#]+)'
  assert not missing(link, lambda path: (page.parent / path).exists())


def test_the_code_of_the_document_runs(capsys):
  text = (ROOT / 'docs' / 'own_model.md').read_text()
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
  """As written, but with a shallower network and fewer epochs."""
  notebook = json.loads((ROOT / 'docs' / 'quickstart.ipynb').read_text())
  cells = [c['source'] for c in notebook['cells'] if c['cell_type'] == 'code']
  code = '\n'.join(''.join(source) for source in cells)
  for written, shorter in (
    ("'resnet20'", "'resnet8'"),
    ("'search.epochs': 4.0", "'search.epochs': 1.0"),
    ("'train.epochs': 10.0", "'train.epochs': 6.0"),
  ):
    assert code.count(written) == 1
    code = code.replace(written, shorter)
  monkeypatch.chdir(tmp_path)
  names = {'__name__': 'quickstart'}
  exec(code, names)
  printed = capsys.readouterr().out.splitlines()
  [predicted] = [line for line in printed if line.startswith('predicted')]
  exported = printed[-1].removeprefix('from the export')
  assert exported == predicted.removeprefix('predicted')
  assert names['result']['test_accuracy'] > 0.9
