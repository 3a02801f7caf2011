"""Imports go down only: the floors of the README's architecture map."""

import ast
import graphlib
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'pfs_jax'

FLOORS = [
  {'errors', 'fields', 'rankings', 'tables'},
  {'described', 'peers', 'storage'},
  {
    'checkpointing',
    'config',
    'console',
    'costs',
    'cpu',
    'devices',
    'jaxprs',
    'runs',
    'structures',
    'user_code',
  },
  {'budgets', 'data', 'groups', 'layers', 'latency', 'scores'},
  {'gating', 'prune'},
  {'models', 'interop'},
  {'norms', 'train'},
  {'search', 'probe', 'surgery', 'export'},
  {'stages'},
  {'studies', 'report', 'predict', 'loading'},
  {'command'},
  {'__main__'},
]
# On one floor, but the second builds on the first.
PEERS = {
  ('interop', 'models'),
  ('report', 'studies'),
  ('export', 'surgery'),
  ('fields', 'rankings'),
  ('rankings', 'errors'),
}


def room(module: str) -> str:
  """'pfs_jax.models.vgg' -> 'models'."""
  return module.split('.')[1]


def floor(name: str) -> int:
  found = [i for i, names in enumerate(FLOORS) if name in names]
  assert found, f'{name} stands on no floor'
  return found[0]


def imports(path: pathlib.Path):
  """Rooms of ours that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == 'pfs_jax':
        yield from (alias.name for alias in node.names)
      elif node.module.startswith('pfs_jax.'):
        yield room(node.module)
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith('pfs_jax.'):
          yield room(alias.name)


FILES = sorted(
  p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE
) + sorted(p for p in PACKAGE.glob('*.py') if p.stem != '__init__')


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_down(path):
  relative = path.relative_to(PACKAGE)
  mine = relative.parts[0].removesuffix('.py')
  for theirs in imports(path):
    if theirs == mine or (mine, theirs) in PEERS:
      continue
    assert floor(theirs) < floor(mine), f'{mine} imports {theirs}'


def test_no_family_is_named_above_the_registry():
  """search, prune and train take any module with gates and a cost model."""
  for name in (
    'search.py',
    'prune.py',
    'train.py',
    'costs.py',
    'stages/job.py',
  ):
    tree = ast.parse((PACKAGE / name).read_text())
    strings = [
      node.value
      for node in ast.walk(tree)
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    short = [s.lower() for s in strings if len(s) < 60]  # Not docstrings.
    for family in ('resnet', 'vgg', 'mobilenet'):
      assert not [s for s in short if family in s], f'{name} names {family}'


def modules_imported(path):
  """Modules of ours, as paths of their files, that a file imports anywhere."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [f'{node.module}.{alias.name}' for alias in node.names]
      names.append(node.module)
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    for name in names:
      target = PACKAGE.parent.joinpath(*name.split('.')).with_suffix('.py')
      if name.startswith('pfs_jax.') and target.exists():
        yield target


def test_no_import_circle():
  """Packages apart: an __init__ imports what is beside it."""
  graph = {path: set(modules_imported(path)) for path in FILES}
  list(graphlib.TopologicalSorter(graph).static_order())


def test_the_documents_name_what_is_there():
  """README names every room; each file named in architecture.md exists."""
  root = PACKAGE.parent
  readme = (root / 'README.md').read_text().split('## Architecture')[1]
  rooms = set().union(*FLOORS) - {'__main__'}
  assert rooms == rooms & set(re.findall(r'`([\w.]+)`', readme))
  text = (root / 'docs' / 'architecture.md').read_text()
  files = {p.name for p in PACKAGE.rglob('*')} | {
    p.name for p in root.iterdir()
  }
  named = re.findall(r'`(?:\w+/)?(\w+\.(?:py|txt))`', text)
  assert len(named) > 20 and set(named) <= files
