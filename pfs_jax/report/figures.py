"""Pictures of a report: drawn by matplotlib, without a screen.

Each is told apart without colour, by marker, hatch, line style or its own
label, and is narrow enough (4.8 inches) to be read on a phone. The same numbers
give the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import patheffects

_WIDTH = 4.8  # Inches.
_STYLE = {
  'svg.hashsalt': 'pfs_jax',
  'svg.fonttype': 'path',
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
BLUE, ORANGE, GREY, BLACK = '#0072b2', '#e69f00', '#767676', '#1a1a1a'
_COLOURS = (BLUE, '#d55e00', '#009e73', '#cc79a7', ORANGE, '#56b4e9', BLACK)
_MARKERS = 'osD^vPX*<>hp'
_LINES = ('-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


@dataclasses.dataclass(frozen=True)
class Picture:
  """A finished picture.

  Attributes:
    name: Stem of its files.
    alt: What it shows, in words, with the main numbers.
    svg: As a vector file.
    png: As pixels.
    size: (width, height) in pixels of the page.
  """

  name: str
  alt: str
  svg: bytes
  png: bytes
  size: tuple[int, int]


def render(name: str, alt: str, draw: Callable[..., Any], *args) -> Picture:
  """Draws by one of the functions below, `draw(*args)`, to both formats."""
  with matplotlib.rc_context(_STYLE):
    drawn = draw(*args)
    svg, png = io.BytesIO(), io.BytesIO()
    about = {'Title': name, 'Description': alt}
    drawn.savefig(svg, format='svg', metadata={'Date': None, **about})
    drawn.savefig(png, format='png', dpi=200, metadata=about)
  width, height = (round(96 * inches) for inches in drawn.get_size_inches())
  return Picture(name, alt, svg.getvalue(), png.getvalue(), (width, height))


def _figure(height: float) -> mpl_figure.Figure:
  return mpl_figure.Figure((_WIDTH, height), layout='constrained')


def _rows(axes, labels: Sequence[str]) -> np.ndarray:
  """Horizontal rows, the first at the top; their places."""
  places = np.arange(len(labels))
  axes.set_yticks(places, labels, fontsize=8 if len(labels) <= 24 else 7)
  axes.set_ylim(len(labels) - 0.4, -0.6)
  axes.tick_params(axis='y', length=0)
  axes.grid(axis='y', visible=False)
  return places


def _top_legend(drawn, *args, columns: int = 3) -> None:
  drawn.legend(*args, loc='outside upper left', ncols=columns)


def _end_labels(axes, ends: Sequence[tuple[float, str]]) -> None:
  """Labels at the right edge, each at its height, pushed apart if they meet."""
  low, high = axes.get_ylim()
  gap = 0.105 * (high - low) * 1.9 / max(axes.figure.get_figheight(), 1.9)
  place = -np.inf
  for value, text in sorted(ends):
    place = max(value, place + gap)
    axes.annotate(
      text,
      (1.0, place),
      (4, 0),
      xycoords=axes.get_yaxis_transform(),
      textcoords='offset points',
      va='center',
      fontsize=8,
      annotation_clip=False,
    )


# A run.


def counts(
  layers: Sequence[str],
  kept: Sequence[int],
  searched: Sequence[int],
  reference: Sequence[int],
) -> mpl_figure.Figure:
  """Channels kept of each layer, within the width that was searched."""
  drawn = _figure(1.1 + 0.19 * len(layers))
  axes = drawn.subplots()
  y = _rows(axes, layers)
  axes.barh(
    y, searched, 0.75, color='white', edgecolor=GREY, label='searched network'
  )
  axes.barh(
    y,
    kept,
    0.75,
    color='#9ecae1',
    edgecolor=BLUE,
    hatch='////',
    label='kept',
  )
  if list(reference) != list(searched):
    axes.scatter(
      reference,
      y,
      60,
      BLACK,
      marker='|',
      linewidths=2,
      label='reference network',
    )
  widest = max(*searched, *reference)
  for place, n, full, other in zip(y, kept, searched, reference, strict=True):
    axes.text(
      max(full, other) + 0.015 * widest,
      place,
      f'{n} of {full}',
      va='center',
      fontsize=7.5,
    )
  axes.set_xlim(0, 1.18 * widest)
  axes.set_xlabel('channels')
  _top_legend(drawn)
  return drawn


_BINS = np.linspace(0, 1, 26)


def gates(kept: np.ndarray, dropped: np.ndarray) -> mpl_figure.Figure:
  """Histogram of the gates, those of kept channels apart from the others."""
  drawn = _figure(2.9)
  axes = drawn.subplots()
  _, _, bars = axes.hist(
    [kept, dropped],
    _BINS,
    stacked=True,
    edgecolor=BLACK,
    linewidth=0.6,
    color=['#9ecae1', 'white'],
    label=[f'kept ({kept.size})', f'dropped ({dropped.size})'],
  )
  for patch in bars[0]:
    patch.set_hatch('////')
  axes.set(xlabel='gate', ylabel='channels', xlim=(0, 1))
  axes.yaxis.get_major_locator().set_params(integer=True)
  _top_legend(drawn)
  return drawn


def course(rows: Sequence[tuple[str, np.ndarray]]) -> mpl_figure.Figure:
  """Histograms below each other, one for each (label, gates)."""
  drawn = _figure(0.8 + 0.5 * len(rows))
  axes = drawn.subplots()
  for i, (label, values) in enumerate(rows):
    share, _ = np.histogram(np.clip(values, 0, 1), _BINS)
    height = 0.85 * share / max(share.max(), 1)
    base = -float(i)
    axes.stairs(base + height, _BINS, baseline=base, fill=True, color='#c6dbef')
    axes.stairs(base + height, _BINS, baseline=base, color=BLUE)
    zero = np.mean(values == 0)
    axes.text(
      1.02,
      base + 0.1,
      f'{label}\nmean {values.mean():.2f}, {zero:.0%} at 0',
      fontsize=8,
      transform=axes.transData,
    )
  axes.set_yticks([])
  axes.grid(visible=False, axis='y')
  axes.spines['left'].set_visible(False)
  axes.set(xlabel='gate', xlim=(0, 1), ylim=(-len(rows) + 0.9, 1))
  return drawn


Line = tuple[str, Sequence[float], Sequence[float]]


def curves(panels: Mapping[str, Sequence[Line]]) -> mpl_figure.Figure:
  """Curves over steps: {axis label: [(label, steps, values)]}."""
  drawn = _figure(0.5 + 1.9 * len(panels))
  all_axes = drawn.subplots(len(panels), 1, sharex=True, squeeze=False)
  for axes, (name, lines) in zip(all_axes[:, 0], panels.items(), strict=True):
    for i, (_, x, y) in enumerate(lines):
      axes.plot(
        x,
        y,
        linestyle=_LINES[i % len(_LINES)],
        color=_COLOURS[i % len(_COLOURS)],
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=3.5,
        markevery=max(1, len(x) // 12),
      )
    axes.set_ylabel(name)
    axes.margins(y=0.08)
    values = np.concatenate([y for _, _, y in lines])
    if values.min() > 0 and values.max() > 20 * values.min():
      axes.set_yscale('log')  # Else the first values hide the others.
    _line_legend(axes, lines)
  all_axes[-1, 0].set_xlabel('step')
  return drawn


def _line_legend(axes, lines: Sequence[Line]) -> None:
  """What each line is, with its last value."""
  axes.legend(
    axes.get_lines(),
    [f'{label}: {y[-1]:.3g}' for label, _, y in lines],
    loc='lower left',
    bbox_to_anchor=(0, 1.0),
    ncols=2,
    borderaxespad=0.2,
    handlelength=2.4,
    columnspacing=1.0,
    fontsize=8,
  )


# A study.


@dataclasses.dataclass(frozen=True)
class Group:
  """The runs of one arm at one value.

  Attributes:
    number: Of the arm in the tables.
    label: Its name.
    values: Test accuracy of each run, in percent.
    mean: Of the values.
    sd: Their standard deviation, None if there is one.
    share: Of the reference network's MACs, 0..1, the mean.
  """

  number: int
  label: str
  values: Sequence[float]
  mean: float
  sd: float | None
  share: float

  @property
  def title(self) -> str:
    """Number and name."""
    return f'{self.label}  {self.number}'


def accuracy(groups: Sequence[Group]) -> mpl_figure.Figure:
  """Each arm's runs as dots, mean and standard deviation over them."""
  drawn = _figure(1.1 + 0.28 * len(groups))
  axes = drawn.subplots()
  y = _rows(axes, [group.title for group in groups])
  for place, group in zip(y, groups, strict=True):
    axes.scatter(
      group.values,
      [place] * len(group.values),
      22,
      facecolors='none',
      edgecolors=GREY,
      label='one run' if place == 0 else None,
    )
    axes.errorbar(
      group.mean,
      place,
      xerr=group.sd or 0.0,
      fmt='D',
      color=BLUE,
      markersize=5,
      capsize=3,
      label='mean ± standard deviation' if place == 0 else None,
    )
  axes.set_xlabel('test accuracy in %')
  _top_legend(drawn)
  return drawn


