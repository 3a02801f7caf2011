"""A run's folder: its config, result, metrics and time; signals and versions.

workdir/ config.json versions.json structure.json kept.json result.json
         search/ config.json checkpoints/ events/ gates/ gates.npz metrics.jsonl
         train/  config.json checkpoints/ events/ metrics.jsonl
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NotRequired, Self, TypedDict, cast

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from pfs_jax import errors, fields, storage

# The parts of the checkout that results depend on.
_CODE = ('pfs_jax', 'configs', 'main.py', 'requirements.txt')
# What a workdir holds besides work.
_NOTES = {'.lock', 'data', 'data/identity.json', 'data/checksums.json'}
_NOTES |= {'budget.txt', 'checksums.json', 'config.json', 'data.json'}
_NOTES |= {'model.json', 'versions.json'}
# Fields of an identity that older folders lack, whatever their value was.
_LATER = {'config.train.statistics', 'config.data.eval_batch_size'}
_claimed: list[pathlib.Path] = []  # What `claim` has written.
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@functools.cache  # Imported code does not change.
def commit() -> str:
  """The commit of this checkout; '' outside one.

  It ends in '-dirty' if the code or the configs differ from the commit.
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
    if git('rev-parse', '--show-prefix'):  # The checkout of something else.
      return ''
    head = git('rev-parse', '--short=12', 'HEAD')
    changed = git('status', '--porcelain', '--', *_CODE)
  except (OSError, subprocess.SubprocessError):
    return ''
  return f'{head}-dirty' if changed else head


def versions() -> dict[str, str]:
  """The commit, the versions of Python and packages, and the hardware."""
  return {
    'commit': commit(),
    'python': platform.python_version(),
    **{package: importlib.metadata.version(package) for package in _PACKAGES},
    'hardware': hardware(),
  }


def cores() -> int:
  """The cores that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # Not on Linux.
    return os.cpu_count() or 1


def hardware() -> str:
  """The number and the kind of the devices."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    kind = f'{_cpu()}, {os.cpu_count()} cores'
  return f'{len(devices)} x {kind}'


def _cpu() -> str:
  """The CPU's name and its widest vectors: both change the rounding."""
  text = ''
  with contextlib.suppress(OSError):
    text = pathlib.Path('/proc/cpuinfo').read_text()
  name = re.search(r'model name\s*: (.+)', text)
  known = ('avx512f', 'avx2', 'avx', 'asimd')
  vectors = next((v for v in known if f' {v} ' in text), '')
  kind = name[1] if name else f'{platform.machine()} CPU'
  return f'{kind} ({vectors})' if vectors else kind


