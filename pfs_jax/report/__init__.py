"""Reports: one HTML file of a run or a study (`python main.py --mode=report`).

    workdir/  report.html  report/ (the same pictures as .svg and .png)

Nothing is trained, no data set is read, and the same folder gives the same
bytes. `figures` draws, `page` writes HTML, `run_page` and `study_page` say what
there is to tell.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import ml_collections

from pfs_jax import console, runs, stages

if TYPE_CHECKING:
  from pfs_jax.report import figures


def write(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Reports on the study or run that a config is of."""
  if 'study' in c:
    study(c, workdir)
  else:
    run(stages.Job(c, workdir))


def run(job: stages.Job) -> None:
  """Writes the report of a run, as far as the run has come.

  Raises:
    errors.UserError: If the workdir holds nothing, or another config's work.
  """
  from pfs_jax.report import run_page  # matplotlib: only where it is used.

  _save(job.workdir, *run_page.build(job))


def study(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes the report of a study, from the cells that are finished.

  Raises:
    errors.UserError: If none is.
  """
  from pfs_jax.report import study_page  # matplotlib: only where it is used.

  _save(workdir, *study_page.build(c, workdir))


def _save(
  workdir: pathlib.Path, html: str, pictures: list[figures.Picture]
) -> None:
  """Writes the pictures, then the page."""
  if not runs.is_first_process():
    return
  folder = workdir / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  for picture in pictures:
    (folder / f'{picture.name}.svg').write_bytes(picture.svg)
    (folder / f'{picture.name}.png').write_bytes(picture.png)
  runs.write_text(workdir / 'report.html', html)
  console.say(
    f'{workdir / "report.html"} is written, and its {len(pictures)} pictures '
    f'(SVG, PNG) in {folder}.'
  )