def differences(
  labels: Sequence[str], found: Sequence[Any], baseline: str
) -> mpl_figure.Figure:
  """Mean differences and 95% intervals against a line at 0.

  Args:
    labels: Of the arms.
    found: `statistics.Difference` of each.
    baseline: What was subtracted.
  """
  drawn = _figure(1.2 + 0.28 * len(labels))
  axes = drawn.subplots()
  y = _rows(axes, labels)
  axes.axvline(0, color=BLACK, linewidth=1)
  shown: set[bool] = set()
  for place, versus in zip(y, found, strict=True):
    low = versus.mean if versus.low is None else versus.low
    high = versus.mean if versus.high is None else versus.high
    clear = versus.low is not None and (low > 0 or high < 0)
    axes.errorbar(
      versus.mean,
      place,
      xerr=[[versus.mean - low], [high - versus.mean]],
      fmt='D',
      color=BLUE if clear else GREY,
      markerfacecolor=BLUE if clear else 'white',
      markersize=5.5,
      capsize=3,
      label=None
      if clear in shown
      else ('interval without 0' if clear else 'interval with 0, or n = 1'),
    )
    shown.add(clear)
  axes.set_xlabel(f'accuracy in points, minus that of\n{baseline}')
  _top_legend(drawn)
  return drawn


