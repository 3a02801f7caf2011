"""The command line as a user meets it: refusals and info."""

import re

import pytest

from tests import processes

DIGITS = '--config=configs/digits.py'
INFO = '--mode=info'
SMALL = '--config.model.name=resnet8'

# Arguments and what the message must say.
INFO_CASES = {
  'stray argument': (['now'], "unexpected argument 'now'"),
  'unknown flag': (['--fast'], "Unknown command line flag 'fast'"),
  'unknown field': (['--config.sead=1'], 'Did you mean "seed"'),
  'unknown subfield': (['--config.train.epoch=1'], 'Did you mean "epochs"'),
  'no value': (['--config.seed'], 'Missing value'),
  'float seed': (['--config.seed=1.5'], 'invalid literal'),
  'negative seed': (['--config.seed=-1'], 'config.seed must be'),
  'word for a number': (['--config.search.epochs=ten'], 'could not convert'),
  'whole sub-dict': (
    ['--config.train={"epochs": 1}'],
    'config.train.init is missing',
  ),
  'bad bool': (['--config.train.reference=maybe'], 'maybe'),
  'bad name': (['--config.dtype=int8'], 'float32, bfloat16'),
  'unknown model': (['--config.model.name=lenet'], 'one of resnet20'),
  'unknown data': (['--config.data.name=svhn'], 'one of digits'),
  'share over one': (
    ['--config.budget.keep=1.5,'],
    'config.budget.keep must be shares in (0, 1]',
  ),
  'no budget': (['--config.budget.keep=()'], 'must name at least one budget'),
  'same budget twice': (
    ['--config.budget.keep=(0.5,0.5)'],
    'the same budget twice',
  ),
  'own model and a bad spec': (
    ['--config.model.factory=nothing'],
    'must be package.module:callable',
  ),
  'own model that is not there': (
    ['--config.model.factory=no_such_package:make'],
    "No module named 'no_such_package'",
  ),
}
SEARCH_CASES = {
  'budget below the floor': ('budget.keep=0.05,', '(the floor)'),
  'too much held out': (
    'data.validation_examples=1500',
    'config.data.validation_examples must be',
  ),
  'more examples than there are': (
    'data.train_examples=9999',
    'config.data.train_examples must be in 0..1500',
  ),
  'batch larger than the data': (
    'search.batch_size=1201',
    'config.search.batch_size must be in [1, 1200]',
  ),
}
TRAIN = '--config.train.structure='
LONG = 'x' * 300  # Most file systems allow names of 255 bytes.
TOO_LONG = 'cannot be used: File name too long'

# Arguments and what the message must say.
BAD = {
  **{
    k: ([DIGITS, INFO, *args], said) for k, (args, said) in INFO_CASES.items()
  },
  **{
    k: ([DIGITS, '--mode=search', SMALL, f'--config.{field}'], said)
    for k, (field, said) in SEARCH_CASES.items()
  },
  'no flags': ([], '--config is required'),
  'no mode': ([DIGITS], '--mode is required'),
  'no config': ([INFO], '--config is required'),
  'unknown mode': ([DIGITS, '--mode=fly'], 'value should be one of'),
  'empty mode': ([DIGITS, '--mode='], 'value should be one of'),
  'missing config': (['--config=configs/no.py', INFO], 'configs/no.py'),
  'folder as config': (['--config=configs', INFO], 'Is a directory'),
  'not a config': (['--config=README.md', INFO], 'README.md, line'),
  'unknown variant': (['--config=configs/digits.py:big', INFO], 'full, smoke'),
  'override first': (['--config.seed=1', DIGITS, INFO], '--config.seed'),
  'prune before search': ([DIGITS, '--mode=prune'], 'run --mode=search'),
  'train before search': ([DIGITS, '--mode=train'], 'does not exist'),
  'eval before train': ([DIGITS, '--mode=eval'], 'does not exist'),
  'no such structure': (
    [DIGITS, '--mode=train', f'{TRAIN}none.json'],
    'none.json does not exist',
  ),
  'not a structure': (
    [DIGITS, '--mode=train', f'{TRAIN}requirements.txt'],
    'requirements.txt: JSON is malformed',
  ),
  'workdir is a file': (
    ['--workdir=pyproject.toml', DIGITS, '--mode=search'],
    'pyproject.toml cannot be used',
  ),
  **{
    f'long workdir, {mode}': ([DIGITS, mode, f'--workdir={LONG}'], TOO_LONG)
    for mode in (INFO, '--mode=search', '--mode=report')
  },
  'long structure': ([DIGITS, '--mode=train', f'{TRAIN}{LONG}'], TOO_LONG),
  'long config': ([f'--config={LONG}', INFO], 'File name too long'),
  'no such source_dir': (
    [
      '--config=configs/fashion.py',
      '--mode=search',
      SMALL,
      '--config.data.source_dir=/nowhere',
    ],
    '/nowhere',
  ),
  # The paper's search without its data ends at once and says what to do.
  'no data and no network': (
    [
      '--config=configs/resnet20.py',
      '--mode=search',
      SMALL,
      '--config.data.download=False',
    ],
    'source_dir',
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


def test_help_is_no_error():
  done = processes.run(['main.py', '--help'])
  assert done.returncode == 0
  assert '--mode' in done.stdout and '--workdir' in done.stdout


@pytest.mark.parametrize('config', ['digits', 'mobilenet_v2', 'resnet50'])
def test_info_reads_no_data(config):
  code = f"""
    import runpy, sys
    for library in ('tensorflow_datasets', 'sklearn', 'array_record'):
      sys.modules[library] = None  # Importing it fails.
    sys.argv = ['main.py', '--config=configs/{config}.py', '--mode=info']
    runpy.run_path('main.py', run_name='__main__')
    """
  out = processes.output(code, env={'COLUMNS': '120'})
  for part in ('reference network', 'searched network', 'multiples of 8'):
    assert part in out


def test_the_readme_and_ci_run_the_same_test_command():
  readme = (processes.ROOT / 'README.md').read_text()
  command = re.search(r'```sh\n(.*-m pytest)\n```', readme).group(1)
  assert command in (processes.ROOT / '.ci' / 'run').read_text()
