"""The stages behind `--mode`: search, prune, train, probe, eval, export, info.

Each reads what the one before left in the workdir, so each can run alone, on
another machine. All that passes from search to train is a structure file.
"""

from __future__ import annotations

import pathlib

from pfs_jax import errors, storage
from pfs_jax.stages import (
  cutting,
  exporting,
  probing,
  searching,
  showing,
  training,
)
from pfs_jax.stages.job import Job

search = searching.run
cut = cutting.cut
check_budget = cutting.check_budget
write = cutting.write
probe = probing.measure
probe_cost = probing.cost
train = training.run
fit = training.fit
evaluate = training.evaluate
restore = training.restore
export = exporting.run
info = showing.info


def run(job: Job) -> None:
  """Search, prune, train and evaluate."""
  search(job)
  train(job)


def execute(mode: str, job: Job, out: pathlib.Path | None = None) -> None:
  """Runs one mode.

  Modes that write into the workdir hold it; the others only read there.

  Args:
    mode: One of `MODES`.
    job: Config and workdir.
    out: The folder of an export; None is the one in the workdir.
  """
  if mode == 'export':
    export(job, out)
    return
  if mode in ('info', 'eval'):
    MODES[mode](job)
    return
  with storage.locked(job.workdir) as held:
    if not held:
      raise errors.UserError(
        f'{job.workdir} is in use by another process; wait for it, or give '
        'another --workdir.'
      )
    MODES[mode](job)


MODES = {
  'search': search,
  'prune': cut,
  'probe': probing.run,
  'train': train,
  'eval': evaluate,
  'run': run,
  'export': export,
  'info': info,
}
