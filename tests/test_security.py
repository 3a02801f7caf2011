"""Data never runs: no pickle, no shell, no code by name; damage is refused."""

import ast
import pathlib
import random
import shutil

import pytest

from benchmarks import damage
from pfs_jax import errors
from tests import small_run

ROOT = pathlib.Path(__file__).parents[1]
FILES = [*(ROOT / 'pfs_jax').rglob('*.py'), ROOT / 'main.py']
# What a config names, which is code; our own modules at first use.
IMPORTERS = {'pfs_jax/user_code.py', 'pfs_jax/__init__.py'}
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


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.name)
def test_no_file_of_ours_runs_data(path):
  found = {forbidden(n) for n in ast.walk(ast.parse(path.read_text()))} - {None}
  if str(path.relative_to(ROOT)) in IMPORTERS:
    found -= {'importlib.import_module'}
  assert not found


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


@pytest.fixture(scope='module')
def answers():
  return {}


CHEAP = ('run', 'train', 'prune', 'info')  # Without a program to compile.


@pytest.mark.parametrize('seed', range(40))
def test_damage_gives_the_same_numbers_or_a_refusal(
  finished_run, answers, tmp_path, seed
):
  rng = random.Random(seed)
  mode, kind = rng.choice(CHEAP), rng.choice(damage.KINDS)
  c = small_run.config()
  if mode not in answers:
    whole = shutil.copytree(finished_run, tmp_path / 'whole')
    answers[mode] = damage.answer(mode, c, whole)
    assert not isinstance(answers[mode], errors.UserError)
  path = rng.choice(damage.files(finished_run))
  given = (mode, finished_run, tmp_path / 'w', c, answers[mode])
  damage.check(*given, path, kind, str(seed))
