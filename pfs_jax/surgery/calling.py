"""How a model is told whether it trains."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import flax.linen as nn

from pfs_jax import errors

# Names under which models are told whether to train: {name: value in training}.
NAMES = {
  'train': True,
  'training': True,
  'is_training': True,
  'deterministic': False,
  'use_running_average': False,
  'eval': False,
  'inference': False,
}


@dataclasses.dataclass(frozen=True)
class TrainArgument:
  """Calls a model that is told by an argument or a field whether it trains.

  Attributes:
    name: Name of the argument.
    when_training: Its value in training; the opposite is for evaluation.
    field: Whether it is a field of the module, not an argument of the call.
  """

  name: str
  when_training: bool
  field: bool = False

  def value(self, train: bool) -> bool:
    """What the argument is set to."""
    return self.when_training if train else not self.when_training

  def __call__(
    self, module: nn.Module, x: Any, *args: Any, train: bool, **kwargs: Any
  ) -> Any:
    """The module's output."""
    if not self.field:
      kwargs[self.name] = self.value(train)
    return module(x, *args, **kwargs)


def untold(
  module: nn.Module, x: Any, *args: Any, train: bool, **kwargs: Any
) -> Any:
  """Calls a model that does the same in training and in evaluation."""
  del train
  return module(x, *args, **kwargs)


def train_argument(model: nn.Module, name: str | None = None) -> TrainArgument:
  """How a model is told whether to train.

  Args:
    model: A Linen module.
    name: Name of the argument of `__call__` or of the field; None looks for
      one of `NAMES`, arguments first.

  Raises:
    errors.UserError: If there is none.
  """
  arguments = inspect.signature(type(model).__call__).parameters
  fields = [f.name for f in dataclasses.fields(model)]
  candidates = NAMES if name is None else [name]
  for is_field, there in ((False, arguments), (True, fields)):
    for known in candidates:
      if known in there:
        return TrainArgument(known, NAMES.get(known, True), is_field)
  known = ', '.join(NAMES) if name is None else repr(name)
  raise errors.UserError(
    f'surgery: {type(model).__name__} has no argument or field {known}; say '
    'how to call it with call=lambda module, x, train: ... (config.model.call)'
  )
