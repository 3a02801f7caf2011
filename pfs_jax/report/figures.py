"""Pictures of a report, drawn by matplotlib as SVG, without a screen.

The parts of each picture differ not only in colour, but also in marker, hatch,
line style or label. Pictures are narrow enough (4.8 inches) to be read on a
phone. The same numbers give the same bytes. Draw them inside `style`.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure as mpl_figure

_WIDTH = 4.8  # Inches.
_STYLE: dict[Any, Any] = {
  'svg.hashsalt': 'pfs_jax',
  'svg.fonttype': 'path',
  'text.parse_math': False,  # A name may hold a '$'.
  'font.family': 'DejaVu Sans',
  'font.size': 9,
  'axes.labelsize': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'axes.grid': True,
  'grid.color': '#dddddd',
  'grid.linewidth': 0.6,
  'legend.frameon': False,
  'legend.fontsize': 8.5,
  'hatch.linewidth': 0.6,
  'savefig.facecolor': 'white',
}
# Okabe and Ito's colours; they differ in lightness too.
_BLUE, _GREY, _BLACK = '#0072b2', '#767676', '#1a1a1a'
_COLOURS = (_BLUE, '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
_MARKERS = 'osD^vPX*<>hp'
_LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_HATCHES = ('////', '....', 'xxxx')
_DIAMONDS = {  # {filled: how an interval is drawn}.
  True: {'color': _BLUE, 'markersize': 5.5},
  False: {'color': _GREY, 'markersize': 5.5, 'markerfacecolor': 'white'},
}


class Line(NamedTuple):
  """A line with a label in the legend; a single point is a marker.

  `error` is the length of the error bars, up and down from each point.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  error: Sequence[float] | None = None


class Interval(NamedTuple):
  """A row with a diamond at a mean, error bars around it, and single values.

  `error` is the length of each bar. `dots` are drawn as circles; `filled` says
  whether the diamond is filled.
  """

  label: str
  mean: float
  error: float
  dots: Sequence[float] = ()
  filled: bool = True


@contextlib.contextmanager
def style() -> Iterator[None]:
  """The context in which pictures are drawn and written."""
  with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
    # Letters that the font lacks become boxes; the tables have the names.
    warnings.filterwarnings('ignore', 'Glyph')
    yield


def svg(drawn: mpl_figure.Figure, title: str, description: str) -> bytes:
  """The content of a picture's file."""
  content = io.BytesIO()
  about = {'Date': None, 'Title': title, 'Description': description}
  drawn.savefig(content, format='svg', metadata=about)
  return re.sub(rb'[\x00-\x08\x0b\x0c\x0e-\x1f]', b'', content.getvalue())


def _figure(height: float, rows: int = 1, columns: int = 1) -> Any:
  """An empty figure of this height in inches, and its grid of axes."""
  drawn = mpl_figure.Figure((_WIDTH, height), layout='constrained')
  return drawn, drawn.subplots(rows, columns, sharex=True, squeeze=False)


def _row_figure(labels: Sequence[str]) -> Any:
  """A figure with a row for each label, its axes, and the rows' places."""
  drawn, ((axes,),) = _figure(1.1 + 0.23 * len(labels))
  places = np.arange(len(labels))
  labels = [_shortened(label, 50) for label in labels]
  axes.set_yticks(places, labels, fontsize=8 if len(labels) <= 24 else 7)
  axes.set_ylim(len(labels) - 0.4, -0.6)
  axes.tick_params(axis='y', length=0)
  axes.grid(axis='y', visible=False)
  return drawn, axes, places


def _shortened(text: str, most: int) -> str:
  """A text cut to a number of characters, to leave room in the picture."""
  return text if len(text) <= most else f'{text[: most - 1]}…'


def network(
  layers: Sequence[str],
  searched: Sequence[int],
  reference: Sequence[int],
  kept: Mapping[str, Sequence[int]],
) -> mpl_figure.Figure:
  """The network from top to bottom: the width of each layer before and after.

  Args:
    layers: Names of the layers that were cut, in forward order.
    searched: Their channels before the cut.
    reference: Their channels in the reference network.
    kept: {budget: channels after the cut}, the widest first.
  """
  drawn, axes, y = _row_figure(layers)
  blues = matplotlib.colormaps['Blues'](np.linspace(0.2, 0.6, len(kept)))

  def bars(counts: Sequence[int], **style: Any) -> None:
    widths = np.asarray(counts)
    axes.barh(y, widths, 0.8, left=-widths / 2, **style)

  bars(searched, color='white', edgecolor=_GREY, label='searched')
  for i, (name, counts) in enumerate(kept.items()):
    hatch = _HATCHES[i] if len(kept) <= len(_HATCHES) else None
    style = {'color': blues[i], 'edgecolor': _BLUE, 'hatch': hatch}
    bars(counts, label=_shortened(name, 18), **style)
  if list(reference) != list(searched):
    ends = np.concatenate([reference, np.negative(reference)]) / 2
    style = {'marker': '|', 'linewidths': 2, 'label': 'reference'}
    axes.scatter(ends, [*y, *y], 60, _BLACK, **style)
  half = max(*searched, *reference) / 2
  for place, before, *after in zip(y, searched, *kept.values(), strict=True):
    shown = ', '.join(map(str, after))
    if len(after) > 3:
      shown = f'{max(after)} .. {min(after)}'
    text = f'{before} → {shown}'
    axes.text(1.04 * half, place, text, va='center', fontsize=7.5)
  axes.set(xlim=(-half, 1.6 * half), xticks=[])
  axes.spines[:].set_visible(False)
  axes.set_xlabel('channels of each layer, before → after')
  drawn.legend(loc='outside upper left', ncols=3)
  return drawn


