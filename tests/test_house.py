"""What the house holds itself to: sizes, imports, no code from data, prose.

A test of all modules lists what is wrong in any of them.
"""

import ast
import doctest
import graphlib
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'pfs_jax'
README = (ROOT / 'README.md').read_text()
MODULES = {
  '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
  for path in [*sorted(PACKAGE.rglob('*.py')), ROOT / 'main.py']
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
PROSE = [
  path
  for folder in ('.', 'docs', 'tests/golden')
  for path in sorted((ROOT / folder).glob('*.md'))
]


# Sizes.


def lines_of(paths):
  return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_house_stays_small():
  """The goal is 13,500 and 9,500 lines; it may not grow from here."""
  assert lines_of(PACKAGE.rglob('*.py')) <= 17599
  assert lines_of((ROOT / 'tests').rglob('*.py')) <= 12624
  assert not {n: k for n, p in MODULES.items() if (k := lines_of([p])) > 450}


def functions(node, path):
  """(name, node) of all functions and methods, not of those inside them."""
  for child in node.body:
    name = f'{path}.{getattr(child, "name", "")}'
    if isinstance(child, ast.ClassDef):
      yield from functions(child, name)
    elif isinstance(child, ast.FunctionDef):
      yield name, child


FUNCTIONS = [
  found
  for module, tree in TREES.items()
  for found in functions(tree, f'{module}:')
]


def length(function):
  """Lines of a function without its docstring."""
  text = ast.get_docstring(function, clean=False)
  total = function.end_lineno - function.lineno + 1
  return total - (text.count('\n') + 1 if text else 0)


def test_functions_are_short():
  assert len(FUNCTIONS) > 500
  assert not {name: k for name, f in FUNCTIONS if (k := length(f)) > 60}


def test_public_functions_are_annotated():
  """Arguments and result, but for self, cls and the result of __init__."""
  bare = []
  for name, function in FUNCTIONS:
    parts = name.partition(':')[2].split('.')
    if any(re.match(r'_(?!_init__)', part) for part in parts):
      continue
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    for argument in filter(None, arguments):
      if not argument.annotation and argument.arg not in ('self', 'cls'):
        bare.append(f'{name}({argument.arg})')
    if not function.returns and not name.endswith('__init__'):
      bare.append(f'{name}()')
  assert not bare


# Imports go down only: the levels of the README's architecture map.

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


def imported(tree):
  """What a file imports of ours anywhere, as dotted names with `pfs_jax.`."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      found.add(node.module)
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return {name for name in found if name.startswith('pfs_jax.')}


# Not those of the package's own __init__, which imports at first use.
IMPORTS = {
  name: imported(tree)
  for name, tree in TREES.items()
  if name not in ('main', 'pfs_jax.__init__')
}


def test_imports_go_down():
  level = {name: i for i, names in enumerate(LEVELS) for name in names}
  pairs = {
    (module.split('.')[1], name.split('.')[1])
    for module, names in IMPORTS.items()
    for name in names
  }
  assert len(pairs) > 100
  wrong = {(a, b) for a, b in pairs if a != b and level[b] >= level[a]}
  assert not wrong - PEERS


def test_no_import_circle():
  """Packages apart: an __init__ imports what is beside it."""
  graph = {name: names & IMPORTS.keys() for name, names in IMPORTS.items()}
  list(graphlib.TopologicalSorter(graph).static_order())


def test_the_readme_names_exactly_the_modules():
  names = {path.stem for path in PACKAGE.glob('[!_]*.py')}
  names |= {path.parent.name for path in PACKAGE.glob('*/__init__.py')}
  assert set().union(*LEVELS) == names | {'__main__'}


# Data never runs: no pickle, no shell, no code by name.

# What a config names, which is code; our own modules at first use.
IMPORTERS = ('pfs_jax.user_code', 'pfs_jax.__init__')
FORBIDDEN = """
  eval exec __import__ importlib.import_module runpy.run_path runpy.run_module
  os.system os.popen""".split()


def forbidden(node):
  """What a node of a syntax tree does that no file of ours may do."""
  if isinstance(node, ast.Import | ast.ImportFrom):
    names = [alias.name for alias in node.names]
    module = getattr(node, 'module', None) or ''
    for name in (*names, module):
      if name.split('.')[0] in ('pickle', 'dill', 'shelve', 'marshal'):
        return name
      if name == 'import_module':
        return name
  if isinstance(node, ast.Call):
    called = ast.unparse(node.func)
    literal = node.args and isinstance(node.args[0], ast.Constant)
    if called in FORBIDDEN and not (called.endswith('_module') and literal):
      return called
    for keyword in node.keywords:
      value = getattr(keyword.value, 'value', None)
      if keyword.arg in ('shell', 'allow_pickle') and value is not False:
        return f'{keyword.arg}={value}'
  return None


def test_no_file_of_ours_runs_data():
  found = {
    (module, what)
    for module, tree in TREES.items()
    for node in ast.walk(tree)
    if (what := forbidden(node))
  }
  assert found <= {(name, 'importlib.import_module') for name in IMPORTERS}


@pytest.mark.parametrize(
  'code',
  [
    'import pickle',
    'from importlib import import_module',
    'eval("1")',
    'importlib.import_module(name)',
    'os.system("ls")',
    'subprocess.run("ls", shell=True)',
    'np.load(p, allow_pickle=True)',
  ],
)
def test_what_is_forbidden_is_seen(code):
  assert any(forbidden(n) for n in ast.walk(ast.parse(code)))


# Examples and prose.


@pytest.mark.parametrize(
  'module',
  [name for name, path in MODULES.items() if '>>> ' in path.read_text()],
)
def test_examples_in_docstrings(module):
  module = importlib.import_module(module.removesuffix('.__init__'))
  options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  found = doctest.testmod(module, optionflags=options)
  assert found.attempted and not found.failed


def test_prose_lines_are_short():
  """120 characters; tables, code and descriptions of pictures may be longer."""
  assert len(PROSE) > 15
  long = []
  for path in PROSE:
    text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
    for line in text.splitlines():
      if len(line) > 120 and not line.startswith(('|', '![')):
        long.append((path.name, line))
  assert not long
