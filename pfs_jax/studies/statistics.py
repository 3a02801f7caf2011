"""Statistics of studies: spread, paired differences, similarity."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
  """n values, their mean, and the standard deviation (n - 1; None if n < 2)."""

  n: int
  mean: float
  sd: float | None


def summary(values: Sequence[float]) -> Summary:
  """Mean and standard deviation of at least one value."""
  array = np.asarray(values, np.float64)
  sd = float(array.std(ddof=1)) if len(array) > 1 else None
  return Summary(len(array), float(array.mean()), sd)


class Difference(NamedTuple):
  """A mean difference over n pairs and its 95 % interval (None if n < 2)."""

  n: int
  mean: float
  low: float | None
  high: float | None


def paired(
  ours: Mapping[int, float], theirs: Mapping[int, float]
) -> Difference | None:
  """ours - theirs over the seeds that both have; None if there are none.

  Both are {seed: value}. The interval is mean +- t(0.975, n - 1) * sd /
  sqrt(n), Student's t on the differences.
  """
  seeds = sorted(set(ours) & set(theirs))
  if not seeds:
    return None
  n, mean, sd = summary([ours[s] - theirs[s] for s in seeds])
  if sd is None:
    return Difference(n, mean, None, None)
  import scipy.special  # Slow to import, and no other mode needs it.

  half = float(scipy.special.stdtrit(n - 1, 0.975)) * sd / math.sqrt(n)
  return Difference(n, mean, mean - half, mean + half)


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Pearson's correlation of two vectors; None where one is constant."""
  x, y = (np.asarray(v, np.float64) - np.mean(v) for v in (a, b))
  scale = math.sqrt(float(x @ x) * float(y @ y))
  return None if scale < 1e-12 else float(x @ y) / scale


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
  """Shared members over all members of two sets that are not both empty."""
  a, b = set(a), set(b)
  return len(a & b) / len(a | b)


@functools.cache  # A table asks for the same sizes again and again.
def chance_jaccard(n: int, first: int, second: int) -> float:
  """The expected Jaccard index of two random subsets of n things.

  The overlap k is hypergeometric and the index k / (first + second - k).
  """
  total, index = math.comb(n, second), 0.0
  for k in range(max(0, first + second - n), min(first, second) + 1):
    ways = math.comb(first, k) * math.comb(n - first, second - k)
    index += ways / total * k / (first + second - k)
  return index