def claim(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Gives a new folder an identity, or checks that the folder has this one.

  Its config.json holds the identity, {field: value}. Fields that are not in it
  count as having their defaults.

  Raises:
    errors.UserError: The folder belongs to another identity; the message names
      the fields that differ.
  """
  path = folder / 'config.json'
  identity = json.loads(json.dumps(dict(identity)))  # Tuples become lists.
  if not path.exists():
    storage.write_json(path, identity)
    _claimed.append(path)
    return
  kept = storage.read_json(path, dict[str, Any])
  known = {
    k: fields.BY_NAME.get(k.removeprefix('config.')) for k in identity | kept
  }
  plain = {k: field.default for k, field in known.items() if field}
  plain = json.loads(json.dumps(plain))
  there, asked = plain | kept, plain | identity
  for name in _LATER - kept.keys():
    there[name] = asked.get(name)
  compared = (
    k for k, f in known.items() if k in identity or f is None or f.result
  )
  differ = [k for k in compared if there.get(k) != asked.get(k)]
  if differ:
    shown = ', '.join(
      f'{k} (there {there.get(k)!r}, asked {asked.get(k)!r})'
      for k in differ[:4]
    )
    more = f' and {len(differ) - 4} more' if len(differ) > 4 else ''
    raise errors.UserError(
      f'{folder} holds the work of another config: {shown}{more}.\n'
      'Give another --workdir, or delete that folder.'
    )


def claim_part(folder: pathlib.Path, values: Mapping[str, Any]) -> None:
  """`claim` by some fields alone; a folder without an identity passes."""
  path = folder / 'config.json'
  if path.exists():
    claim(folder, storage.read_json(path, dict[str, Any]) | dict(values))


@contextlib.contextmanager
def giving_back(workdir: pathlib.Path) -> Iterator[None]:
  """Removes what a refused command wrote where it did no work yet.

  Else the corrected command would be refused, too. The folders that it made are
  removed as well, from the workdir upwards.
  """
  made = [p for p in (workdir, *workdir.parents) if not p.exists()]
  try:
    yield
  except (errors.UserError, OSError):
    with contextlib.suppress(OSError):
      for path in _claimed:
        if path.is_relative_to(workdir) and [*path.parent.glob('*')] == [path]:
          shutil.rmtree(path.parent)
      left = (str(p.relative_to(workdir)) for p in workdir.rglob('*'))
      if made and _NOTES.issuperset(left):
        shutil.rmtree(workdir)
        for parent in made[1:]:
          parent.rmdir()
    raise


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Result(TypedDict):
  """What is read of result.json, which is written at the end of a training."""

  test_accuracy: _Share
  reference_test_accuracy: _Share | None
  test_examples: _Count
  macs: _Count
  params: _Count
  counts: dict[str, _Count]
  budget: str
  class_names: list[str]
  steps: _Count
  seconds: Annotated[float, msgspec.Meta(ge=0)]
  mean: NotRequired[list[float]]
  std: NotRequired[list[float]]
  # What only reports read:
  latency: NotRequired[dict[str, int | float]]
  warnings: NotRequired[list[str]]
  versions: NotRequired[dict[str, Any]]
  config: NotRequired[dict[str, Any]]


def read_result(path: pathlib.Path) -> Result:
  """Reads result.json; raises UserError if it is missing or not a result."""
  if not path.exists():
    raise errors.UserError(
      f'{path} does not exist: no training has finished here. Run --mode=train '
      'with this config and workdir first.'
    )
  return cast(Result, storage.read_json(path, Result))


class MetricsLog(contextlib.AbstractContextManager):
  """metrics.jsonl, one JSON line a record, and TensorBoard events.

  Records after `resume_step` are dropped, because the run writes them again.
  """

  def __init__(self, folder: pathlib.Path, resume_step: int):
    self._path = folder / 'metrics.jsonl'
    self._writes = storage.is_first_process()
    if not self._writes:
      return
    kept = [r for r in read_metrics(folder) if r['step'] <= resume_step]
    lines = ''.join(json.dumps(r) + '\n' for r in kept)
    storage.write_text(self._path, lines)
    events = folder / 'events'
    with _reporting(self._path):
      events.mkdir(exist_ok=True)
      self._file = self._path.open('a')
      # Not SummaryWriter: a full disk ends its thread, and then `add_scalar`
      # waits for ever.
      self._events = EventsWriter(str(events / 'events'), f'.{os.getpid()}')
      self._event(resume_step + 1, session_log=SessionLog(status=1))  # START

  def _event(self, step: int, **content: Any) -> None:
    event = Event(step=step, wall_time=time.time(), **content)
    self._events.write_event(event)

  def write(self, step: int, **scalars: float) -> None:
    """Appends one record and flushes it."""
    if not self._writes:
      return
    with _reporting(self._path):
      self._file.write(json.dumps({'step': step, **scalars}) + '\n')
      self._file.flush()
      os.fsync(self._file.fileno())
      for name, value in scalars.items():
        self._event(step, summary=scalar(name, value))
      self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    if not self._writes:
      return
    for file in (self._file, self._events):
      with contextlib.suppress(OSError):  # `write` reported it.
        file.close()

  def __exit__(self, kind: type | None, *_: object) -> None:
    """Closes the log, and seals it unless an exception occurred."""
    self.close()
    if kind is None:
      storage.seal(self._path)


@contextlib.contextmanager
def _reporting(path: pathlib.Path) -> Iterator[None]:
  """Turns a failed write into a UserError."""
  try:
    yield
  except OSError as e:
    storage.refuse_write(path, e, 0)


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The records of metrics.jsonl; [] if there is none.

  The last line is left out if it is not complete, as after a kill. Any other
  line that is not a record of numbers with a step is a UserError.
  """
  path = folder / 'metrics.jsonl'
  if not path.exists():
    return []
  content = storage.read_bytes(path)
  records = []
  whole = content[: content.rfind(b'\n') + 1]
  for number, line in enumerate(whole.splitlines(), 1):
    where = f'{path}, line {number}'
    records.append(storage.decode(line, dict[str, int | float], where))
    if type(records[-1].get('step')) is not int:
      raise errors.UserError(f'{where}: step must be an integer.')
  return records


class Clock:
  """Seconds of work on a stage, including earlier ones in its metrics log."""

  def __init__(self, folder: pathlib.Path):
    records = read_metrics(folder)
    self._before = records[-1].get('seconds', 0.0) if records else 0.0
    self._start = time.perf_counter()

  def seconds(self) -> float:
    """Seconds so far, to a millisecond."""
    return round(self._before + time.perf_counter() - self._start, 3)


def barrier(name: str) -> None:
  """Waits for all processes, for example until the first one has written."""
  multihost_utils.sync_global_devices(name)


def agreed(value: Any) -> Any:
  """The boolean or the array of the first process, on all processes."""
  if jax.process_count() == 1:
    return value
  found = multihost_utils.broadcast_one_to_all(np.asarray(value))
  return bool(found) if isinstance(value, bool) else np.asarray(found)


class StopSignal:
  """Remembers a SIGTERM or SIGINT, so that the loop stops after its step.

  A second signal ends the process at once. With several processes, no signal is
  caught here: when one gets a SIGTERM, JAX's own handler tells all of them, and
  `Checkpoints.preempting_signal` says at which step they stop.
  """

  def __init__(self):
    self.number: int | None = None

  def __enter__(self) -> Self:
    one = jax.process_count() == 1
    numbers = (signal.SIGTERM, signal.SIGINT) if one else ()
    self._before = {s: signal.signal(s, self._handle) for s in numbers}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    if self.number is not None:
      signal.signal(number, signal.SIG_DFL)
      os.kill(os.getpid(), number)
    self.number = number
