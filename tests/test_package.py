"""The package from outside: its import, its wheel, its commands, its models."""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tomllib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from packaging import requirements

import pfs_jax
from configs import digits
from pfs_jax import (
  command,
  config,
  console,
  data,
  errors,
  report,
  stages,
  storage,
  surgery,
  train,
)
from tests import processes, small_run

ROOT = processes.ROOT
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
REQUIRED = PROJECT['project']['dependencies']
EXTRAS = PROJECT['project']['optional-dependencies']


def test_the_import_is_cheap_and_lazy():
  code = """
    import sys
    import pfs_jax
    assert not {'jax', 'numpy', 'flax'} & set(sys.modules)
    assert set(pfs_jax.__all__) <= set(dir(pfs_jax))
    from pfs_jax import data
    data.spec('cifar10')
    heavy = {'jax', 'flax', 'tensorflow_datasets', 'sklearn', 'tensorflow'}
    assert not heavy & set(sys.modules)
    print(pfs_jax.__version__)
    """
  assert processes.output(code, fresh=True) == PROJECT['project']['version']
  with pytest.raises(AttributeError, match="no attribute 'prunes'"):
    _ = pfs_jax.prunes


def test_the_api_page_names_all_of_it():
  page = (ROOT / 'docs' / 'api.md').read_text()
  for name in pfs_jax.__all__:
    assert f'`{name}' in page
    assert getattr(pfs_jax, name)


def test_all_packages_and_configs_are_in_the_wheel():
  folders = {path.parent for path in (ROOT / 'pfs_jax').rglob('*.py')}
  expected = {'.'.join(f.relative_to(ROOT).parts) for f in folders}
  expected |= {'pfs_jax.configs', 'pfs_jax.configs.studies'}
  assert set(PROJECT['tool']['setuptools']['packages']) == expected


def test_ranges_hold_the_pinned_versions():
  pins = (ROOT / 'requirements.txt').read_text().splitlines()
  pinned = dict(line.split('==') for line in pins if '==' in line)
  every = REQUIRED + sum(EXTRAS.values(), [])
  for wanted in map(requirements.Requirement, every):
    assert wanted.specifier.contains(pinned[wanted.name])
  for tool in map(requirements.Requirement, EXTRAS['test']):
    assert tool.name not in ' '.join(REQUIRED)


def test_what_an_extra_lacks_is_one_line(monkeypatch, capsys):
  extras = [(e, p) for e, names in console._EXTRAS.items() for p in names]
  for extra, package in extras:
    assert package in ' '.join(EXTRAS[extra]).replace('-', '_')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match='2'):
      console.guarded(importlib.import_module)(package)
    assert capsys.readouterr().err == (
      f"error: {package} is not installed: pip install 'pfs_jax[{extra}]'.\n"
    )


def test_a_config_is_found_by_name():
  folder = command.configs()
  smoke, ratio = f'{folder}/digits.py:smoke', f'{folder}/studies/ratio.py'
  found = command.located(['x', '--config=digits:smoke', '--mode=run'])
  assert found == ['x', f'--config={smoke}', '--mode=run']
  assert command.located(['x', '--config', 'studies/ratio'])[2] == ratio
  for other in ('nope', 'configs/digits.py', '../configs/digits'):
    assert command.located(['x', f'--config={other}'])[1] == f'--config={other}'


def test_the_command_runs_anywhere(tmp_path):
  arguments = ['-m', 'pfs_jax', '--config', 'digits:smoke', '--mode=info']
  path = {'PYTHONPATH': str(ROOT)}
  out = processes.output(arguments, cwd=tmp_path, env=path)
  assert 'resnet20' in out and 'floor' in out
  assert not list(tmp_path.iterdir())
  arguments[-1] = '--mode=train'  # Its workdir has a name of its own.
  done = processes.run(arguments, cwd=tmp_path, env=path)
  assert done.returncode == 2
  assert 'runs/digits-smoke/structure.json does not exist' in done.stderr


