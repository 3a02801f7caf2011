"""Prints docs/config.md, which has a table for each section of the config.

python -m benchmarks.config_page > docs/config.md
"""

from pfs_jax import fields


def page() -> str:
  """The text of docs/config.md, with a table for each section."""
  lines = [_INTRODUCTION]
  section = None
  for field in fields.FIELDS:
    prefix, _, name = field.name.rpartition('.')
    if prefix != section:
      section = prefix
      title = f'config.{prefix}'.removesuffix('.')
      lines += [f'\n## `{title}`\n', '| field | default | must be | meaning |']
      lines += ['| --- | --- | --- | --- |']
    mark = '' if field.result else ' *'
    lines += [
      f'| `{name}`{mark} | `{field.default!r}` | `{field.rule}` | {field.doc} |'
    ]
  return '\n'.join(lines) + '\n'


_INTRODUCTION = """\
# The fields of a config

<!-- Written by `python -m benchmarks.config_page > docs/config.md`. -->

A config file sets a field (`c.search.epochs = 5.0`), and the command line
overrides it (`--config.search.epochs=5.0`). Fields that hold several values
are tuples: `--config.budget.keep=0.3,0.5`. A single number is a tuple of one
(`--config.budget.keep=0.5`), and `--config.budget.keep="()"` is empty.

A value that breaks its rule is refused before anything starts. Besides the
rules below, MACs and parameters must be below 2^63, other integers at most
2^32, and other numbers at most 1,000,000.

A workdir stores the values that its results depend on, and the program refuses
a command with other values. No result depends on the fields marked with *.
"""


if __name__ == '__main__':
  print(page(), end='')
