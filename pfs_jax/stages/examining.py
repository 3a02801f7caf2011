"""The one reading of the test set: accuracy, loss, mistakes and time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from pfs_jax import train

_MOST = 12  # Misclassified images that are kept.


class Exam(NamedTuple):
  """What a network does on the test images.

  Attributes:
    accuracy: The share of them that it classifies correctly.
    loss: The mean cross-entropy.
    images: Their number.
    batch: The images of a batch.
    milliseconds: The least time of a batch, of three.
    mistakes: The first images that it misclassifies: images uint8 [n, H, W, C],
      labels and predicted [n]. None are kept where several processes share the
      images.
  """

  accuracy: float
  loss: float
  images: int
  batch: int
  milliseconds: float
  mistakes: dict[str, np.ndarray]


def examine(module: nn.Module, variables: Mapping[str, Any], test: Any) -> Exam:
  """Evaluates a network as `train.evaluate` does, by the same program.

  Args:
    module: The network.
    variables: Its variables.
    test: The test images, as `train.evaluate` takes them.
  """
  call = train.evaluation_step(module, test.augmentation)
  loss = correct = 0.0
  names = ('images', 'labels', 'predicted')
  found: list[list[np.ndarray]] = [[], [], []]
  for batch in test:
    ce, right, predicted = call(variables, *batch)
    loss, correct = loss + float(ce), correct + float(right)
    if jax.process_count() == 1 and sum(map(len, found[1])) < _MOST:
      images, labels, weights = map(np.asarray, batch)
      wrong = (np.asarray(predicted) != labels) & (weights > 0)
      for kept, values in zip(found, (images, labels, predicted), strict=True):
        kept.append(np.asarray(values)[wrong])
  times = []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(call(variables, *batch))
    times.append(1000 * (time.perf_counter() - start))
  mistakes = {
    name: np.concatenate(values)[:_MOST]
    for name, values in zip(names, found, strict=True)
    if values
  }
  n = test.size
  return Exam(correct / n, loss / n, n, len(batch[1]), min(times), mistakes)
