"""Step times beside PyTorch on the same CPU.

  python -m venv benchmarks/.venv-torch
  benchmarks/.venv-torch/bin/pip install -r benchmarks/requirements-torch.txt
  python -m benchmarks.versus_pytorch                      # all nets, or some:
  python -m benchmarks.versus_pytorch resnet20 --rounds=9 --compiled

One process for each program (ours and each PyTorch variant, see torch_nets.py)
compiles, makes two steps, and then steps only when it is told to; the programs
take turns, so that other load on the machine falls on all of them. First, the
logits of both definitions are compared on the same weights. Results are merged
into results/versus_pytorch.json, whose table is written to docs/speed.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'results' / 'versus_pytorch.json'
PAGE = ROOT / 'docs' / 'speed.md'
TORCH = ROOT / 'benchmarks' / '.venv-torch' / 'bin' / 'python'

# name -> (base width, batch, side of the images).
NETS = {
  'resnet20': (16, 128, 32),
  'resnet56': (16, 128, 32),
  'vgg16': (64, 64, 32),
  'mobilenet_v2': (32, 16, 96),
}
# Also those that have no definition in torch_nets.py (for benchmarks.steps).
FAMILIES = {**NETS, 'mobilenet_v1': (32, 16, 96), 'resnet50': (64, 8, 96)}
VARIANTS = {
  'search': ('ours', 'published', 'channels_last', 'frozen', 'kept'),
  'train': ('ours', 'published', 'channels_last', 'kept'),
}
# 'kept' is the fastest variant before it in a process that keeps freed memory,
# as our own does (cpu.keep_freed_memory); the others have glibc's defaults.
KEPT = {'search': 'frozen', 'train': 'channels_last'}
KEEP_MEMORY = {
  'MALLOC_MMAP_MAX_': '0',
  'MALLOC_TRIM_THRESHOLD_': '-1',
  'MALLOC_ARENA_MAX': '1',
}
COLUMNS = {
  'ours': 'ours',
  'published': 'as published',
  'channels_last': 'channels-last',
  'frozen': 'frozen',
  'kept': 'memory kept',
  'compiled': 'compiled',
}


def our_step(name, mode):
  """(compiled step, its state, images, labels)."""
  import jax

  from pfs_jax import config, cpu, models, search, train

  width, batch, side = FAMILIES[name]
  network = models.network(name, 10, side, 3, base_width=width)
  cpu.keep_freed_memory()  # As a run of such batches does.
  key = jax.random.key(0)
  x = jax.random.normal(key, (batch, side, side, 3))
  y = jax.numpy.arange(batch) % 10
  if mode == 'search':
    weights = models.init(network.gated, key, (side, side, 3))
    state = search.init(
      network.gated, weights, sparsity=0.5, balance=0.5, learning_rate=0.01
    )
    step = search.step
  else:
    weights = models.init(network.reference, key, (side, side, 3))
    recipe = config.default().train
    optimizer = train.optimizer(recipe, 10_000)
    state = train.init(network.reference, weights, optimizer)
    step = train.step
  step = jax.jit(
    step, donate_argnums=0, compiler_options=cpu.compiler_options()
  )
  return step, state, x, y


def serve(name, mode):
  """Makes a step for each line of standard input, and prints its seconds."""
  import jax

  step, state, x, y = our_step(name, mode)
  for _ in range(2):
    state, _ = jax.block_until_ready(step(state, x, y))
  print('ready', flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, x, y))
    print(time.perf_counter() - start, flush=True)


def check_logits(name):
  """The largest difference of the logits, relative to the largest logit."""
  import flax
  import jax

  from pfs_jax import interop, models

  width = NETS[name][0]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'logits.npz'
    nets = ROOT / 'benchmarks' / 'torch_nets.py'
    subprocess.run([TORCH, nets, name, 'logits', path], check=True)
    found = dict(np.load(path))
  weights = {k[2:]: v for k, v in found.items() if k.startswith('w/')}
  if name == 'mobilenet_v2':
    weights = _own_names(weights)
    variables = flax.traverse_util.unflatten_dict(weights, sep='/')
  else:
    variables = interop.from_torch(name, weights, width=width)
  module = models.build(name, 10, width, gated=True)
  x = found['x'].transpose(0, 2, 3, 1)
  ours = jax.jit(module.apply)(variables, x)
  return float(abs(ours - found['logits']).max() / abs(found['logits']).max())


def _own_names(weights):
  """Weights of torch_nets.MobileNetV2 under our paths."""
  kinds = {
    'weight': 'params/{}/scale',
    'bias': 'params/{}/bias',
    'running_mean': 'batch_stats/{}/mean',
    'running_var': 'batch_stats/{}/var',
  }
  found = {}
  for key, value in weights.items():
    layer, _, kind = key.replace('.', '/').rpartition('/')
    if value.ndim == 4:
      found[f'params/{layer}/kernel'] = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
      found[f'params/{layer}/kernel'] = value.T
    elif kind == 'gates':
      # A group has the name of the first layer that makes its channels.
      group = layer.removesuffix('/bn').replace('/depthwise', '/expand')
      group = 'stem' if group == 'block0/expand' else group
      found[f'gates/{group}/gate'] = value
    elif kind in kinds:
      found[kinds[kind].format(layer)] = value
  return found


def measure(name, rounds, compiled):
  """{mode: {variant: milliseconds of each round}}."""
  programs = {}
  for mode, variants in VARIANTS.items():
    for variant in variants + ('compiled',) * compiled:
      command = [TORCH, ROOT / 'benchmarks' / 'torch_nets.py']
      if variant == 'ours':
        command = [sys.executable, '-m', 'benchmarks.versus_pytorch', '--serve']
      is_kept = variant == 'kept'
      programs[mode, variant] = subprocess.Popen(
        [*command, name, mode, KEPT[mode] if is_kept else variant],
        cwd=ROOT,
        env=os.environ | (KEEP_MEMORY if is_kept else {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
  for program in programs.values():
    assert program.stdout.readline() == 'ready\n'
  found = {mode: {} for mode in VARIANTS}
  for _ in range(rounds):
    for (mode, variant), program in programs.items():
      program.stdin.write('\n')
      program.stdin.flush()
      seconds = float(program.stdout.readline())
      found[mode].setdefault(variant, []).append(round(1000 * seconds, 1))
  for program in programs.values():
    program.stdin.close()
    program.wait()
  return found


def table(results):
  """The Markdown table: medians, spread, and ratios of medians."""
  lines = [
    f'| net, step | {" | ".join(COLUMNS.values())} | ours against them |',
    f'| --- |{" ---: |" * len(COLUMNS)} --- |',
  ]
  for name, record in results.items():
    for mode in VARIANTS:
      times = record['milliseconds'][mode]
      ours = np.median(times['ours'])
      cells, ratios = [], []
      for variant in COLUMNS:
        if variant not in times:
          cells.append('-')
          continue
        values = times[variant]
        cells.append(
          f'{np.median(values):.0f} ({min(values):.0f}-{max(values):.0f})'
        )
        if variant != 'ours':
          ratios.append(f'{np.median(values) / ours:.2f}')
      label = f'{name}, {mode}, n = {len(times["ours"])}'
      cells = ' | '.join(cells)
      lines.append(f'| {label} | {cells} | {", ".join(ratios)} |')
  return '\n'.join(lines) + '\n'


def write_table(name, text):
  """Writes a table between its two marks in docs/speed.md."""
  start, end = f'<!-- {name} -->\n', '<!-- end -->'
  before, _, rest = PAGE.read_text().partition(start)
  after = rest.partition(end)[2]
  PAGE.write_text(before + start + text + end + after)


def main():
  """Measures the nets asked for and merges what was found."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('names', nargs='*', default=list(NETS))
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--compiled', action='store_true', help='torch.compile')
  parser.add_argument(
    '--serve', action='store_true', help='one of the programs'
  )
  args = parser.parse_args()
  if args.serve:
    serve(*args.names[:2])
    return
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name in args.names:
    error = check_logits(name)
    assert error < 1e-4, f'{name}: the logits differ by {error:.1e}'
    results[name] = {
      'milliseconds': measure(name, args.rounds, args.compiled),
      'logits': error,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    write_table('versus_pytorch', table(results))
  print(table(results))


if __name__ == '__main__':
  main()
