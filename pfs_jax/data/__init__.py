"""Data sets: `spec`, `configured`, `open_set`; as arrays: `load`, `split`.

Importing this package brings in NumPy only; TFDS and scikit-learn are imported
by the data sets that need them, when they need them.
"""

import dataclasses
import pathlib

import numpy as np

from pfs_jax import errors
from pfs_jax.data import registry

Spec = registry.Spec
register = registry.register
spec = registry.spec
configured = registry.configured

_Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A data set in memory.

  Attributes:
    train_images: uint8 [N, H, W, C], 0..255.
    train_labels: int32 [N], 0..num_classes-1.
    test_images: uint8 [M, H, W, C].
    test_labels: int32 [M].
    spec: the facts; its train_examples counts the whole training split, also
      where fewer were asked for.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  spec: Spec


def open_set(config, workdir: pathlib.Path):
  """The data set of a config, in memory or streamed; reads it.

  Args:
    config: The whole configuration.
    workdir: Where a set that is made or indexed may be kept.

  Returns:
    `pipeline.Arrays` or `imagenet.Streamed`: both have `spec`,
    `train_source(stage, hold_out)`, a context manager with the interface of
    `pipeline.ArraySource`, and `validation()` and `test()` like
    `pipeline.ArrayEvaluation`.

  Raises:
    UserError: data that is missing or not what it should be.
  """
  if configured(config.data).in_memory:
    from pfs_jax.data import pipeline

    return pipeline.Arrays(config)
  from pfs_jax.data import imagenet

  return imagenet.Streamed(config, workdir)


def load(
  name: str,
  *,
  data_dir: str = '',
  source_dir: str = '',
  download: bool = True,
  train_examples: int = 0,
) -> Dataset:
  """Loads a data set; all but `digits` are prepared with TFDS the first time.

  The order of the examples is fixed: scikit-learn's for digits, for the others
  that of TFDS's prepared split (a hash of the upstream index), the same on
  every machine.

  Args:
    name: digits, mnist, fashion_mnist, cifar10 or cifar100.
    data_dir: where TFDS prepares and finds data; '' is its own default,
      $TFDS_DATA_DIR or ~/tensorflow_datasets.
    source_dir: a directory with upstream's files, used in place of the network
      when `data_dir` has nothing yet. It may be read-only.
    download: whether the network may be asked: one attempt, 10 s to connect,
      checksums verified.
    train_examples: keep only so many of the first training images; 0 keeps
      all. The test images are always all.

  Returns:
    The `Dataset`.

  Raises:
    UserError: unknown name, too many examples asked for, or data that is
      missing or not what it should be.
  """
  facts = spec(name)
  if not 0 <= train_examples <= facts.train_examples:
    raise errors.UserError(
      f'config.data.train_examples must be in 0..{facts.train_examples} '
      f'for {name} (0 is all); got {train_examples}.'
    )
  if not facts.in_memory:
    raise errors.UserError(
      f'config.data.name must be a data set that fits in memory here; '
      f'got {name}, which is streamed.'
    )
  if name == 'digits':
    arrays = _digits(facts)
  else:
    from pfs_jax.data import prepare

    arrays = prepare.load(facts, data_dir, source_dir, download)
  if train_examples:
    for key in ('train_images', 'train_labels'):
      # A copy, so that the rest can be freed.
      arrays[key] = arrays[key][:train_examples].copy()
  return Dataset(**arrays, spec=facts)


def _digits(facts: Spec) -> dict[str, np.ndarray]:
  """scikit-learn's 8x8 digits, 0..16 scaled to 0..255 (half to even).

  The images are sorted by class, each class in the order it comes, and the
  test set takes every sixth or so of them: 297 places spread evenly. So it is
  the same everywhere, and each class gets its share to within one image.
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


def split(
  images: np.ndarray, labels: np.ndarray, holdout: int
) -> tuple[_Pair, _Pair]:
  """Holds the LAST `holdout` examples back for validation.

  Args:
    images: [N, ...].
    labels: [N].
    holdout: 0..N-1; 0 gives an empty validation set. (45,000 + 5,000 is usual
      for CIFAR; the paper trains on all 50,000.)

  Returns:
    (images, labels) to train on, (images, labels) to validate on; views.

  Raises:
    UserError: `holdout` leaves nothing to train on, or is negative.
  """
  n = len(labels)
  assert len(images) == n, (len(images), n)
  if not 0 <= holdout < n:
    raise errors.UserError(
      f'config.data.validation_examples must be in 0..{n - 1}, less than the '
      f'training images; got {holdout}.'
    )
  keep = n - holdout
  return (images[:keep], labels[:keep]), (images[keep:], labels[keep:])
