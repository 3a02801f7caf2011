"""The command line as a user meets it: refusals and info."""

import re

import pytest

from tests import processes

SMALL = '--config.model.name=resnet8'
DIGITS = f'--config=configs/digits.py {SMALL}'
INFO = '--mode=info'
TRAIN = f'{DIGITS} --mode=train --config.train.structure='
LONG = 'x' * 300  # Most file systems allow names of 255 bytes.
TOO_LONG = 'cannot be used: File name too long'

# {a field and its value, given to --mode=info: what the message must say}.
INFO_FIELDS = {
  'sead=1': 'Did you mean "seed"',
  'train.epoch=1': 'the config has no field \'epoch\'. Did you mean "epochs"',
  'seed': 'Missing value',
  'seed=1.5': 'invalid literal',
  'seed=-1': 'config.seed must be',
  'search.epochs=ten': 'could not convert',
  'budget.keep=0.5,1.5': 'must be shares in (0, 1]; got (0.5, 1.5)',
  'train={"epochs":1}': 'config.train.init is missing',
  'train.reference=maybe': 'maybe',
}
# The same for --mode=search.
SEARCH_FIELDS = {
  'budget.keep=0.05,': '(the floor)',
  'data.validation_examples=1500': 'config.data.validation_examples must be',
  'data.train_examples=9999': 'config.data.train_examples must be in 0..1500',
  'search.batch_size=1201': 'config.search.batch_size must be in [1, 1200]',
}
# {arguments: what the message must say}. None of them searches.
BAD = {
  **{
    f'{DIGITS} {INFO} --config.{field}': said
    for field, said in INFO_FIELDS.items()
  },
  **{
    f'{DIGITS} --mode=search --config.{field}': said
    for field, said in SEARCH_FIELDS.items()
  },
  f'{DIGITS} --mode=run --config.train.structure=keep0.1': 'not exist',
  f'{DIGITS} --mode=run --config.train.batch_size=1501': 'in [1, 1500]',
  f'{DIGITS} {INFO} --out=x': '--out is for --mode=export and report',
  f'{DIGITS} --mode=report --formats=onnx': '--formats is for --mode=export',
  f'{DIGITS} {INFO} now': "unexpected argument 'now'",
  f'{DIGITS} {INFO} --fast': "Unknown command line flag 'fast'",
  '': '--config is required',
  DIGITS: '--mode is required',
  INFO: '--config is required',
  f'{DIGITS} --mode=fly': 'value should be one of',
  f'{DIGITS} --mode=': 'value should be one of',
  f'--config=configs/no.py {INFO}': 'configs/no.py',
  f'--config=configs {INFO}': 'Is a directory',
  f'--config=README.md {INFO}': 'README.md, line',
  f'--config=configs/digits.py:big {INFO}': 'full, smoke',
  f'--config.seed=1 {DIGITS} {INFO}': '--config.seed',
  f'{DIGITS} --mode=prune': 'run --mode=search',
  f'{DIGITS} --mode=train': 'does not exist',
  f'{DIGITS} --mode=probe --config.probe.share=0.01': 'probe.share must be >=',
  f'{DIGITS} --mode=eval': 'does not exist',
  f'{TRAIN}none.json': 'none.json does not exist',
  f'{TRAIN}requirements.txt': 'requirements.txt: JSON is malformed',
  f'{DIGITS} --mode=search --workdir=pyproject.toml': 'toml cannot be used',
  f'{DIGITS} {INFO} --workdir={LONG}': TOO_LONG,
  f'{DIGITS} --mode=search --workdir={LONG}': TOO_LONG,
  f'{DIGITS} --mode=report --workdir={LONG}': TOO_LONG,
  f'{TRAIN}{LONG}': TOO_LONG,
  f'--config={LONG} {INFO}': 'File name too long',
  f'--config=configs/fashion.py --mode=search {SMALL} '
  '--config.data.source_dir=/nowhere': '/nowhere',
  # The paper's search without its data ends at once and says what to do.
  f'--config=configs/resnet20.py --mode=search {SMALL} '
  '--config.data.download=False': 'source_dir',
}


@pytest.mark.parametrize('args, said', BAD.items(), ids=[a[:80] for a in BAD])
def test_bad_command_lines(args, said, tmp_path):
  done = processes.run(
    ['main.py', f'--workdir={tmp_path / "runs" / "w"}', *args.split()],
    env={'TFDS_DATA_DIR': str(tmp_path / 'tfds')},
  )
  lines = done.stderr.splitlines()
  assert done.returncode == 2, done.stderr
  assert lines[0].startswith('error: ') and len(lines) <= 3, done.stderr
  assert said in done.stderr
  assert not (tmp_path / 'runs').exists()  # The next one starts afresh.


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
  if config == 'digits':  # The table of the README.
    readme = (processes.ROOT / 'README.md').read_text()
    macs = re.findall(r'│ (?:reference|searched) +│ +([\d,]+)', readme)
    assert len(macs) == 2 and all(number in out for number in macs)


def test_the_readme_and_ci_run_the_same_test_command():
  readme = (processes.ROOT / 'README.md').read_text()
  command = re.search(r'```sh\n(.*-m pytest)\n```', readme).group(1)
  assert command in (processes.ROOT / '.ci' / 'run').read_text()
