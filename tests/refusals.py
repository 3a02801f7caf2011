"""Many command lines, each in a fork of one process that imported main's needs.

A fork starts in milliseconds where a new Python takes seconds to import JAX.
Reads a JSON list of argument lists on stdin, writes a JSON list of
[exit code, stdout, stderr]. Nothing here may start a JAX backend before a fork.
"""

import contextlib
import json
import os
import runpy
import sys
import tempfile
import traceback

from pfs_jax import stages, studies  # noqa: F401  Imported before the forks.


def child(args, out, err):
  """Runs main.py with these arguments; never returns."""
  os.dup2(out.fileno(), 1)
  os.dup2(err.fileno(), 2)
  code = 1
  try:
    sys.argv = ['main.py', *args]
    runpy.run_path('main.py', run_name='__main__')
    code = 0
  except SystemExit as e:
    code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
  except BaseException:
    traceback.print_exc()
  finally:
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(code)


def main():
  results = []
  for args in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
      pid = os.fork()
      if pid == 0:
        child(args, out, err)
      _, status = os.waitpid(pid, 0)
      texts = []
      for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
      results.append([os.waitstatus_to_exitcode(status), *texts])
  json.dump(results, sys.stdout)


if __name__ == '__main__':
  main()
