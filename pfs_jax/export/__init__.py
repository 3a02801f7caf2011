"""A trained network as files that other programs read.

  export.save('out', module, variables, structure, spec)
  classify = export.load('out', format='onnx')
  logits = classify(images)  # Normalised float [N, H, W, C].

`bundle` writes and reads the folder, `check` reads it back in a fresh process,
`stablehlo`, `weights` and `onnx` are the formats; `graph` is what `onnx` writes
its operators into.
"""

from pfs_jax.export.bundle import (
  FORMATS,
  Exported,
  load,
  normalised,
  read_manifest,
  save,
)

__all__ = [
  'FORMATS',
  'Exported',
  'load',
  'normalised',
  'read_manifest',
  'save',
]
