"""The export stage: the trained network as files for other runtimes."""

import dataclasses
import pathlib
from collections.abc import Sequence

import ml_collections

from pfs_jax import console, export, runs, storage
from pfs_jax.stages import cutting, training
from pfs_jax.stages.job import Job


def run(
  job: Job, out: pathlib.Path | None = None, formats: Sequence[str] = ()
) -> None:
  """Writes the trained narrow network to `out`, with checks; see `export.save`.

  By default `out` is the folder export/ of the budget, and the formats are all
  that are possible. The network computes in float32, whatever the dtype of its
  training. Its class names and its normalisation are those of the training.
  """
  name, structure = cutting.read(job)
  state = training.restore(job, name, structure)[-1]
  folder = out or job.folder(name) / 'export'
  result = runs.read_result(job.folder(name) / 'result.json')
  spec = dataclasses.replace(
    job.spec,
    class_names=tuple(result['class_names']),
    mean=tuple(result.get('mean', job.spec.mean)),  # Older ones lack them.
    std=tuple(result.get('std', job.spec.std)),
  )
  c = job.config.copy_and_resolve_references()
  c.dtype = 'float32'
  if storage.is_first_process():
    accuracy = f'{result["test_accuracy"]:.2%}'
    manifest = export.save(
      folder,
      Job(c, job.workdir).network.narrow(structure.counts),
      state.variables,
      dataclasses.replace(structure, model=job.network.description),
      spec,
      formats=formats or _possible(job.config.model),
      factory=job.config.model.factory,
      measured={
        'test accuracy': f'{accuracy} of {result["test_examples"]} images',
        'training steps': str(result['steps']),
      },
    )
    rows = []
    for entry in manifest['formats'].values():
      error, limit = f'{entry["max_error"]:.1e}', f'{entry["tolerance"]:.0e}'
      rows.append([entry['file'], f'{entry["bytes"]:,}', error, limit])
    columns = ['file', 'bytes', 'largest error', 'allowed']
    console.table(f'Exported to {folder}', columns, rows)
  runs.barrier('export')


def _possible(model: ml_collections.ConfigDict) -> list[str]:
  """The formats of a model: safetensors need one that its factory describes."""
  code = [f'config.model.{k}' for k in ('call', 'norm', 'conv') if model[k]]
  if not code:
    return list(export.FORMATS)
  console.note(
    f'no safetensors file: its reader does not accept {", ".join(code)}. Let '
    'the factory return (module, call) and register its classes instead.'
  )
  return [name for name in export.FORMATS if name != 'safetensors']
