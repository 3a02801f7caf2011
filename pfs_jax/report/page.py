"""HTML of a report: one file, no script, nothing fetched.

The functions take plain text and give HTML; only those named `parts` and `html`
take HTML.
"""

from __future__ import annotations

import base64
import html as html_lib
import re
from collections.abc import Sequence

from pfs_jax.report import figures

# Pictures are drawn on white. In the dark they are turned around: white becomes
# the colour of the page, and hues stay.
_STYLE = """
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
h1, h2, p, td, figcaption, caption, summary, li { overflow-wrap: anywhere; }
p, figcaption { max-width: 46rem; }
.answer { font-size: 1.15rem; margin: 0.5rem 0; }
figcaption, .soft { color: var(--soft); font-size: 0.9rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; padding: 0;
  margin: 1rem 0 0; list-style: none; }
figure { margin: 1rem 0; }
figure > div { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: minmax(0, 1fr); }
figure img { display: block; width: 100%; max-width: 40rem; height: auto; }
@media (min-width: 62rem) {
  figure > div { grid-template-columns: minmax(0, 40rem) minmax(0, 1fr); }
}
.scroll { overflow-x: auto; max-width: 100%; margin: 0 0 1rem; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.25rem; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.6rem;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--band); }
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
"""

# Rows over which a table beside a picture is folded away.
_LONG = 24


def escape(text: str) -> str:
  """Text as HTML, also within an attribute."""
  return html_lib.escape(str(text))


def paragraph(text: str, kind: str = '') -> str:
  """A paragraph, of a class of the style sheet."""
  return f'<p{_class(kind)}>{escape(text)}</p>'


def _class(kind: str) -> str:
  return f' class="{kind}"' if kind else ''


def _is_number(text: str) -> bool:
  """Whether a cell is set to the right: a number, with its unit, or a gap."""
  pattern = r'[-+−]?[\d.,]+([ ±%/.+−-]|of|ms|min|[dhs]|\d)*|-|'
  return bool(re.fullmatch(pattern, text))


def table(
  caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
  """A table whose first column heads the rows.

  It scrolls by itself where the page is too narrow for it.
  """
  right = [
    i > 0 and all(_is_number(str(row[i])) for row in rows)
    for i in range(len(columns))
  ]
  kinds = [_class('n' if r else '') for r in right]
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
    first = re.sub(r'([/+])(?=\S)', r'\1<wbr>', escape(first))
    first = re.sub(r' (?=[\d.]+$)', '&nbsp;', first)
    body += f'<tr><th scope="row">{first}</th>{cells}</tr>\n'
  return (
    f'<div class="scroll" role="region" tabindex="0" '
    f'aria-label="{escape(caption)}">\n<table>\n'
    f'<caption>{escape(caption)}</caption>\n'
    f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>'
  )


def beside(
  caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> str:
  """A table to stand beside a picture, folded away if it is long."""
  html = table(caption, columns, rows)
  if len(rows) <= _LONG:
    return html
  return details(f'{caption} ({len(rows)} rows)', html)


def details(summary: str, *parts: str) -> str:
  """Parts that are folded away until asked for."""
  inner = '\n'.join(parts)
  return f'<details><summary>{escape(summary)}</summary>\n{inner}\n</details>'


def preformatted(text: str) -> str:
  """Text as it stands, long lines broken."""
  return f'<pre>{escape(text)}</pre>'


def figure(picture: figures.Picture, caption: str, html: str = '') -> str:
  """A picture, its caption, and beside it the numbers that it shows."""
  data = base64.b64encode(picture.svg).decode()
  width, height = picture.size
  image = (
    f'<img src="data:image/svg+xml;base64,{data}" width="{width}" '
    f'height="{height}" alt="{escape(picture.alt)}">'
  )
  return (
    f'<figure id="{escape(picture.name)}">\n'
    f'<figcaption>{escape(caption)}</figcaption>\n'
    f'<div>\n{image}\n<div>{html}</div>\n</div>\n</figure>'
  )


def section(title: str, *parts: str) -> tuple[str, str]:
  """(title, HTML) of a part of the page with a heading; parts are HTML."""
  name = _identifier(title)
  inner = '\n'.join(part for part in parts if part)
  return title, (
    f'<section aria-labelledby="{name}">\n'
    f'<h2 id="{name}">{escape(title)}</h2>\n{inner}\n</section>'
  )


def _identifier(title: str) -> str:
  return 'part-' + re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')


def document(
  title: str, answer: Sequence[str], sections: Sequence[tuple[str, str]]
) -> str:
  """The whole page.

  Args:
    title: What the report is about.
    answer: Parts of the first screen, HTML.
    sections: From `section`.
  """
  links = ''.join(
    f'<li><a href="#{_identifier(name)}">{escape(name)}</a></li>'
    for name, _ in sections
  )
  first = '\n'.join(part for part in answer if part)
  rest = '\n'.join(html for _, html in sections)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{first}
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{rest}
</main>
</body>
</html>
"""
