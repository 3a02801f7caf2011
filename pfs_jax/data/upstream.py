"""The original files of a data set, verified, from a folder or the network.

Files are held in memory (170 MB at most) until their checksum is verified, so a
broken download leaves no file on the disk. TFDS's own list has the name, the
length and the sha256 of each file.
"""

import dataclasses
import http.client
import threading
import urllib.error
import urllib.request
from concurrent import futures

from pfs_jax import console, errors, storage

CONNECT_SECONDS = 10.0
_STALL_SECONDS = 10.0  # The longest silence in the middle of a download.
_CHUNK = 1 << 18
DEBIAN_FASHION = '/usr/share/datasets/fashion-mnist'

# Debian's dataset-fashion-mnist holds the original gzip streams with another
# header (no file name, another time). With the original times the first header
# can be restored, so that TFDS's sha256 covers every byte.
_FASHION_TIMES = {'train': 1504176606, 't10k': 1504176627}


@dataclasses.dataclass(frozen=True)
class File:
  """One upstream file: its name, address, length in bytes and sha256 (hex)."""

  name: str
  url: str
  size: int
  sha256: str


class Unreachable(Exception):
  """A download failed; the message gives the reason in a few words."""


def expected(name: str) -> tuple[File, ...]:
  """The files that TFDS has registered for a data set."""
  import tensorflow_datasets as tfds

  urls = tfds.builder_cls(name).url_infos
  return tuple(
    File(info.filename, url, info.size, info.checksum)
    for url, info in urls.items()
  )


def from_folder(name: str, folder: str) -> dict[str, bytes]:
  """{file name: content} of a data set, from `config.data.source_dir`.

  The folder has the original files under their own names, or Debian's copies of
  Fashion-MNIST. Links are followed, since the checksum decides what is used.

  Raises:
    errors.UserError: A file is missing, unreadable, or not the one expected.
  """
  root = storage.expanded(folder)
  wanted = expected(name)
  contents = {}
  for file in wanted:
    try:
      content = storage.read_regular_file(root / file.name)
    except errors.UserError as e:
      raise errors.UserError(
        f'config.data.source_dir must hold the files of {name}; {e}\n'
        f'Expected there: {", ".join(f.name for f in wanted)}.'
      ) from e
    if name == 'fashion_mnist':
      content = _upstream_header(file, content)
    found = storage.sha256(content)
    if found != file.sha256:
      raise errors.UserError(
        f'config.data.source_dir must hold upstream files; '
        f'{file.name} in {root} is another file.\n'
        f'Expected {file.size} bytes, sha256 {file.sha256};\n'
        f'got {len(content)} bytes, sha256 {found}.'
      )
    contents[file.name] = content
  return contents


def _upstream_header(file: File, content: bytes) -> bytes:
  """Puts the original header on a gzip file without a name, and on no other.

  RFC 1952: magic, method 8, flags (8 = a name follows), time, extra, system.
  """
  stem = file.name.removesuffix('.gz')
  seconds = _FASHION_TIMES.get(stem.split('-')[0])
  if seconds is None or content[:4] != b'\x1f\x8b\x08\x00':
    return content
  header = b'\x1f\x8b\x08\x08' + seconds.to_bytes(4, 'little') + b'\x00\x03'
  return header + stem.encode() + b'\0' + content[10:]


def download(name: str) -> dict[str, bytes]:
  """{file name: content} of a data set, in one attempt, checksums verified.

  Raises:
    Unreachable: No connection within `CONNECT_SECONDS`, an error status, a
      stalled, short, long or altered file.
  """
  return {file.name: _get(file) for file in expected(name)}


def _get(file: File) -> bytes:
  content = bytearray()
  try:
    with (
      _connect(file.url) as response,
      console.Progress(file.name, file.size, unit='bytes') as progress,
    ):
      console.note(f'downloading {file.url} ({file.size / 1e6:.1f} MB)')
      # One byte too many is enough to know that it is another file.
      while len(content) <= file.size:
        chunk = response.read(min(_CHUNK, file.size + 1 - len(content)))
        if not chunk:
          break
        content += chunk
        progress.update(len(content))
  except urllib.error.HTTPError as e:
    e.close()
    raise Unreachable(f'{file.url}: status {e.code} {e.reason}') from e
  except (OSError, http.client.HTTPException) as e:
    reason = getattr(e, 'reason', None) or e  # URLError wraps its cause.
    # One line, also where something other than a web server answers.
    reason = ' '.join(str(reason).split())[:100] or type(e).__name__
    raise Unreachable(f'{file.url}: {reason}') from e
  if len(content) < file.size:
    raise Unreachable(
      f'{file.url}: ended after {len(content)} of {file.size} bytes'
    )
  if storage.sha256(bytes(content)) != file.sha256:
    raise Unreachable(f'{file.url}: not the expected file (sha256 differs)')
  return bytes(content)


def _connect(url: str) -> http.client.HTTPResponse:
  """Opens a URL within `CONNECT_SECONDS` in all.

  A socket's time-out limits neither the name look-up nor the attempts at a host
  with many addresses. So a thread connects; if it is late, it is abandoned.
  """
  request = urllib.request.Request(url, headers={'User-Agent': 'pfs_jax'})
  answer: futures.Future = futures.Future()

  def ask() -> None:
    try:
      answer.set_result(urllib.request.urlopen(request, timeout=_STALL_SECONDS))
    except Exception as e:  # Raised by `result`, in the caller's thread.
      answer.set_exception(e)

  threading.Thread(target=ask, daemon=True).start()
  if not futures.wait([answer], CONNECT_SECONDS).done:
    raise TimeoutError(f'no answer within {CONNECT_SECONDS:g} s')
  return answer.result()
