"""The page of a report: one HTML file without a script that fetches nothing.

Every text from a file or a config passes `tables.escape`.
"""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Mapping
from typing import Any

from pfs_jax import fields, tables
from pfs_jax.report import figures
from pfs_jax.tables import Table, escape

# Pictures are drawn on white. On a dark page they are inverted: white becomes
# the colour of the page, and hues stay. The hint that a table scrolls is shown
# while there is something to scroll to.
_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #555;
  --line: #c8c8c8; --band: #f3f3f3; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a1a; --ink: #eee; --soft: #b5b5b5; --line: #555;
    --band: #262626; --link: #8ab4f8; }
  img { filter: invert(0.898) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.25rem 0 0.75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem;
  border-top: 1px solid var(--line); }
h1, h2, p, td, figcaption, summary, li { overflow-wrap: anywhere; }
p, figcaption { max-width: 46rem; }
.answer { font-size: 1.15rem; margin: 0.5rem 0; }
.warning { border-left: 4px solid #d55e00; padding-left: 0.75rem; }
figcaption, .soft { color: var(--soft); font-size: 0.9rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; padding: 0;
  margin: 1rem 0 0; list-style: none; }
figure { margin: 1rem 0; }
figure > div { display: flex; flex-wrap: wrap; gap: 1rem; }
figure > div > * { max-width: 100%; }
figure img { width: 38rem; height: auto; align-self: flex-start; }
.scroll { overflow-x: auto; max-width: 100%; margin: 0 0 1rem; }
.scroll:focus-visible { outline: 2px solid var(--link); }
.scroll::before { content: 'more columns: scroll sideways \\2192';
  display: block; width: max-content; position: sticky; left: 0; height: 0;
  overflow: hidden; font-size: 0.85rem; font-weight: 600; color: var(--link);
  animation: hint linear; animation-timeline: scroll(nearest inline); }
@keyframes hint { 0%, 90% { height: 1.5em; } 100% { height: 1.5em; } }
table { border-collapse: collapse; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.25rem; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.6rem;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; position: sticky; left: 0;
  background: var(--page); max-width: 45vw; overflow-wrap: break-word; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
tbody tr:nth-child(even) > * { background: var(--band); }
pre { background: var(--band); padding: 0.75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 0.85rem; }
summary { cursor: pointer; padding: 0.25rem 0; }
@media (max-width: 30rem) {
  body { padding: 0.75rem; }
  h1 { font-size: 1.35rem; }
  .answer { font-size: 1.05rem; }
  th, td { padding: 0.2rem 0.4rem; }
}
@media print { details > * { display: block; } }
</style>
</head>
<body>
<header>
<h1>$title</h1>
$first
<nav aria-label="Contents"><ul>$links</ul></nav>
</header>
<main>
$sections
</main>
</body>
</html>
""")
_LONG = 24  # Tables with more rows are folded away.


class Page:
  """A page that grows from top to bottom.

  What is added before the first `section` stands above the table of contents.

  Args:
    title: The heading of the page.

  Attributes:
    pictures: The pictures so far.
  """

  def __init__(self, title: str):
    self._title = title
    self._sections: list[tuple[str, list[str]]] = [('', [])]
    self.pictures: list[figures.Picture] = []

  def _add(self, html: str) -> None:
    self._sections[-1][1].append(html)

  def section(self, title: str) -> None:
    """Starts a section."""
    self._sections.append((title, []))

  def paragraph(self, text: str, kind: str = '') -> None:
    """Adds a paragraph of a class of the style sheet."""
    self._add(f'<p class="{kind}">{escape(text)}</p>')

  def table(self, *table: Any) -> None:
    """Adds the table of a title, columns and rows."""
    self._add(tables.html(*table))

  def folded(self, table: Table) -> None:
    """Adds a table that opens on a click."""
    self._add(_folded(table))

  def figure(
    self,
    picture: figures.Picture,
    *beside: Table,
    numbers: str = '',
  ) -> None:
    """Adds a picture with its caption and the numbers that it shows.

    Args:
      picture: The picture.
      *beside: The tables of its numbers; long ones are folded.
      numbers: The title of a table elsewhere on the page that has them.
    """
    self.pictures.append(picture)
    data = base64.b64encode(picture.svg).decode()
    width, height = picture.size
    shown = [
      _folded(t) if len(t.rows) > _LONG else tables.html(*t) for t in beside
    ]
    caption = escape(picture.caption)
    if numbers:
      anchor = tables.anchor(numbers)
      caption += f' <a href="#{anchor}">Table: {escape(numbers)}</a>'
    self._add(
      f'<figure id="{escape(picture.name)}">\n'
      f'<figcaption>{caption}</figcaption>\n'
      f'<div>\n<img src="data:image/svg+xml;base64,{data}" width="{width}" '
      f'height="{height}" alt="{escape(picture.alt)}">\n'
      f'<div>{"".join(shown)}</div>\n</div>\n</figure>'
    )

  def config(self, run: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Adds what a run's config changes, and a config as a whole, folded."""
    rows = []
    for field in fields.FIELDS:
      section, _, name = field.name.rpartition('.')
      there = run.get(section, {}) if section else run
      value, plain = json.dumps(there.get(name)), json.dumps(field.default)
      if name in there and (value != plain or name == 'seed'):
        rows.append([field.name, value, plain, field.doc])
    columns = ['field', 'value', 'default', 'meaning']
    self.table('Fields that are not the default', columns, rows)
    text = escape(json.dumps(whole, indent=2, sort_keys=True))
    self._add(_details('The whole config', f'<pre>{text}</pre>'))

  def html(self) -> str:
    """The page as it is."""
    (_, first), *rest = self._sections
    parts, links = [], []
    for title, inner in rest:
      name = tables.anchor(title, 'part')
      links.append(f'<li><a href="#{name}">{escape(title)}</a></li>')
      heading = f'<h2 id="{name}">{escape(title)}</h2>'
      body = '\n'.join([heading, *inner])
      parts.append(f'<section aria-labelledby="{name}">\n{body}\n</section>')
    return _PAGE.substitute(
      title=escape(self._title),
      first='\n'.join(first),
      links=''.join(links),
      sections='\n'.join(parts),
    )


def _details(summary: str, html: str) -> str:
  return f'<details><summary>{escape(summary)}</summary>\n{html}\n</details>'


def _folded(table: Table) -> str:
  return _details(
    f'{table.title} ({len(table.rows)} rows)', tables.html(*table)
  )
