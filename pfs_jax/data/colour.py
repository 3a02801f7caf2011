"""Colour augmentation of images of 0..1, in the compiled step."""

import jax
import jax.numpy as jnp

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's RGB in
# 0..1, published with AlexNet's code and used since.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
  (-0.5675, 0.7192, 0.4009),
  (-0.5808, -0.0045, -0.8140),
  (-0.5836, -0.6948, 0.4203),
)
_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision have it.


def jitter(x: jax.Array, key: jax.Array, strength: float) -> jax.Array:
  """Random brightness, contrast and saturation, each by 1 +- `strength`.

  Brightness scales towards black, contrast towards the image's mean grey,
  saturation towards each pixel's grey. The result is clipped once. Without
  clipping the order of the three changes nothing, so it is not random.

  >>> grey = jnp.full((1, 2, 2, 3), 0.5)
  >>> bool((jitter(grey, jax.random.key(0), 0.0) == grey).all())
  True

  Images, before and after, are [N, H, W, 3] of 0..1; `strength` is in 0..1.
  """
  low = max(0.0, 1 - strength)
  factors = jax.random.uniform(
    key, (3, x.shape[0], 1, 1, 1), x.dtype, low, 1 + strength
  )
  brightness, contrast, saturation = factors
  x = x * brightness
  mean = _grey(x).mean(axis=(1, 2), keepdims=True)
  x = mean + contrast * (x - mean)
  grey = _grey(x)
  return jnp.clip(grey + saturation * (x - grey), 0, 1)


def _grey(x: jax.Array) -> jax.Array:
  weights = jnp.asarray(_GREY, x.dtype).reshape(1, 1, 1, 3)
  return (x * weights).sum(axis=-1, keepdims=True)


def lighting(x: jax.Array, key: jax.Array, strength: float) -> jax.Array:
  """AlexNet's PCA lighting: adds a random colour to each image.

  The colour is sum_k a_k * eigenvalue_k * eigenvector_k, where a_k is normal
  with deviation `strength`. Pixels are in 0..1; the result may be outside.
  (The published code adds the same number to pixels in 0..255, where it has
  almost no effect.)
  """
  a = strength * jax.random.normal(key, (x.shape[0], 3), x.dtype)
  values = jnp.asarray(EIGENVALUES, x.dtype).reshape(1, 3)
  colour = (a * values) @ jnp.asarray(EIGENVECTORS, x.dtype).T
  return x + colour[:, None, None, :]
