"""The fields of a config, read from the table fields.txt.

The table holds each field's name, its default (that of the paper's CIFAR-10
runs), its rule and its meaning. docs/config.md is made from it, by
benchmarks/config_page.py.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from pfs_jax import rankings


def _all_hold(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda vs: all(holds(v) and not isinstance(v, bool) for v in vs)


# {what the value must be: test}.
_RULES: dict[str, Callable[[Any], bool]] = {
  'a text': lambda v: isinstance(v, str),
  'True or False': lambda v: isinstance(v, bool),
  '> 0': lambda v: v > 0,
  '>= 0': lambda v: v >= 0,
  '>= 1': lambda v: v >= 1,
  '>= 2': lambda v: v >= 2,
  '>= -1': lambda v: v >= -1,
  'an integer >= 0': lambda v: v >= 0 and v == int(v),
  'in [0, 1]': lambda v: 0 <= v <= 1,
  'in [0, 1)': lambda v: 0 <= v < 1,
  'in [0, 10]': lambda v: 0 <= v <= 10,
  'in (0, 10]': lambda v: 0 < v <= 10,
  'in [0, 2**32)': lambda v: 0 <= v < 2**32,
  rankings.RULE: rankings.known,
  'texts': _all_hold(lambda v: isinstance(v, str)),
  'numbers > 0': _all_hold(lambda v: v > 0),
  'integers >= 1': _all_hold(lambda v: v >= 1 and v == int(v)),
  'shares in (0, 1]': _all_hold(lambda v: 0 < v <= 1),
  'shares in [0, 1]': _all_hold(lambda v: 0 <= v <= 1),
}


@dataclasses.dataclass(frozen=True)
class Field:
  """One field, with a dotted name such as 'search.epochs'.

  `rule` is a key of the rules above or 'one of a, b', and `result` says whether
  results depend on the field.
  """

  name: str
  default: Any
  rule: str
  doc: str
  result: bool

  def broken(self, value: Any) -> str:
    """The rule that a value breaks, or ''.

    >>> BY_NAME['train.epochs'].broken(0.0)
    '> 0'
    >>> BY_NAME['train.epochs'].broken(1e308)
    '<= 1000000'
    """
    if isinstance(value, list) and isinstance(self.default, tuple):
      return f'a tuple of {self.rule}'
    entries = value if isinstance(value, tuple) else (value,)
    try:
      if not self._holds(value) or any(v != v for v in entries):
        return self.rule
    except (TypeError, ValueError, OverflowError):
      return self.rule
    numbers = [v for v in entries if isinstance(v, int | float)]
    return f'<= {self._most}' if max(numbers, default=0) > self._most else ''

  def _holds(self, value: Any) -> bool:
    if self.rule.startswith('one of '):
      return value in self.rule.removeprefix('one of ').split(', ')
    return _RULES[self.rule](value)

  @property
  def _most(self) -> int:
    """The largest value allowed."""
    if 'integer' in self.rule:
      return 2**63 - 1
    return 2**32 if isinstance(self.default, int) else 10**6


def _read(path: pathlib.Path) -> tuple[Field, ...]:
  fields = []
  for line in path.read_text('utf-8').splitlines():
    if line and not line.startswith('#'):
      name, default, rule, doc = line.split(' | ')
      plain = name.removesuffix('*')
      value = ast.literal_eval(default)
      fields.append(Field(plain, value, rule, doc, plain == name))
  return tuple(fields)


FIELDS = _read(pathlib.Path(__file__).with_name('fields.txt'))
BY_NAME = {field.name: field for field in FIELDS}
