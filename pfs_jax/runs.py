"""A run's folder: JSON files, checkpoints (all Orbax is here), metrics log.

    workdir/  config.json versions.json structure.json kept.json result.json
              search/ config.json checkpoints/ gates/ gates.npz metrics.jsonl
              train/  config.json checkpoints/ metrics.jsonl
              (both with TensorBoard events)

Files are written to a temporary name and renamed, so that a reader never sees
half of one. With several processes the first one writes; Orbax coordinates the
checkpoints itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers
from tensorboardX import SummaryWriter

from pfs_jax import errors

# What a result depends on, of the checkout.
_CODE = ('pfs_jax', 'configs', 'main.py', 'requirements.txt')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def is_first_process() -> bool:
  """Whether this process is the one that writes files."""
  return jax.process_index() == 0


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all; only on the first process."""
  if not is_first_process():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  temporary.write_text(text)
  os.replace(temporary, path)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file; a missing or broken one is the user's to mend."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as e:
    raise errors.UserError(f'{path} does not exist.') from e
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
    raise errors.UserError(f'{path} cannot be read: {e}.') from e


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
  """Writes a .npz whole or not at all; names may hold '/'."""
  if not is_first_process():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  with temporary.open('wb') as f:
    np.savez(f, **{k: np.asarray(v) for k, v in arrays.items()})
  os.replace(temporary, path)


def read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a .npz in the order in which it was written; no pickle."""
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as f:
      return {name: f[name] for name in f.files}
  except FileNotFoundError as e:
    raise errors.UserError(f'{path} does not exist.') from e
  except Exception as e:  # numpy and zipfile raise many kinds.
    raise errors.UserError(f'{path} cannot be read: {e}.') from e


def checksum(arrays: Any) -> str:
  """SHA-256 of the bytes of a tree of arrays, in the tree's order."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(arrays):
    digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
  return digest.hexdigest()


@functools.cache  # What runs is what was there when it started.
def commit() -> str:
  """The commit of this code, '' outside a git checkout.

  With '-dirty' where the code or the configs differ from it; results may.
  """

  def git(*args: str) -> str:
    return subprocess.run(
      ['git', *args],
      cwd=pathlib.Path(__file__).parents[1],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    ).stdout.strip()

  try:
    head = git('rev-parse', '--short=12', 'HEAD')
    changed = git('status', '--porcelain', '--', *_CODE)
  except (OSError, subprocess.SubprocessError):
    return ''
  return f'{head}-dirty' if changed else head


def versions() -> dict[str, str]:
  """What a run ran with: commit, Python, packages, devices."""
  found = {'commit': commit(), 'python': platform.python_version()}
  for package in _PACKAGES:
    found[package] = importlib.metadata.version(package)
  found['hardware'] = hardware()
  return found


def hardware() -> str:
  """Devices in words, for results: kind and number."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    kind = f'{platform.machine()} CPU, {os.cpu_count()} cores'
  return f'{len(devices)} x {kind}'


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the run's folder; a second process on it is refused."""
  if not is_first_process():
    yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / '.lock').open('a+')
  except OSError as e:
    raise errors.UserError(f'--workdir={workdir} cannot be used: {e}.') from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise errors.UserError(
        f'{workdir} is in use by another process; wait for it, or give another '
        '--workdir.'
      ) from e
    yield


