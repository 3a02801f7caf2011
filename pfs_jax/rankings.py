"""The names of rankings: how channels of different layers are compared.

A name is a kind, for some kinds with a number behind it: `layer_mean`,
`cost0.5`, `tilt-0.4`. `profiles.scores` says what each kind does.
"""

from __future__ import annotations

import math

from pfs_jax import errors

# Kind -> whether a number follows: never, always, or where the default is not
# meant.
KINDS = {
  'global': 'never',
  'layer_mean': 'never',
  'cost': 'sometimes',
  'uniform': 'never',
  'random': 'never',
  'tilt': 'always',
  'blend': 'always',
  'survivors': 'never',
  'sensitivity': 'sometimes',
}
_SUFFIX = {'never': '', 'always': 'X', 'sometimes': '[X]'}
KNOWN = ', '.join(kind + _SUFFIX[number] for kind, number in KINDS.items())
# What a field with a ranking must be, X being a number.
RULE = f'a ranking ({KNOWN})'


def parse(name: str) -> tuple[str, float | None]:
  """(kind, number or None) of a ranking's name.

  >>> parse('tilt-0.4'), parse('cost'), parse('layer_mean')
  (('tilt', -0.4), ('cost', None), ('layer_mean', None))

  Raises:
    errors.UserError: The name is unknown, or a number is missing, too many or
      not finite.
  """
  kind = max((k for k in KINDS if name.startswith(k)), key=len, default='')
  text = name[len(kind) :]
  try:
    number = float(text) if text else None
  except ValueError:
    number = math.nan
  wanted = KINDS.get(kind)
  if (
    wanted is None
    or (wanted == 'always' and number is None)
    or (wanted == 'never' and text)
    or (number is not None and not math.isfinite(number))
  ):
    raise errors.UserError(f'the ranking must be {RULE}; got {name!r}.')
  return kind, number


def known(name: str) -> bool:
  """Whether a ranking has this name."""
  try:
    parse(name)
  except errors.UserError:
    return False
  return True