@pytest.mark.slow  # Builds the wheel, for which pip needs PyPI.
def test_the_wheel_runs_in_an_empty_folder(tmp_path):
  source, target, empty = (tmp_path / n for n in ('source', 'target', 'empty'))
  ignore = shutil.ignore_patterns('__pycache__')
  for name in ('pfs_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps']
  subprocess.run([*pip, '--target', target, source], check=True)
  assert (target / 'bin' / 'pfs-jax').exists()
  package = source / 'pfs_jax'
  for path in filter(pathlib.Path.is_file, package.rglob('*')):
    found = target / 'pfs_jax' / path.relative_to(package)
    assert found.read_bytes() == path.read_bytes()
  empty.mkdir()
  _, _, mode, _, *fields = small_run.arguments('search', empty)
  arguments = ['-m', 'pfs_jax', '--config=digits', mode, *fields]
  path = {'PYTHONPATH': str(target)}
  processes.output(arguments, cwd=empty, env=path, fresh=True)
  assert (empty / 'runs' / 'digits' / 'structure.json').exists()
  (empty / 'configs').mkdir()  # A user's own.
  (empty / 'configs' / 'mine.py').write_text('')
  arguments[2:] = ['--config=resnet20', '--mode=info']
  processes.output(arguments, cwd=empty, env=path, fresh=True)


# A finished workdir.


def test_load_gives_the_network_of_the_result(finished, monkeypatch, refused):
  monkeypatch.setenv('HOME', str(finished.parent))
  module, variables = pfs_jax.load(f'~/{finished.name}')
  result = storage.read_json(finished / 'result.json')
  assert set(variables) == {'params', 'batch_stats'}
  test = data.open_set(small_run.config(), finished).test()
  found = train.evaluate(module, variables, test)
  assert found['accuracy'] == result['test_accuracy']
  assert pfs_jax.load(finished, result['budget'])[0] == module
  refused('no training of keep0.9 has', pfs_jax.load, finished, 'keep0.9')
  with pytest.raises(errors.UserError, match='config.seed'):
    pfs_jax.load(finished, config=small_run.config(seed=7))
  refused('no training has finished here', pfs_jax.load, finished / 'search')
  shutil.rmtree(finished / 'train')
  refused('is missing', pfs_jax.load, finished)
  assert not (finished / 'train').exists()


def _with_code(section):
  return lambda r: r['config'][section].update(factory='os:abort')


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda r: r.update(counts={}), 'counts must name the layers of'),
    (_with_code('model'), 'No code runs because a file'),
    (_with_code('data'), 'No code runs because a file'),
  ],
)
def test_load_refuses_a_result_that_was_changed(finished, change, message):
  path = finished / 'result.json'
  result = storage.read_json(path)
  change(result)
  storage.write_json(path, result)  # So the seal is gone.
  with pytest.raises(errors.UserError, match=message):
    pfs_jax.load(finished)


# Models of users, through the modes.


class Others(nn.Module):
  """Layers that are seldom seen, and an operation that has no MACs."""

  num_classes: int = 3
  fft: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(5, (3, 3))(nn.ConvLocal(2, (3, 3))(x))
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.Dense(4)(x.mean((1, 2)))
    x = nn.DenseGeneral((2, 3))(jnp.fft.fft(x).real if self.fft else x)
    return nn.Einsum((2, 3, self.num_classes), 'nab,abc->nc')(x)


def test_every_kind_of_layer_is_counted():
  x = np.zeros((1, 8, 8, 1), np.float32)
  table = surgery.discover(Others(), x)
  cost_model = table.cost_model()
  patches = 64 * 9 * 9  # JAX collects those of ConvLocal by a convolution.
  convolutions = patches + 64 * 9 * 2 + 64 * 9 * 2 * 5
  expected = convolutions + 5 * 4 + 4 * 6 + 6 * 3
  assert cost_model.macs(cost_model.widths) == expected
  assert table.sizes == {'Conv_0': 5} and not table.uncounted


def with_fft(num_classes):
  return Others(num_classes, fft=True)


def test_what_cannot_be_counted_is_said_in_every_mode(tmp_path, capsys):
  c = digits.get_config('smoke')
  c.model.factory = f'{__name__}:with_fft'
  c.search.epochs, c.budget.keep = 0.05, (0.8,)
  job = stages.Job(c, tmp_path)
  stages.info(job)
  assert 'fft in Others' in capsys.readouterr().out
  assert 'MACs not counted\nfft in Others' in str(job.network.table)
  with pytest.raises(errors.UserError, match='uncounted must be True .* fft'):
    stages.search(job)
  c.budget.uncounted = True
  config.validate(c)
  stages.search(stages.Job(c, tmp_path))
  report.write(c, tmp_path)
  page = (tmp_path / 'report.html').read_text()
  assert 'The MACs leave out: fft in Others.' in page
