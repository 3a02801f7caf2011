"""Reports: one HTML file of a run or a study (`python main.py --mode=report`).

    workdir/  report.html           report/ (its pictures, as SVG)
              report-<study>.html   report-<study>/

A report trains no network and reads no data set, and the same folder gives the
same bytes. `figures` draws, `page` fills page.html; `run_page`, `run_logs` and
`study_page` fill a page from the files.
"""

import pathlib

import ml_collections

from pfs_jax import console, stages, storage

PICTURES = """macs network probe tournament candidates gates search training
  mistakes accuracy differences varied shares similarity""".split()


def write(
  c: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  out: pathlib.Path | None = None,
) -> None:
  """Writes the report of the study or run of a config into `out`.

  The default of `out` is the workdir, which is otherwise only read.

  Raises:
    errors.UserError: If the workdir is empty, or belongs to another config.
  """
  # Imported here, because matplotlib takes a second to import.
  from pfs_jax.report import figures, run_page, study_page

  stem = f'report-{c.study}' if 'study' in c else 'report'
  with figures.style():
    if 'study' in c:
      report = study_page.build(c, workdir)
    else:
      report = run_page.build(stages.Job(c, workdir))
  if not storage.is_first_process():
    return
  page, folder = (out or workdir) / f'{stem}.html', (out or workdir) / stem
  for name in PICTURES:  # Those of an earlier report.
    (folder / f'{name}.svg').unlink(missing_ok=True)
  for name, svg in report.pictures.items():
    storage.write_bytes(folder / f'{name}.svg', svg)
  storage.write_text(page, report.html())
  console.say(
    f'{page} is written; its pictures ({len(report.pictures)}) are in {folder}.'
  )
