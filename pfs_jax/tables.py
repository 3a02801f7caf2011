"""One table, and what it looks like in Markdown and in HTML.

`console.table` is the third writer; it prints to the terminal.
"""

import html as html_lib
import re
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
  """A table of text; each writer takes the three fields: `markdown(*table)`.

  Attributes:
    title: What the table shows.
    columns: The heading of each column; the first column names the rows.
    rows: The cells, as many in each row as there are columns.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[str]]


def markdown(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
  r"""A table in Markdown, with all columns but the first right-aligned.

  >>> print(markdown('', ['layer', 'kept'], [['a|b', '8']]))
  | layer | kept |
  | --- | ---: |
  | a\|b | 8 |
  """
  rule = ['---', *['---:'] * (len(columns) - 1)]
  cells = [[cell.replace('|', '\\|') for cell in row] for row in rows]
  lines = ['| ' + ' | '.join(row) + ' |' for row in [columns, rule, *cells]]
  return '\n'.join([f'**{title}**', ''] * bool(title) + lines)


def html(
  title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
  """A table in HTML whose first column names the rows; all text is escaped.

  It scrolls by itself where the page is too narrow for it.
  """
  numbers = [
    all(is_number(row[i]) for row in rows) for i in range(len(columns))
  ]
  kinds = ['', *(f' class="{"n" if n else "text"}"' for n in numbers[1:])]
  head = ''.join(
    f'<th scope="col"{kind}>{escape(column)}</th>'
    for kind, column in zip(kinds, columns, strict=True)
  )
  body = ''
  for first, *rest in rows:
    cells = ''.join(
      f'<td{kind}>{escape(cell)}</td>'
      for kind, cell in zip(kinds[1:], rest, strict=True)
    )
    # Long names of layers and arms may be broken here, and nowhere else.
    name = re.sub(r'([/+_])(?=\S)', r'\1<wbr>', escape(first))
    kind = ' class="short"' if len(first) <= 24 else ''
    body += f'<tr><th scope="row"{kind}>{name}</th>{cells}</tr>\n'
  return (
    f'<div class="scroll" role="region" tabindex="0" '
    f'aria-label="{escape(title)}">\n<table id="{anchor(title)}">\n'
    f'<caption>{escape(title)}</caption>\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>'
  )


def escape(text: str) -> str:
  """Text as HTML, also inside an attribute.

  >>> escape('<script>"')
  '&lt;script&gt;&quot;'
  """
  return html_lib.escape(str(text))


def anchor(title: str, kind: str = 'table') -> str:
  """The id of a titled part of a page.

  >>> anchor('Test accuracy in %')
  'table-test-accuracy-in'
  """
  return f'{kind}-' + re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')


def is_number(text: str) -> bool:
  """Whether a cell is right-aligned: a number with its unit, or no value.

  >>> [is_number(x) for x in ('1,234', '+0.12', '45 ms', '-', 'conv1')]
  [True, True, True, True, False]
  """
  pattern = r'[-+−]?[\d.,]+([ ±%/.+−()-]|of|ms|min|[dhskMG]|B|\d)*|-|'
  return bool(re.fullmatch(pattern, text))
