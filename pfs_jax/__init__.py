"""Pruning from Scratch in JAX and Flax: narrower nets from random weights."""
