"""Reports: one HTML file of a run or a study (`python main.py --mode=report`).

    workdir/  report.html           report/ (its pictures as .svg and .png)
              report-<study>.html   report-<study>/

Nothing is trained, no data set is read, and the same folder gives the same
bytes. `figures` draws, `page` writes HTML, `run_page` and `study_page` say what
there is to tell.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import ml_collections

from pfs_jax import console, stages, storage

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

  _save(job.workdir, 'report', *run_page.build(job))


def study(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes the report of a study, from the cells that are finished.

  Raises:
    errors.UserError: If none is.
  """
  from pfs_jax.report import study_page  # matplotlib: only where it is used.

  _save(workdir, f'report-{c.study}', *study_page.build(c, workdir))


def _save(
  workdir: pathlib.Path,
  stem: str,
  html: str,
  pictures: list[figures.Picture],
) -> None:
  """Writes the pictures, in place of those of an earlier report; the page."""
  if not storage.is_first_process():
    return
  folder, page = workdir / stem, workdir / f'{stem}.html'
  folder.mkdir(parents=True, exist_ok=True)
  files = {f'{p.name}.svg': p.svg for p in pictures}
  files |= {f'{p.name}.png': p.png for p in pictures}
  for old in folder.iterdir():
    if old.suffix in ('.svg', '.png') and old.name not in files:
      old.unlink()
  for name, content in files.items():
    (folder / name).write_bytes(content)
  storage.write_text(page, html)
  console.say(
    f'{page} is written, and its {len(pictures)} pictures (SVG, PNG) in '
    f'{folder}.'
  )
