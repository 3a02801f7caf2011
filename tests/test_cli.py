"""The command line as a user meets it: refusals and info."""

import pathlib
import re

import pytest

from tests import processes

CONFIGS = sorted((processes.ROOT / 'configs').glob('*.py'))

DIGITS = '--config=configs/digits.py'
INFO = '--mode=info'

# Arguments and what the message must say.
BAD = {
  'no flags': ([], '--config is required'),
  'no mode': ([DIGITS], '--mode is required'),
  'no config': ([INFO], '--config is required'),
  'unknown mode': ([DIGITS, '--mode=fly'], 'value should be one of'),
  'empty mode': ([DIGITS, '--mode='], 'value should be one of'),
  'unknown flag': (
    [DIGITS, INFO, '--fast'],
    "Unknown command line flag 'fast'",
  ),
  'stray argument': ([DIGITS, INFO, 'now'], "unexpected argument 'now'"),
  'missing config': (['--config=configs/no.py', INFO], 'configs/no.py'),
  'folder as config': (['--config=configs', INFO], 'Is a directory'),
  'not a config': (['--config=README.md', INFO], 'README.md, line'),
  'unknown variant': (['--config=configs/digits.py:big', INFO], 'full, smoke'),
  'override first': (['--config.seed=1', DIGITS, INFO], '--config.seed'),
  'unknown field': ([DIGITS, INFO, '--config.sead=1'], 'Did you mean "seed"'),
  'unknown subfield': (
    [DIGITS, INFO, '--config.train.epoch=1'],
    'Did you mean "epochs"',
  ),
  'no value': ([DIGITS, INFO, '--config.seed'], 'Missing value'),
  'float seed': ([DIGITS, INFO, '--config.seed=1.5'], 'invalid literal'),
  'negative seed': ([DIGITS, INFO, '--config.seed=-1'], 'config.seed must be'),
  'word for a number': (
    [DIGITS, INFO, '--config.search.epochs=ten'],
    'could not convert',
  ),
  'whole sub-dict': (
    [DIGITS, INFO, '--config.train={"epochs": 1}'],
    'config.train.init is missing',
  ),
  'bad bool': ([DIGITS, INFO, '--config.train.reference=maybe'], 'maybe'),
  'bad dtype': ([DIGITS, INFO, '--config.dtype=int8'], 'float32, bfloat16'),
  'unknown model': (
    [DIGITS, INFO, '--config.model.name=lenet'],
    'one of resnet20',
  ),
  'unknown data': ([DIGITS, INFO, '--config.data.name=svhn'], 'one of digits'),
  'share over one': (
    [DIGITS, INFO, '--config.budget.keep=1.5,'],
    'config.budget.keep must be shares in (0, 1]',
  ),
  'words as shares': (
    [DIGITS, INFO, '--config.budget.keep=half,'],
    'config.budget.keep must be',
  ),
  'no budget': (
    [DIGITS, INFO, '--config.budget.keep=()'],
    'must name at least one budget',
  ),
  'same budget twice': (
    [DIGITS, INFO, '--config.budget.keep=(0.5,0.5)'],
    'the same budget twice',
  ),
  'sparsity over one': (
    [DIGITS, INFO, '--config.search.sparsity=2'],
    'config.search.sparsity must be in [0, 1]; got 2',
  ),
  'rate of zero': (
    [DIGITS, INFO, '--config.search.learning_rate=0'],
    'config.search.learning_rate must be > 0; got 0',
  ),
  'unknown scratch': ([DIGITS, INFO, '--config.train.scratch=C'], 'E, B'),
  'budget below the floor': (
    [DIGITS, '--mode=search', '--config.budget.keep=0.05,'],
    '(the floor)',
  ),
  'too much held out': (
    [DIGITS, '--mode=search', '--config.data.validation_examples=1500'],
    'config.data.validation_examples must be',
  ),
  'more examples than there are': (
    [DIGITS, '--mode=search', '--config.data.train_examples=9999'],
    'config.data.train_examples must be in 0..1500',
  ),
  'batch larger than the data': (
    [DIGITS, '--mode=search', '--config.search.batch_size=1201'],
    'config.search.batch_size must be in [1, 1200]',
  ),
  'prune before search': ([DIGITS, '--mode=prune'], 'run --mode=search'),
  'train before search': ([DIGITS, '--mode=train'], 'does not exist'),
  'eval before train': ([DIGITS, '--mode=eval'], 'does not exist'),
  'no such structure': (
    [DIGITS, '--mode=train', '--config.train.structure=none.json'],
    'none.json does not exist',
  ),
  'not a structure': (
    [DIGITS, '--mode=train', '--config.train.structure=requirements.txt'],
    'requirements.txt: JSON is malformed',
  ),
  'workdir is a file': (
    ['--workdir=pyproject.toml', DIGITS, '--mode=search'],
    'pyproject.toml cannot be used',
  ),
  'own model and a bad spec': (
    [DIGITS, INFO, '--config.model.factory=nothing'],
    'must be package.module:callable',
  ),
  'own model that is not there': (
    [DIGITS, INFO, '--config.model.factory=no_such_package:make'],
    "No module named 'no_such_package'",
  ),
  'unknown init': (
    [DIGITS, INFO, '--config.train.init=old'],
    'random, inherit',
  ),
  'no such source_dir': (
    [
      '--config=configs/fashion.py',
      '--mode=search',
      '--config.data.source_dir=/nowhere',
    ],
    '/nowhere',
  ),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_command_lines(name, tmp_path):
  args, said = BAD[name]
  done = processes.run(
    ['main.py', f'--workdir={tmp_path / "w"}', *args],
    env={'TFDS_DATA_DIR': str(tmp_path / 'tfds')},
  )
  lines = done.stderr.splitlines()
  assert done.returncode == 2, done.stderr
  assert 1 <= len(lines) <= 3, done.stderr
  assert 'Traceback' not in done.stderr
  assert lines[0].startswith('error: ')
  assert said in done.stderr


def test_no_data_and_no_network(tmp_path):
  """The paper's search without any data ends at once and says what to do."""
  done = processes.run(
    [
      'main.py',
      '--config=configs/resnet56.py',
      '--mode=search',
      f'--workdir={tmp_path / "w"}',
      f'--config.data.data_dir={tmp_path / "data"}',
      '--config.data.download=False',
    ],
    timeout=30,
  )
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) <= 3
  assert 'cifar10' in done.stderr and 'source_dir' in done.stderr


def test_help_is_no_error():
  done = processes.run(['main.py', '--help'])
  assert done.returncode == 0
  assert '--mode' in done.stdout and '--workdir' in done.stdout


INFO_WITHOUT_DATA = """
  import runpy, sys
  sys.argv = ['main.py', '--config={config}', '--mode=info']
  try:
    runpy.run_path('main.py', run_name='__main__')
  except SystemExit as e:
    assert not e.code, e.code
  loaded = {{'tensorflow_datasets', 'sklearn', 'grain'}} & set(sys.modules)
  assert not loaded, loaded
"""


@pytest.mark.parametrize('config', CONFIGS, ids=lambda p: p.stem)
def test_info_reads_no_data(config):
  code = INFO_WITHOUT_DATA.format(config=config.relative_to(processes.ROOT))
  out = processes.output(code, env={'COLUMNS': '120'})
  for part in (
    'reference network',
    'searched network',
    'floor, multiples of 8',
  ):
    assert part in out


def test_the_readme_and_ci_run_the_same_test_command():
  root = pathlib.Path(processes.ROOT)
  command = re.search(
    r'```sh\n(.*-m pytest)\n```', (root / 'README.md').read_text()
  ).group(1)
  assert command in (root / '.ci' / 'run').read_text()
