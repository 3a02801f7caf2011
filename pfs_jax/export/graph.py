"""An ONNX graph that is being built: nodes, constants, and folding at the end.

The file needs opset 17 (2022), which all current runtimes read.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OPSET = 17
IR_VERSION = 8  # The version of opset 17.
INPUT, OUTPUT = 'images', 'logits'


@dataclasses.dataclass(eq=False)
class Node:
  """One operator: names of inputs and of its one output, and attributes."""

  op: str
  inputs: list[str]
  output: str
  attributes: dict[str, Any]


class Graph:
  """Nodes in order and constants by name."""

  def __init__(self):
    self.nodes: list[Node] = []
    self.constants: dict[str, np.ndarray] = {}

  def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Appends an operator; returns the name of its output."""
    output = f'{op.lower()}_{len(self.nodes)}'
    self.nodes.append(Node(op, list(inputs), output, attributes))
    return output

  def constant(self, value: Any) -> str:
    """The name of a new constant."""
    name = f'constant_{len(self.constants)}'
    self.constants[name] = np.asarray(value)
    return name

  def integers(self, values: Sequence[int]) -> str:
    """The name of a new vector of int64: axes, shapes."""
    return self.constant(np.array(values, np.int64))

  def maker(self, name: str) -> Node | None:
    """The node that makes this output; None if there is none."""
    return next((n for n in self.nodes if n.output == name), None)

  def finish(self, result: str) -> None:
    """Names the result, folds what can be folded and drops what is unused."""
    if self.maker(result) is None:  # The result is the input.
      result = self.add('Identity', [result])
    for node in self.nodes:
      node.output = OUTPUT if node.output == result else node.output
      node.inputs = [OUTPUT if i == result else i for i in node.inputs]
    for node in list(self.nodes):
      if node.op in ('Conv', 'Gemm') and node.inputs[1] in self.constants:
        self._fold_into(node)
    needed = {OUTPUT}
    for node in reversed(self.nodes):
      needed.update(node.inputs if node.output in needed else ())
    self.nodes = [n for n in self.nodes if n.output in needed]
    self.constants = {k: v for k, v in self.constants.items() if k in needed}

  def _fold_into(self, node: Node) -> None:
    """Folds constant factors and terms behind a Conv or Gemm into its weights.

    In evaluation mode that is all of BatchNorm, and the bias. It is computed in
    float64 and rounded once.
    """
    kernel = self.constants[node.inputs[1]]
    axis = 0 if node.op == 'Conv' else 1
    weights = np.moveaxis(kernel.astype(np.float64), axis, -1)
    bias = np.zeros(kernel.shape[axis])
    folded = False
    while node.output != OUTPUT:
      users = [n for n in self.nodes for i in n.inputs if i == node.output]
      step = self._affine(users[0], node.output, kernel) if users else None
      if len(users) != 1 or step is None:
        break
      factor, term = step
      weights, bias = weights * factor, bias * factor + term
      self.nodes.remove(users[0])
      node.output, folded = users[0].output, True
    if folded:
      new = [np.moveaxis(weights, -1, axis), bias]
      named = [self.constant(x.astype(kernel.dtype)) for x in new]
      node.inputs = [node.inputs[0], *named]

  def _affine(self, node: Node, x: str, kernel: np.ndarray):
    """(factor, term), scalars or [channels], if node is factor * x + term."""
    if node.op not in ('Add', 'Sub', 'Mul', 'Div'):
      return None
    left = node.inputs[0] == x
    other = self.constants.get(node.inputs[1 if left else 0])
    if other is None or other.ndim not in (0, kernel.ndim):
      return None
    channels = kernel.shape[0 if kernel.ndim > 2 else 1]
    if other.size != 1 and not other.size == other.shape[1] == channels:
      return None
    c = other.astype(np.float64).reshape(-1)
    if node.op == 'Div':
      return (1 / c, 0.0) if left else None
    terms = (1.0, -c) if left else (-1.0, c)
    return {'Mul': (c, 0.0), 'Add': (1.0, c), 'Sub': terms}[node.op]

  def write(
    self,
    path: pathlib.Path,
    shape: Sequence[int],
    classes: int,
    facts: Mapping[str, str],
  ) -> None:
    """Writes the file; input [N, *shape], output [N, classes], both float32.

    The facts become its metadata.
    """
    import onnx
    from onnx import helper, numpy_helper

    info, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    inputs = [info(INPUT, kind, ['N', *shape])]
    outputs = [info(OUTPUT, kind, ['N', classes])]
    nodes = [
      helper.make_node(n.op, n.inputs, [n.output], n.output, **n.attributes)
      for n in self.nodes
    ]
    arrays = [numpy_helper.from_array(v, k) for k, v in self.constants.items()]
    model = helper.make_model(
      helper.make_graph(nodes, 'pfs_jax', inputs, outputs, arrays),
      producer_name='pfs_jax',
      ir_version=IR_VERSION,
      opset_imports=[helper.make_opsetid('', OPSET)],
    )
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
