"""The tables at the end of a run, and those of `--mode=info`."""

import contextlib
import dataclasses
from collections.abc import Sequence

from pfs_jax import config, console, costs, errors, prune, runs, scores, storage
from pfs_jax.stages.job import Job


def _cost_row(job: Job, label: str, macs: int, params: int) -> list[str]:
  """A row with the costs of a network and its share of the reference's MACs."""
  share = macs / job.network.reference_macs
  return [label, f'{macs:,}', f'{share:.1%}', f'{params:,}']


def show(job: Job, name: str, structure: prune.Structure) -> None:
  """Prints the tables at the end of a run."""
  result = runs.read_result(job.folder(name) / 'result.json')
  network, model = job.network, job.network.cost_model
  searched = (model.macs(model.widths), model.params(model.widths))
  reference = (network.reference_macs, network.reference_params)
  triples = zip(model.layers, model.widths, structure.counts, strict=True)
  rows = [
    [layer, str(width), str(count), f'{count / width:.0%}']
    for layer, width, count in triples
  ]
  columns = ['layer', 'searched', 'kept', 'share']
  won = structure.source.get('tournament')
  if isinstance(won, dict):  # The name is that of the config's ranking.
    name += f', the widths of {won.get("chosen")!r} by a tournament'
  console.table(f'Channels kept ({name})', columns, rows)
  narrow = _cost_row(job, 'narrow', result['macs'], result['params'])
  accuracy = result['reference_test_accuracy']
  shown = '-' if accuracy is None else f'{accuracy:.2%}'
  console.table(
    f'{job.workdir}: {job.model_name} on {job.spec.name}, seed '
    f'{job.config.seed}, {console.duration(result["seconds"])} of training',
    ['network', 'MACs', 'of reference', 'parameters', 'test accuracy'],
    [
      [*_cost_row(job, 'reference', *reference), shown],
      [*_cost_row(job, 'searched', *searched), '-'],
      [*narrow, f'{result["test_accuracy"]:.2%}'],
    ],
  )


def info(job: Job) -> None:
  """Prints layers, MACs, parameters and floors, without data or training."""
  model = job.network.cost_model
  if job.config.model.factory:
    console.say(str(job.network.table))
  columns = ['layer', 'kind', 'output', 'channels', 'MACs', 'share']
  console.table(
    f'{job.model_name}, searched network',
    [*columns, 'parameters', 'share', 'group'],
    [_layer_row(op, model) for op in model.ops if op.kind != 'norm'],
  )
  columns = ['', 'MACs', 'of reference', 'parameters']
  console.table('Totals', columns, _total_rows(job))
  path = job.workdir / 'probe.json'
  said = '--mode=probe shows which layers are out of proportion.'
  if path.exists():
    found = storage.read_json(path, scores.Probe)
    with contextlib.suppress(errors.UserError):  # It is of another config.
      runs.claim_part(path.with_name('probe'), config.identity(job.config))
      said = found['sentence']
  console.say(said)


def _layer_row(op: costs.Layer, model: costs.CostModel) -> list[str]:
  """The row of a layer, with the groups of the channels that it makes."""
  inputs, outputs = op.channels(model.widths)
  macs, params = op.macs(model.widths), op.params(model.widths)
  groups = [model.layers[i] for i, _ in op.makes if i != costs.FIXED]
  return [
    op.path,
    op.kind,
    'x'.join(map(str, op.output_size)) or '1',
    f'{inputs} -> {outputs}',
    f'{macs:,}',
    f'{macs / model.macs(model.widths):.1%}',
    f'{params:,}',
    f'{params / model.params(model.widths):.1%}',
    ', '.join(groups),
  ]


def _total_rows(job: Job) -> list[list[str]]:
  """Rows: the costs of both networks, the floors, which budgets can be met."""
  network, model = job.network, job.network.cost_model

  def row(label: str, counts: Sequence[int]) -> list[str]:
    return _cost_row(job, label, model.macs(counts), model.params(counts))

  reference = (network.reference_macs, network.reference_params)
  rows = [_cost_row(job, 'reference network', *reference)]
  rows.append(row('searched network', model.widths))
  for multiple in (1, 8, 16):
    budget = dataclasses.replace(job.budgets[0], round_to=multiple)
    least = budget.least(model)
    rows.append(row(f'floor, multiples of {multiple}', least))
  for budget in job.budgets:
    said = 'can be met'
    try:
      if budget.max_latency_ms is None:
        budget.check(model)
      else:
        said = 'measured when cut'
    except prune.Infeasible as e:
      said = f'floor {e.floor:,}'
    rows.append([f'budget {budget.name}', said, '', ''])
  return rows
