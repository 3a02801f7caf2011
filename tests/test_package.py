"""The package from outside: its import, its command, a finished workdir."""

import pathlib
import shutil
import tomllib

import pytest

import pfs_jax
from pfs_jax import command, config, data, errors, storage, train
from tests import processes, small_run

PROJECT = tomllib.loads((processes.ROOT / 'pyproject.toml').read_text())


def test_the_import_is_cheap_and_lazy():
  code = """
    import sys
    import pfs_jax
    assert not {'jax', 'numpy', 'flax'} & set(sys.modules)
    assert set(pfs_jax.__all__) <= set(dir(pfs_jax))
    print(pfs_jax.__version__, pfs_jax.config.default().seed)
    """
  found = processes.output(code, fresh=True)
  assert found == f'{PROJECT["project"]["version"]} 0'


def test_an_unknown_name_is_no_attribute():
  with pytest.raises(AttributeError, match="no attribute 'prunes'"):
    _ = pfs_jax.prunes


def test_the_api_page_names_all_of_it():
  page = (processes.ROOT / 'docs' / 'api.md').read_text()
  for name in pfs_jax.__all__:
    assert f'`{name}' in page
    assert getattr(pfs_jax, name)


def test_all_packages_and_configs_are_in_the_wheel():
  folders = {
    p.parent for p in pathlib.Path(pfs_jax.__file__).parent.rglob('*.py')
  }
  expected = {'.'.join(f.relative_to(processes.ROOT).parts) for f in folders}
  expected |= {'pfs_jax.configs', 'pfs_jax.configs.studies'}
  assert set(PROJECT['tool']['setuptools']['packages']) == expected


def test_no_test_tool_is_required():
  required = ' '.join(PROJECT['project']['dependencies'])
  for tool in ('pytest', 'ruff', 'mypy', 'xdist'):
    assert tool not in required


def test_ranges_hold_the_pinned_versions():
  """The lower bounds are what the tests ran with."""
  pinned = dict(
    line.split('==')
    for line in (processes.ROOT / 'requirements.txt').read_text().splitlines()
    if '==' in line
  )
  extras = PROJECT['project']['optional-dependencies'].values()
  for wanted in [*PROJECT['project']['dependencies'], *sum(extras, [])]:
    name, _, version = wanted.replace('==', '>=').partition('>=')
    assert pinned[name] == version.split(',')[0]


def test_a_config_is_found_by_name():
  folder = command.configs()
  assert command.located(['x', '--config=digits:smoke', '--mode=run']) == [
    'x',
    f'--config={folder}/digits.py:smoke',
    '--mode=run',
  ]
  assert command.located(['x', '--config', 'studies/ratio'])[2] == (
    f'{folder}/studies/ratio.py'
  )
  for other in ('nope', 'configs/digits.py', '../configs/digits'):
    assert command.located(['x', f'--config={other}'])[1] == f'--config={other}'


def test_the_command_runs_anywhere(tmp_path):
  code = """
    import runpy, sys
    sys.argv = ['pfs-jax', '--config', 'digits:smoke', '--mode=info']
    runpy.run_module('pfs_jax', run_name='__main__')
    """
  out = processes.output(code, cwd=tmp_path)
  assert 'resnet20' in out and 'floor' in out
  assert not list(tmp_path.iterdir())


def test_load_gives_the_network_of_the_result(finished):
  module, variables = pfs_jax.load(finished)
  result = storage.read_json(finished / 'result.json')
  assert set(variables) == {'params', 'batch_stats'}
  test = data.open_set(small_run.config(), finished).test()
  found = train.evaluate(module, variables, test)
  assert found['accuracy'] == result['test_accuracy']


def test_load_refuses_what_is_not_finished(tmp_path):
  with pytest.raises(errors.UserError, match='no training has finished here'):
    pfs_jax.load(tmp_path)


def test_load_runs_no_code_that_a_file_names(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'w')
  for section in ('model', 'data'):
    result = storage.read_json(finished / 'result.json')
    result['config'][section]['factory'] = 'os:abort'
    (workdir / 'checksums.json').unlink(missing_ok=True)
    storage.write_json(workdir / 'result.json', result)
    with pytest.raises(errors.UserError, match='No code runs because a file'):
      pfs_jax.load(workdir)


def test_load_refuses_another_config(finished):
  other = small_run.config(seed=7)
  config.validate(other)
  with pytest.raises(errors.UserError, match='config.seed'):
    pfs_jax.load(finished, config=other)
