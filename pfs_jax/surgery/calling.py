"""How a call tells a model whether it trains."""

import dataclasses
import inspect
from typing import Any

import flax.linen as nn

# Arguments that tell models whether they train: {name: value in training}.
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
  """Calls a model, and tells it by an argument or a field whether it trains.

  Attributes:
    name: One of `NAMES`, or '' if the model has none of them.
    field: Whether it names a field of the module, not an argument of the call.
  """

  name: str
  field: bool = False

  def value(self, train: bool) -> bool:
    """The value that says whether the model trains."""
    return NAMES[self.name] == train

  def __call__(
    self, module: nn.Module, x: Any, *args: Any, train: bool, **kwargs: Any
  ) -> Any:
    """The module's output."""
    if self.name and not self.field:
      kwargs[self.name] = self.value(train)
    return module(x, *args, **kwargs)


def train_argument(model: nn.Module) -> TrainArgument:
  """The way to tell a model whether it trains; arguments before fields."""
  arguments = inspect.signature(type(model).__call__).parameters
  fields = [f.name for f in dataclasses.fields(model)]
  for is_field, there in ((False, arguments), (True, fields)):
    for name in NAMES:
      if name in there:
        return TrainArgument(name, is_field)
  return TrainArgument('')
