"""The page of a report: one HTML file that has no script and loads nothing.

Every text from a file or a config is escaped by `tables.escape`.
"""

import base64
import json
import pathlib
import string
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from pfs_jax import fields, tables
from pfs_jax.report import figures
from pfs_jax.tables import Table, escape

_PAGE = string.Template(pathlib.Path(__file__).with_suffix('.html').read_text())
_MOST_UNFOLDED = 24  # A table of more rows beside a picture is folded.
_ALT_ROWS = 12  # Rows of a table that are in its picture's alternative text.


class Page:
  """A page that grows from top to bottom.

  What is added before the first `section` stands above the table of contents.

  Args:
    title: The heading of the page.

  Attributes:
    pictures: {name: content of its SVG file}.
    captions: {name: what the picture shows}.
  """

  def __init__(self, title: str):
    self._title = title
    self._sections: list[tuple[str, list[str]]] = [('', [])]
    self._tables: set[str] = set()
    self.pictures: dict[str, bytes] = {}
    self.captions: dict[str, str] = {}

  def _add(self, html: str) -> None:
    self._sections[-1][1].append(html)

  def section(self, title: str) -> None:
    """Starts a section."""
    self._sections.append((title, []))

  def paragraph(self, text: str, kind: str = '') -> None:
    """Adds a paragraph; `kind` is its class in the style sheet."""
    self._add(f'<p class="{kind}">{escape(text)}</p>')

  def table(self, table: Table, folded: bool = False) -> None:
    """Adds a table unless it is empty; a folded one opens on a click."""
    if table.rows:
      self._add(self._table_html(table, folded))

  def _table_html(self, table: Table, folded: bool) -> str:
    self._tables.add(table.title)
    html, n = tables.html(*table), len(table.rows)
    return _details(f'{table.title} ({n} rows)', html) if folded else html

  def figure(
    self, name: str, caption: str, drawn: Any, *numbers: Table
  ) -> None:
    """Adds a picture with its caption and the numbers that it shows.

    Args:
      name: The stem of its file.
      caption: What it shows.
      drawn: The figure, drawn by `figures`.
      *numbers: The tables of its numbers. A table that is on the page already
        is linked, the others are added. Their first rows are its alternative
        text.
    """
    text = '; '.join(filter(None, map(_as_text, numbers)))
    alt = f'{caption} {text}.'
    self.pictures[name] = figures.svg(drawn, name, alt)
    self.captions[name] = caption
    links, beside = '', ''
    for table in numbers:
      if table.title in self._tables:
        anchor = tables.anchor(table.title)
        links += f' <a href="#{anchor}">Table: {escape(table.title)}</a>'
      else:
        beside += self._table_html(table, len(table.rows) > _MOST_UNFOLDED)
    data = base64.b64encode(self.pictures[name]).decode()
    width, height = (round(96 * inches) for inches in drawn.get_size_inches())
    self._add(
      f'<figure id="{escape(name)}">\n'
      f'<figcaption>{escape(caption)}{links}</figcaption>\n'
      f'<div>\n<img src="data:image/svg+xml;base64,{data}" width="{width}" '
      f'height="{height}" alt="{escape(alt)}">\n'
      f'<div>{beside}</div>\n</div>\n</figure>'
    )

  def config(self, run: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Adds the fields of `run` that are not the default, and `whole`."""
    rows, there = [], traverse_util.flatten_dict(dict(run), sep='.')
    for name, field in fields.BY_NAME.items():
      value, plain = json.dumps(there.get(name)), json.dumps(field.default)
      if name in there and (value != plain or name == 'seed'):
        rows.append([name, value, plain, field.doc])
    columns = ['field', 'value', 'default', 'meaning']
    self.table(Table('Fields that are not the default', columns, rows))
    text = escape(json.dumps(whole, indent=2, sort_keys=True))
    self._add(_details('The whole config', f'<pre>{text}</pre>'))

  def html(self) -> str:
    """The page as HTML."""
    (_, first), *rest = self._sections
    parts, links = '', ''
    for title, inner in rest:
      name = tables.anchor(title, 'part')
      links += f'<li><a href="#{name}">{escape(title)}</a></li>'
      body = '\n'.join([f'<h2 id="{name}">{escape(title)}</h2>', *inner])
      parts += f'<section aria-labelledby="{name}">\n{body}\n</section>\n'
    return _PAGE.substitute(
      title=escape(self._title),
      first='\n'.join(first),
      links=links,
      sections=parts,
    )


def _details(summary: str, html: str) -> str:
  return f'<details><summary>{escape(summary)}</summary>\n{html}\n</details>'


def _as_text(table: Table) -> str:
  """The first rows of a table as plain text.

  >>> _as_text(Table('CE', ['step', 'training'], [['10', '2.3'], ['20', '-']]))
  '10: training 2.3; 20: training -'
  """
  rows = []
  for name, *cells in table.rows[:_ALT_ROWS]:
    pairs = zip(table.columns[1:], cells, strict=True)
    rows.append(f'{name}: ' + ', '.join(f'{a} {b}' for a, b in pairs if b))
  more = len(table.rows) - len(rows)
  return '; '.join(rows) + f'; {more} more rows in the table' * bool(more > 0)
