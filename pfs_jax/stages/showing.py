"""What a finished run shows, and `--mode=info`."""

from __future__ import annotations

from pfs_jax import console, costs, profiles, prune, runs, storage
from pfs_jax.stages.job import Job


def show(job: Job, name: str, structure: prune.Structure) -> None:
  """The closing tables."""
  result = runs.read_result(job.folder(name) / 'result.json')
  network, model = job.network, job.network.cost_model
  searched = (model.macs(model.widths), model.params(model.widths))
  reference = (network.reference_macs, network.reference_params)

  def row(label, macs, params, accuracy):
    shown = '-' if accuracy is None else f'{accuracy:.2%}'
    share = f'{macs / network.reference_macs:.1%}'
    return [label, f'{macs:,}', share, f'{params:,}', shown]

  console.table(
    f'Channels kept ({name})',
    ['layer', 'searched', 'kept', 'share'],
    [
      [layer, str(width), str(count), f'{count / width:.0%}']
      for layer, width, count in zip(
        model.layers, model.widths, structure.counts, strict=True
      )
    ],
  )
  console.table(
    f'{job.workdir}: {job.model_name} on {job.config.data.name}, seed '
    f'{job.config.seed}, {console.duration(result["seconds"])} of training',
    ['network', 'MACs', 'of reference', 'parameters', 'test accuracy'],
    [
      row('reference', *reference, result['reference_test_accuracy']),
      row('searched', *searched, None),
      row('narrow', result['macs'], result['params'], result['test_accuracy']),
    ],
  )


def info(job: Job) -> None:
  """Layers, MACs, parameters and floors; reads no data, trains nothing."""
  network, model = job.network, job.network.cost_model
  total = model.macs(model.widths)
  if job.config.model.factory:
    console.say(str(network.table))
  rows = []
  for op in model.ops:
    if op.kind != 'norm':
      rows.append(_info_row(op, model, total))
  console.table(
    f'{job.model_name}, searched network',
    [
      'layer',
      'kind',
      'output',
      'channels',
      'MACs',
      'share',
      'parameters',
      'share',
      'group',
    ],
    rows,
  )
  _info_totals(job, network, model, total)
  probe = job.workdir / 'probe.json'
  if probe.exists():
    console.say(storage.read_json(probe, profiles.Probe)['sentence'])
  else:
    console.say('--mode=probe tells which layers are out of proportion.')


def _info_row(op: costs.Layer, model: costs.CostModel, total: int) -> list[str]:
  """One layer; its group is the one that it makes, if it makes only that."""
  inputs, outputs = op.channels(model.widths)
  macs, params = op.macs(model.widths), op.params(model.widths)
  group = model.layers[op.makes[0][0]] if op.makes[0][0] >= 0 else ''
  return [
    op.path,
    op.kind,
    'x'.join(map(str, op.output_size)) or '1',
    f'{inputs} -> {outputs}',
    f'{macs:,}',
    f'{macs / total:.1%}',
    f'{params:,}',
    f'{params / model.params(model.widths):.1%}',
    group,
  ]


def _info_totals(job: Job, network, model, total: int) -> None:
  rows = [
    [
      'reference network',
      f'{network.reference_macs:,}',
      '100.0%',
      f'{network.reference_params:,}',
    ]
  ]

  def row(label, counts):
    macs, params = model.macs(counts), model.params(counts)
    share = f'{macs / network.reference_macs:.1%}'
    return [label, f'{macs:,}', share, f'{params:,}']

  rows.append(row('searched network', model.widths))
  for multiple in (1, 8, 16):
    least = prune.Budget(round_to=multiple).least(model)
    rows.append(row(f'floor, multiples of {multiple}', least))
  for budget in job.budgets:
    if budget.max_latency_ms is not None:
      rows.append([f'budget {budget.name}', 'measured when cut', '', ''])
      continue
    try:
      budget.check(model)
      rows.append([f'budget {budget.name}', 'can be met', '', ''])
    except prune.Infeasible as e:
      rows.append([f'budget {budget.name}', f'floor {e.floor:,}', '', ''])
  console.table('Totals', ['', 'MACs', 'of reference', 'parameters'], rows)
