"""Imports go down only: the levels of the README's architecture map."""

import ast
import graphlib
import pathlib
import re

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'pfs_jax'
README = (PACKAGE.parent / 'README.md').read_text()

# The modules or packages of each level, from the bottom.
LEVELS = [
  set(re.findall(r'`(\w+)`', names))
  for names in re.findall(r'^\| \d+ \|([^|]+)\|', README, re.MULTILINE)
] + [{'__main__'}]
# On one level, but the second builds on the first.
PEERS = {
  ('interop', 'models'),
  ('report', 'studies'),
  ('export', 'surgery'),
  ('fields', 'rankings'),
  ('rankings', 'errors'),
}


def imported(path: pathlib.Path) -> set[str]:
  """What a file imports of ours anywhere, as dotted names with `pfs_jax.`."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      found.add(node.module)
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return {name for name in found if name.startswith('pfs_jax.')}


FILES = sorted(
  p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE
) + sorted(p for p in PACKAGE.glob('*.py') if p.stem != '__init__')


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_down(path):
  level = {name: i for i, names in enumerate(LEVELS) for name in names}
  mine = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
  for theirs in {name.split('.')[1] for name in imported(path)}:
    if theirs != mine and (mine, theirs) not in PEERS:
      assert level[theirs] < level[mine], f'{mine} imports {theirs}'


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


def test_no_import_circle():
  """Packages apart: an __init__ imports what is beside it."""
  names = {
    'pfs_jax.' + '.'.join(p.relative_to(PACKAGE).with_suffix('').parts): p
    for p in FILES
  }
  graph = {name: imported(path) & names.keys() for name, path in names.items()}
  list(graphlib.TopologicalSorter(graph).static_order())


def test_the_documents_name_what_is_there():
  """README names exactly the modules; each file in architecture.md exists."""
  names = {p.stem for p in PACKAGE.glob('[!_]*.py')}
  names |= {p.parent.name for p in PACKAGE.glob('*/__init__.py')}
  assert set().union(*LEVELS) == names | {'__main__'}
  root = PACKAGE.parent
  text = (root / 'docs' / 'architecture.md').read_text()
  files = {p.name for p in [*PACKAGE.rglob('*'), *root.iterdir()]}
  named = re.findall(r'`(?:\w+/)?(\w+\.(?:py|txt))`', text)
  assert len(named) > 20 and set(named) <= files
