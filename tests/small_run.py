"""The run that many tests share: a ResNet-8 of tiny widths on digits.

The fixtures `finished_run` and `finished` (conftest.py) hold its workdir.
"""

import pathlib

import ml_collections

from configs import digits

FIELDS = {
  'model.name': 'resnet8',
  'model.base_width': 4,
  'model.width': 6,
  'search.epochs': 2,
  'train.epochs': 2,
  'train.reference': False,
  'checkpoint_steps': 8,
  'log_steps': 4,
}


def dotted(fields: dict) -> dict:
  """Fields with `__` for the dot, as in train__epochs=1, with the dot."""
  return {name.replace('__', '.'): value for name, value in fields.items()}


def config(**more) -> ml_collections.ConfigDict:
  """Its config, with more fields as `dotted` takes them."""
  c = digits.get_config()
  c.update_from_flattened_dict({**FIELDS, **dotted(more)})
  return c


def arguments(mode: str, workdir: pathlib.Path, *more: str) -> list[str]:
  """Its command line after `python`; more arguments win."""
  return [
    'main.py',
    '--config=configs/digits.py',
    f'--mode={mode}',
    f'--workdir={workdir}',
    *(f'--config.{name}={value}' for name, value in FIELDS.items()),
    *more,
  ]