def trade(groups: Sequence[Group]) -> mpl_figure.Figure:
  """Accuracy against MACs; numbers say which arm a marker is.

  Arms at the same MACs stand side by side, at most 1 % apart.
  """
  drawn = _figure(3.8)
  axes = drawn.subplots()
  clusters = _clusters([100 * group.share for group in groups])
  for place, members in clusters:
    step, ends = min(1.0, 8 / len(members)), []
    for j, i in enumerate(members):
      group, x = groups[i], place + step * (j - (len(members) - 1) / 2)
      axes.errorbar(
        x,
        group.mean,
        yerr=group.sd or 0.0,
        fmt=_MARKERS[(group.number - 1) % len(_MARKERS)],
        color=_COLOURS[(group.number - 1) % len(_COLOURS)],
        markersize=5,
        capsize=2,
        elinewidth=1,
      )
      ends.append((group.mean, x, str(group.number)))
    right = place + step * (len(members) / 2 + 3)
    _leaders(axes, right, ends, groups)
  axes.set(
    xlabel="MACs in % of the reference network's",
    ylabel='test accuracy in %',
    xlim=(0, max(place for place, _ in clusters) + 11),
  )
  return drawn


def _clusters(values: Sequence[float]) -> list[tuple[float, list[int]]]:
  """(mean, members) of the values that lie within 2 of the first of them."""
  found: list[list[int]] = []
  for i in sorted(range(len(values)), key=lambda i: (values[i], i)):
    if found and values[i] - values[found[-1][0]] < 2:
      found[-1].append(i)
    else:
      found.append([i])
  return [(float(np.mean([values[i] for i in m])), sorted(m)) for m in found]


def _leaders(axes, right: float, ends, groups: Sequence[Group]) -> None:
  """Numbers in a column at `right`, each joined to its (mean, x, text)."""
  low = min(g.mean - (g.sd or 0.0) for g in groups)
  high = max(g.mean + (g.sd or 0.0) for g in groups)
  gap = max(0.05 * (high - low), 1e-9)
  place = -np.inf
  for mean, x, text in sorted(ends):
    place = max(mean, place + gap)
    axes.plot([x, right], [mean, place], color=GREY, linewidth=0.5, zorder=1)
    axes.text(right + 0.5, place, text, va='center', fontsize=8)


