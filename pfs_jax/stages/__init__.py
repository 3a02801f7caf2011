"""The stages behind `--mode`: search, prune, train, probe, eval, export, info.

Each stage reads the files of the stage before from the workdir, so it can run
alone, on another machine. From search to train, only a structure file passes.
"""

import pathlib
from collections.abc import Sequence

from pfs_jax import errors, rankings, runs, storage
from pfs_jax.stages import (
  cutting,
  exporting,
  probing,
  searching,
  showing,
  training,
)
from pfs_jax.stages.job import Job

CHANCE = searching.CHANCE
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
  """Search, if a ranking needs it, prune, train and evaluate."""
  if not any(rankings.needs_search(b.ranking) for b in job.budgets):
    cut(job)
  else:
    if not (job.workdir / 'search' / 'gates.npz').exists():
      training.check(job)
    search(job)
  train(job)


MODES = {
  'search': search,
  'prune': cut,
  'probe': probing.run,
  'train': train,
  'run': run,
  'eval': evaluate,
  'info': info,
  'export': export,
}


def execute(
  mode: str,
  job: Job,
  out: pathlib.Path | None = None,
  formats: Sequence[str] = (),
) -> None:
  """Runs one of `MODES`.

  An export writes the formats, () for all, to the folder `out`, by default that
  of the budget.
  """
  job.say_unused_fields()
  if mode == 'export':
    export(job, out, formats)
  elif mode in ('eval', 'info'):  # They only read.
    MODES[mode](job)
  else:
    with runs.giving_back(job.workdir), storage.locked(job.workdir) as held:
      if not held:
        raise errors.UserError(
          f'{job.workdir} is in use by another process; wait for it, or give '
          'another --workdir.'
        )
      MODES[mode](job)
