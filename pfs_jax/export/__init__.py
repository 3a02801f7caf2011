"""A trained network as files that other programs read.

  export.save('out', module, variables, structure, spec)
  classify = export.load('out', format='onnx')
  logits = classify(images)  # Normalised float [N, H, W, C].

`bundle` writes and reads the folder, `manifest` describes what is in it, and
`check` reads it back in a fresh process. `stablehlo`, `weights` and `onnx` are
the formats; `onnx` writes `operators` into a `graph`.
"""

from pfs_jax.export.bundle import Exported, load, save
from pfs_jax.export.manifest import FORMATS, normalised
from pfs_jax.export.manifest import read as read_manifest

__all__ = ['FORMATS', 'Exported', 'load', 'normalised', 'read_manifest', 'save']