def varied(
  field: str, lines: Mapping[str, Sequence[tuple[float, float, float | None]]]
) -> mpl_figure.Figure:
  """Accuracy over a varied field: {arm: [(value, mean, sd)]}."""
  drawn = _figure(3.4)
  axes = drawn.subplots()
  ends = []
  for i, (label, points) in enumerate(lines.items()):
    x, mean, sd = zip(*points, strict=True)
    axes.errorbar(
      x,
      mean,
      yerr=[s or 0.0 for s in sd],
      linestyle=_LINES[i % len(_LINES)],
      marker=_MARKERS[i % len(_MARKERS)],
      color=_COLOURS[i % len(_COLOURS)],
      capsize=3,
      markersize=5,
    )
    ends.append((mean[-1], label))
  axes.set(xlabel=field, ylabel='test accuracy in %')
  _end_labels(axes, ends)
  return drawn


def shares(
  layers: Sequence[str], columns: Sequence[str], values: np.ndarray
) -> mpl_figure.Figure:
  """Share kept, in percent, of each layer (row) by each arm (column).

  Args:
    layers: Names of the rows.
    columns: Names of the columns.
    values: [layers, columns], 0..1.
  """
  drawn = _figure(1.1 + 0.2 * len(layers))
  axes = drawn.subplots()
  _heat(axes, 100 * values, 0, 100)
  small = 7.5 if len(columns) <= 12 else 5.5
  for (i, j), value in np.ndenumerate(values):
    _on(axes, j, i, f'{100 * value:.0f}', small, dark=value > 0.6)
  axes.set_yticks(range(len(layers)), layers, fontsize=7.5)
  axes.set_xticks(range(len(columns)), columns)
  axes.xaxis.tick_top()
  axes.xaxis.set_label_position('top')
  axes.set_xlabel('arm')
  return drawn


def similarity(
  matrix: np.ndarray, blocks: Sequence[tuple[str, int]]
) -> mpl_figure.Figure:
  """Correlation of every two structures; the mean of each block in words.

  Args:
    matrix: [n, n], -1..1, NaN where there is none.
    blocks: (label, members) of each group, in the matrix's order.
  """
  drawn = _figure(_WIDTH)
  axes = drawn.subplots()
  low = min(0.0, float(np.floor(10 * np.nanmin(matrix)) / 10))
  image = _heat(axes, matrix, low, 1)
  edges = np.cumsum([0, *(n for _, n in blocks)])
  middles = (edges[:-1] + edges[1:] - 1) / 2
  small = 8.5 if len(blocks) <= 7 else 6.5
  for edge in edges[1:-1] - 0.5:
    axes.axhline(edge, color='white', linewidth=2)
    axes.axvline(edge, color='white', linewidth=2)
  for i, row in enumerate(block_means(matrix, blocks)):
    for j, mean in enumerate(row):
      text = '–' if np.isnan(mean) else f'{mean:.2f}'
      axes.text(
        middles[j],
        middles[i],
        text,
        ha='center',
        va='center',
        fontsize=small,
        bbox={'boxstyle': 'round,pad=0.15', 'fc': 'white', 'lw': 0},
      )
  labels = [label for label, _ in blocks]
  axes.set_xticks(middles, labels, fontsize=8)
  axes.set_yticks(middles, labels, fontsize=8)
  axes.tick_params(length=0)
  drawn.colorbar(image, ax=axes, shrink=0.75, label='correlation')
  return drawn


def block_means(
  matrix: np.ndarray, blocks: Sequence[tuple[str, int]]
) -> np.ndarray:
  """[groups, groups] means of the blocks, without the diagonal and gaps."""
  edges = np.cumsum([0, *(n for _, n in blocks)])
  off = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
  means = np.full((len(blocks), len(blocks)), np.nan)
  for i, j in np.ndindex(means.shape):
    block = off[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
    block = block[~np.isnan(block)]
    means[i, j] = block.mean() if block.size else np.nan
  return means


def _heat(axes, values: np.ndarray, low: float, high: float):
  """Cells from light (low) to dark (high)."""
  axes.grid(visible=False)
  axes.spines[:].set_visible(False)
  colours = matplotlib.colormaps['Blues'].with_extremes(bad='#eeeeee')
  return axes.imshow(
    np.ma.masked_invalid(values),
    vmin=low,
    vmax=high,
    cmap=colours,
    aspect='auto',
    interpolation='nearest',
  )


def _on(axes, x, y, text: str, size: float, dark: bool) -> None:
  """Text on a cell, with a rim that keeps it apart from what is below."""
  ink, rim = ('white', '#08306b') if dark else (BLACK, 'white')
  axes.text(
    x,
    y,
    text,
    ha='center',
    va='center',
    fontsize=size,
    color=ink,
    path_effects=[patheffects.withStroke(linewidth=1.5, foreground=rim)],
  )
