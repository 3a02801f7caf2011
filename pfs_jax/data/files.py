"""The upstream files of a data set, verified, from a folder or the network.

Files are held in memory (170 MB at most) until their checksum is right, so a
broken download leaves nothing on the disk. Which files, how long and with which
sha256 is TFDS's own list, asked at run time.
"""

import dataclasses
import hashlib
import http.client
import pathlib
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from pfs_jax import errors

CONNECT_SECONDS = 10.0
_STALL_SECONDS = 10.0  # The longest silence in the middle of a download.
_SAY_EVERY_SECONDS = 10.0
_CHUNK = 1 << 18
DEBIAN_FASHION = '/usr/share/datasets/fashion-mnist'

# Debian's dataset-fashion-mnist holds upstream's gzip streams with a fresh
# header (no file name, another time). With upstream's times the header can be
# written again, and TFDS's sha256 then covers every byte.
_FASHION_TIMES = {'train': 1504176606, 't10k': 1504176627}


@dataclasses.dataclass(frozen=True)
class File:
  """One upstream file: its name, address, length in bytes and sha256 (hex)."""

  name: str
  url: str
  size: int
  sha256: str


class Unreachable(Exception):
  """A download failed; the message is the reason, in a few words."""


# Data set -> files to use in place of TFDS's list: a mirror, or a test's own.
OVERRIDES: dict[str, tuple[File, ...]] = {}


def expected(name: str) -> tuple[File, ...]:
  """The files that TFDS has registered for a data set (or `OVERRIDES`)."""
  if name in OVERRIDES:
    return OVERRIDES[name]
  import tensorflow_datasets as tfds

  urls = tfds.builder_cls(name).url_infos
  return tuple(
    File(info.filename, url, info.size, info.checksum)
    for url, info in urls.items()
  )


def say(text: str) -> None:
  """One line of progress to stderr; stdout belongs to results."""
  print(text, file=sys.stderr, flush=True)


def from_folder(name: str, folder: str) -> dict[str, bytes]:
  """Reads a data set's files from `config.data.source_dir`; writes nothing.

  Args:
    name: data set.
    folder: directory with upstream's files under their own names, or Debian's
      copies of Fashion-MNIST's.

  Returns:
    File name to content, as upstream published it.

  Raises:
    UserError: a file is missing, unreadable, or not the one expected.
  """
  root = pathlib.Path(folder).expanduser()
  wanted = expected(name)
  contents = {}
  for file in wanted:
    path = root / file.name
    try:
      content = path.read_bytes()
    except OSError as e:
      names = ', '.join(f.name for f in wanted)
      raise errors.UserError(
        f'config.data.source_dir must hold the files of {name}; '
        f'cannot read {file.name} in {root} ({e.strerror}).\n'
        f'Expected there: {names}.'
      ) from e
    if name == 'fashion_mnist':
      content = _upstream_header(file, content)
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
      raise errors.UserError(
        f'config.data.source_dir must hold upstream files; '
        f'{file.name} in {root} is another.\n'
        f'Expected {file.size} bytes, sha256 {file.sha256};\n'
        f'got {len(content)} bytes, sha256 {found}.'
      )
    contents[file.name] = content
  return contents


def _upstream_header(file: File, content: bytes) -> bytes:
  """Gives a nameless gzip file the header that upstream's has, else as it is.

  RFC 1952: magic, method 8, flags (8 = a name follows), time, extra, system.
  """
  stem = file.name.removesuffix('.gz')
  seconds = _FASHION_TIMES.get(stem.split('-')[0])
  if seconds is None or content[:4] != b'\x1f\x8b\x08\x00':
    return content
  header = b'\x1f\x8b\x08\x08' + seconds.to_bytes(4, 'little') + b'\x00\x03'
  return header + stem.encode() + b'\0' + content[10:]


def download(name: str) -> dict[str, bytes]:
  """Downloads a data set's files: one attempt, checksums verified.

  Args:
    name: data set.

  Returns:
    File name to content.

  Raises:
    Unreachable: no connection within `CONNECT_SECONDS`, an error status, a
      stalled, short, long or altered file.
  """
  with _progress() as progress:
    return {file.name: _get(file, progress) for file in expected(name)}


def _get(file: File, progress: '_Lines') -> bytes:
  content = bytearray()
  try:
    with _connect(file.url) as response:
      progress.begin(file)
      # One byte too many is enough to know that it is another file.
      while len(content) <= file.size:
        chunk = response.read(min(_CHUNK, file.size + 1 - len(content)))
        if not chunk:
          break
        content += chunk
        progress.show(len(content))
  except urllib.error.HTTPError as e:
    e.close()
    raise Unreachable(f'{file.url}: status {e.code} {e.reason}') from e
  except (OSError, http.client.HTTPException) as e:
    reason = getattr(e, 'reason', None) or e  # URLError wraps its cause.
    # One line, whatever a server that is none has answered.
    reason = ' '.join(str(reason).split())[:100] or type(e).__name__
    raise Unreachable(f'{file.url}: {reason}') from e
  if len(content) < file.size:
    raise Unreachable(
      f'{file.url}: ended after {len(content)} of {file.size} bytes'
    )
  if hashlib.sha256(content).hexdigest() != file.sha256:
    raise Unreachable(f'{file.url}: not the expected file (sha256 differs)')
  return bytes(content)


def _connect(url: str) -> http.client.HTTPResponse:
  """Opens a URL within `CONNECT_SECONDS` all told.

  A socket's time-out bounds neither the name look-up nor a host of many
  addresses; hence the thread, which is left behind when it is late.
  """
  request = urllib.request.Request(url, headers={'User-Agent': 'pfs_jax'})
  return _within(
    CONNECT_SECONDS,
    lambda: urllib.request.urlopen(request, timeout=_STALL_SECONDS),
  )


def _within(seconds: float, call: Callable):
  """The result (or error) of `call()`; `TimeoutError` when it is late."""
  outcome = {}

  def run():
    try:
      outcome['result'] = call()
    except Exception as e:  # Raised again below, in the caller's thread.
      outcome['error'] = e

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(seconds)
  if 'error' in outcome:
    raise outcome['error']
  if 'result' not in outcome:
    raise TimeoutError(f'no answer within {seconds:g} s')
  return outcome['result']


def _progress():
  return _Bar() if sys.stderr.isatty() else _Lines()


class _Lines:
  """Progress for a log file: a line at the start, then one now and then."""

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass

  def begin(self, file: File) -> None:
    self.file, self.last = file, time.monotonic()
    say(f'downloading {file.url} ({file.size / 1e6:.1f} MB)')

  def show(self, done: int) -> None:
    if time.monotonic() - self.last > _SAY_EVERY_SECONDS:
      self.last = time.monotonic()
      say(f'  {done / 1e6:.1f} of {self.file.size / 1e6:.1f} MB')


class _Bar(_Lines):
  """Progress for a terminal: one bar a file."""

  def __init__(self):
    from rich import console, progress

    self.bar = progress.Progress(
      progress.TextColumn('{task.description}'),
      progress.BarColumn(),
      progress.DownloadColumn(),
      progress.TransferSpeedColumn(),
      progress.TimeRemainingColumn(),
      console=console.Console(stderr=True),
    )

  def __enter__(self):
    self.bar.start()
    return self

  def __exit__(self, *unused):
    self.bar.stop()

  def begin(self, file: File) -> None:
    self.task = self.bar.add_task(file.name, total=file.size)

  def show(self, done: int) -> None:
    self.bar.update(self.task, completed=done)