def claim(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Makes a folder belong to one identity: a flat map of fields to values.

  Raises:
    errors.UserError: If the folder holds the work of another identity; the
      message names the fields that differ.
  """
  path = folder / 'config.json'
  identity = json.loads(json.dumps(dict(identity)))  # Tuples become lists.
  if not path.exists():
    write_json(path, identity)
    return
  there = read_json(path)
  names = [*identity, *(k for k in there if k not in identity)]
  differ = [k for k in names if there.get(k) != identity.get(k)]
  if differ:
    shown = ', '.join(
      f'{k} (there {there.get(k)!r}, asked {identity.get(k)!r})'
      for k in differ[:4]
    )
    more = f' and {len(differ) - 4} more' if len(differ) > 4 else ''
    raise errors.UserError(
      f'{folder} holds the work of another config: {shown}{more}.\n'
      'Give another --workdir, or delete that folder.'
    )


class Checkpoints:
  """Orbax checkpoints of one stage; the newest is never deleted for a better.

  A checksum of the arrays lies beside them, since Orbax restores a flipped byte
  silently; a checkpoint that cannot be read or does not match is passed over
  for the one before it, and makes room when the run that went on from there
  saves.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder.absolute() / 'checkpoints'
    options = ocp.CheckpointManagerOptions(
      cleanup_tmp_directories=True,
      preservation_policy=checkpoint_managers.LatestN(2),
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)
    self._passed_over: list[int] = []

  def __enter__(self) -> Checkpoints:
    """Itself."""
    return self

  def __exit__(self, *_) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()

  @property
  def latest(self) -> int | None:
    """The newest step there is, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Saves a tree of arrays; writes in the background."""
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      check=ocp.args.JsonSave({'sha256': checksum(state)}),
    )
    while self._passed_over:  # Orbax would refuse to write over them.
      self._manager.delete(self._passed_over.pop())
    if self._manager.latest_step() != step:
      self._manager.save(step, args=args, force=True)

  def restore(self, target: Any) -> tuple[int, Any] | None:
    """(step, state) of the newest good checkpoint on the target's shardings.

    None if there is none at all.

    Raises:
      errors.UserError: If there are checkpoints and none is good.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            check=ocp.args.JsonRestore(),
          ),
        )
      except Exception as e:  # Truncated files raise many kinds.
        logging.warning('checkpoint %d is unusable: %s', step, type(e).__name__)
        continue
      if checksum(restored.state) == restored.check['sha256']:
        self._passed_over = [s for s in steps if s > step]
        return step, restored.state
      logging.warning('checkpoint %d fails its checksum', step)
    if steps:
      raise errors.UserError(
        f'no checkpoint under {self._folder} can be read (steps '
        f'{", ".join(map(str, steps))}); delete that folder to start over.'
      )
    return None

  def reached_preemption(self, step: int) -> bool:
    """Whether some process of several was told to stop."""
    return self._manager.reached_preemption(step)


class MetricsLog:
  """metrics.jsonl, one JSON line a record, and TensorBoard events.

  Records after `resume_step` are dropped: the run will write them again.
  """

  def __init__(self, folder: pathlib.Path, resume_step: int):
    self._path = folder / 'metrics.jsonl'
    self._file = self._writer = None
    if not is_first_process():
      return
    kept = [r for r in read_metrics(folder) if r['step'] <= resume_step]
    write_text(self._path, ''.join(json.dumps(r) + '\n' for r in kept))
    self._file = self._path.open('a')
    self._writer = SummaryWriter(
      str(folder / 'events'), purge_step=resume_step + 1
    )

  def write(self, step: int, **scalars: float) -> None:
    """Appends one record and flushes it."""
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes both files."""
    if self._file is not None:
      self._file.close()
      self._writer.close()


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The records of metrics.jsonl; a torn last line is left out."""
  path, records = folder / 'metrics.jsonl', []
  if path.exists():
    for line in path.read_text().splitlines():
      with contextlib.suppress(json.JSONDecodeError):
        records.append(json.loads(line))
  return records


class Clock:
  """Seconds of work on a stage over all its processes, by its metrics log."""

  def __init__(self, folder: pathlib.Path):
    records = read_metrics(folder)
    self._before = records[-1].get('seconds', 0.0) if records else 0.0
    self._start = time.perf_counter()

  def seconds(self) -> float:
    """Seconds so far, to a millisecond."""
    return round(self._before + time.perf_counter() - self._start, 3)


def barrier(name: str) -> None:
  """Waits for all processes: what the first one wrote is there after it."""
  multihost_utils.sync_global_devices(name)


class StopSignal:
  """Catches SIGTERM and SIGINT; the loop acts between steps.

  A second signal ends the process at once. With several processes nothing is
  caught here: JAX's own handler tells all of them of a SIGTERM to one, and
  `Checkpoints.reached_preemption` says at which step they all stop.
  """

  def __init__(self):
    self.number: int | None = None

  def __enter__(self) -> StopSignal:
    """Installs the handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    if jax.process_count() > 1:
      numbers = ()
    self._before = {s: signal.signal(s, self._handle) for s in numbers}
    return self

  def __exit__(self, *_) -> None:
    """Puts the former handlers back."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if self.number is not None:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    self.number = number
