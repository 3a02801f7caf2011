"""The names of rankings: how channels of different layers are compared.

A name is a kind, followed by a number for some kinds: `layer_mean`, `cost0.5`,
`tilt-0.4`. `scores.ranked` says what each kind does.
"""

import re

from pfs_jax import errors

_NUMBER = r'-?\d(\.\d+)?'
_NAME = re.compile(
  r'(global|layer_mean|uniform|random|survivors)'
  rf'|blend{_NUMBER}|(tilt|cost|sensitivity)({_NUMBER})?'
)
KNOWN = (
  'global, layer_mean, uniform, random, survivors, blendX, tilt[X], cost[X], '
  'sensitivity[X]'
)
# What a field with a ranking must be.
RULE = f'a ranking ({KNOWN}; -10 < X < 10)'


def known(name: str) -> bool:
  """Whether a ranking has this name."""
  return _NAME.fullmatch(name) is not None


def needs_search(name: str) -> bool:
  """Whether a ranking is one of gates that a search has learned."""
  return parse(name)[0] not in ('uniform', 'random', 'tilt', 'sensitivity')


def parse(name: str) -> tuple[str, float | None]:
  """(kind, number or None) of a ranking's name.

  >>> parse('tilt-0.4'), parse('cost'), parse('layer_mean')
  (('tilt', -0.4), ('cost', None), ('layer_mean', None))

  Raises:
    errors.UserError: No ranking has this name.
  """
  if not known(name):
    raise errors.UserError(f'the ranking must be {RULE}; got {name!r}.')
  kind = name.rstrip('-.0123456789')
  number = name.removeprefix(kind)
  return kind, float(number) if number else None
