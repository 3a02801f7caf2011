"""The export stage: the trained network as files for other runtimes."""

from __future__ import annotations

import dataclasses
import pathlib

from pfs_jax import console, export, runs, storage
from pfs_jax.stages import cutting, training
from pfs_jax.stages.job import Job


def run(job: Job, out: pathlib.Path | None = None) -> None:
  """Writes the trained narrow network to `out`, checked; see `export.save`.

  By default `out` is the folder export/ of the workdir. The network computes in
  float32, whatever it was trained in. Its classes have the names that the data
  had when it was trained.
  """
  name, structure = cutting.read(job)
  state = training.restore(job, name, structure)[-1]
  folder = out or job.folder(name) / 'export'
  result = runs.read_result(job.folder(name) / 'result.json')
  if storage.is_first_process():
    manifest = export.save(
      folder,
      _float32(job).network.narrow(structure.counts),
      state.variables,
      dataclasses.replace(structure, model=job.network.description),
      dataclasses.replace(job.spec, class_names=tuple(result['class_names'])),
      factory=job.config.model.factory,
      measured={
        'test accuracy': f'{result["test_accuracy"]:.2%} of '
        f'{result["test_examples"]} images',
        'training steps': str(result['steps']),
      },
    )
    _show(folder, manifest)
  runs.barrier('export')


def _float32(job: Job) -> Job:
  if job.config.dtype == 'float32':
    return job
  c = job.config.copy_and_resolve_references()
  c.dtype = 'float32'
  return Job(c, job.workdir)


def _show(folder, manifest) -> None:
  console.table(
    f'Exported to {folder}',
    ['file', 'bytes', 'largest error', 'allowed'],
    [
      [
        entry['file'],
        f'{entry["bytes"]:,}',
        f'{entry["max_error"]:.1e}',
        f'{entry["tolerance"]:.0e}',
      ]
      for entry in manifest['formats'].values()
    ],
  )