def heat(
  rows: Sequence[str],
  columns: Sequence[str],
  values: np.ndarray,
  label: str,
  digits: int = 0,
) -> mpl_figure.Figure:
  """Numbers in cells that are light (the least, or 0) to dark (the most).

  Args:
    rows: Titles of the rows; of '3. searched', only the number is drawn.
    columns: Titles of the columns.
    values: [rows, columns], NaN for no value.
    label: The meaning of the columns.
    digits: The number of decimals.
  """
  drawn, ((axes,),) = _figure(1.1 + 0.2 * len(rows))
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)
  colours = matplotlib.colormaps['Blues'].with_extremes(bad='#eeeeee')
  low, high = min(0, np.nanmin(values)), np.nanmax(values)
  style = {'cmap': colours, 'aspect': 'auto', 'interpolation': 'nearest'}
  axes.imshow(np.ma.masked_invalid(values), vmin=low, vmax=high, **style)
  size = 7.5 if len(columns) <= 12 else 5.5
  for (i, j), value in np.ndenumerate(values):
    ink = 'white' if value > low + 0.65 * (high - low) else _BLACK
    style = {'ha': 'center', 'va': 'center', 'fontsize': size, 'color': ink}
    text = '–' if np.isnan(value) else f'{value:.{digits}f}'
    axes.text(j, i, text.replace('0.', '.'), **style)
  numbers = [
    [title.partition('. ')[0] for title in titles] for titles in (rows, columns)
  ]
  axes.set_yticks(range(len(rows)), numbers[0], fontsize=7.5)
  axes.set_xticks(range(len(columns)), numbers[1])
  axes.xaxis.tick_top()
  axes.xaxis.set_label_position('top')
  axes.set_xlabel(label, labelpad=7)
  return drawn


def curves(
  panels: Mapping[str, Sequence[Line]], xlabel: str, last: bool = False
) -> mpl_figure.Figure:
  """Lines over one axis, in panels below each other: {axis label: lines}.

  With `last`, the legend of a panel also gives the last value of each line.
  """
  rows = sum((len(lines) + 1) // 2 for lines in panels.values())
  height = 0.5 + 1.7 * len(panels) + 0.17 * rows
  drawn, grid = _figure(height, len(panels))
  for axes, (name, lines) in zip(grid[:, 0], panels.items(), strict=True):
    for i, line in enumerate(lines):
      axes.errorbar(
        line.x,
        line.y,
        line.error,
        linestyle=_LINES[i % len(_LINES)],
        color=_COLOURS[i % len(_COLOURS)],
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=3.5 if len(line.x) > 1 else 5,
        markevery=max(1, len(line.x) // 12),
        capsize=3,
        elinewidth=1,
        label=_shortened(line.label, 32) + f': {line.y[-1]:.4g}' * last,
      )
    axes.set_ylabel(name)
    axes.margins(y=0.08)
    values = np.concatenate([line.y for line in lines])
    if values.min() > 0 and values.max() > 20 * values.min():
      axes.set_yscale('log')  # Else large values hide the others.
    style = {'loc': 'lower left', 'bbox_to_anchor': (0, 1.0), 'fontsize': 8}
    axes.legend(ncols=2, borderaxespad=0.2, columnspacing=1.0, **style)
  if all(float(x).is_integer() for line in lines for x in line.x):
    axes.xaxis.get_major_locator().set_params(integer=True)
  axes.set_xlabel(xlabel)
  return drawn


def intervals(
  rows: Sequence[Interval], xlabel: str, meanings: Mapping[bool, str]
) -> mpl_figure.Figure:
  """A row for each mean and its interval.

  Args:
    rows: The rows, from top to bottom.
    xlabel: The meaning of the numbers.
    meanings: {whether a diamond is filled: what that means}, for the legend.
      If it has both, the numbers are differences, and a line is drawn at 0.
  """
  drawn, axes, y = _row_figure([row.label for row in rows])
  for place, row in zip(y, rows, strict=True):
    at = [place] * len(row.dots)
    axes.scatter(row.dots, at, 22, facecolors='none', edgecolors=_GREY)
    bar = {'xerr': row.error, 'capsize': 3, **_DIAMONDS[row.filled]}
    axes.errorbar(row.mean, place, fmt='D', **bar)
  for filled, meaning in meanings.items():
    axes.plot([], [], 'D', label=meaning, **_DIAMONDS[filled])
  if any(row.dots for row in rows):
    axes.scatter([], [], 22, 'none', edgecolors=_GREY, label='one run')
  if len(meanings) > 1:
    axes.axvline(0, color=_BLACK, linewidth=1)
  axes.set_xlabel(xlabel)
  drawn.legend(loc='outside upper left', ncols=3)
  return drawn


def examples(images: np.ndarray, titles: Sequence[str]) -> mpl_figure.Figure:
  """uint8 images in rows of 6, a title of one or two lines above each."""
  rows = -(-len(images) // 6)
  drawn, grid = _figure(1.15 * rows, rows, 6)
  for axes in grid.ravel():
    axes.set_axis_off()
  if images.shape[-1] != 3:  # The first of other channels.
    images = images[..., 0]
  for axes, image, title in zip(grid.ravel(), images, titles, strict=False):
    axes.imshow(image, cmap='gray', vmin=0, vmax=255)
    lines = [_shortened(line, 14) for line in title.splitlines()]
    axes.set_title('\n'.join(lines), fontsize=7)
  return drawn
