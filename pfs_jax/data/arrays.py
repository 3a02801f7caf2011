"""Data sets that fit in memory, as NumPy arrays."""

import dataclasses
from typing import Self

import numpy as np

from pfs_jax import errors
from pfs_jax.data import specs


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A data set in memory.

  Attributes:
    train_images: uint8 [N, H, W, C], 0..255.
    train_labels: int32 [N], 0..num_classes-1.
    test_images: uint8 [M, H, W, C].
    test_labels: int32 [M].
    spec: The facts. Its `train_examples` counts the whole training split, even
      if `load` was asked for fewer.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  spec: specs.Spec

  def first(self, count: int) -> Self:
    """The data set with the first `count` training images; 0 keeps all.

    Raises:
      errors.UserError: There are fewer.
    """
    if not 0 <= count <= len(self.train_labels):
      raise errors.UserError(
        f'config.data.train_examples must be in 0..{len(self.train_labels)} '
        f'for {self.spec.name} (0 is all); got {count}.'
      )
    if not count:
      return self
    # Copies, so that the other images can be freed.
    return dataclasses.replace(
      self,
      train_images=self.train_images[:count].copy(),
      train_labels=self.train_labels[:count].copy(),
    )


def load(
  name: str,
  *,
  data_dir: str = '',
  source_dir: str = '',
  download: bool = True,
  train_examples: int = 0,
) -> Dataset:
  """Loads a data set; all but `digits` are prepared at the first use.

  The order of the examples is the same on every machine: scikit-learn's for
  digits, else that of TFDS's prepared split (by a hash of the upstream index).

  >>> digits = load('digits')
  >>> digits.train_images.shape, digits.test_images.shape
  ((1500, 8, 8, 1), (297, 8, 8, 1))

  Args:
    name: digits, mnist, fashion_mnist, cifar10 or cifar100.
    data_dir: The directory of prepared data; '' is TFDS's default.
    source_dir: A directory with the original files, used instead of a download
      if `data_dir` has no data yet. It may be read-only.
    download: Whether to use the network: one attempt, checksums verified.
    train_examples: See `Dataset.first`.

  Raises:
    errors.UserError: The name is unknown, there are fewer examples, or the data
      are missing or wrong.
  """
  facts = specs.spec(name)
  if not facts.in_memory:
    raise errors.UserError(
      f'config.data.name must be a data set that fits in memory here; '
      f'got {name}, which is streamed.'
    )
  if name == 'digits':
    found = _digits(facts)
  else:
    from pfs_jax.data import prepare

    found = prepare.load(facts, data_dir, source_dir, download)
  return Dataset(**found, spec=facts).first(train_examples)


def _digits(facts: specs.Spec) -> dict[str, np.ndarray]:
  """scikit-learn's 8x8 digits, 0..16 scaled to 0..255 (half to even).

  The test set is 297 evenly spaced images of those sorted by class. It is the
  same on every machine, and has each class's share to within one image.
  """
  from sklearn import datasets

  digits = datasets.load_digits()
  total, tests = len(digits.target), facts.test_examples
  by_class = np.argsort(digits.target, kind='stable')
  places = (2 * np.arange(tests) + 1) * total // (2 * tests)
  is_test = np.zeros(total, bool)
  is_test[by_class[places]] = True
  images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)
  return {
    'train_images': images[~is_test],
    'train_labels': labels[~is_test],
    'test_images': images[is_test],
    'test_labels': labels[is_test],
  }
