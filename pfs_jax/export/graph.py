"""An ONNX graph in the making: nodes, constants, and what is folded at the end.

The file needs opset 17 (2022), which all current runtimes read.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OPSET = 17
IR_VERSION = 8  # That of opset 17.
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
    self._made: dict[str, Node] = {}
    self._numbers: dict[str, int] = {}
    self._batch = ''

  def _name(self, stem: str) -> str:
    number = self._numbers.get(stem, 0)
    self._numbers[stem] = number + 1
    return f'{stem}_{number}'

  def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Appends an operator; returns the name of its output."""
    node = Node(op, list(inputs), self._name(op.lower()), attributes)
    self.nodes.append(node)
    self._made[node.output] = node
    return node.output

  def constant(self, value: Any) -> str:
    """The name of a new constant."""
    name = self._name('constant')
    self.constants[name] = np.asarray(value)
    return name

  def integers(self, values: Sequence[int]) -> str:
    """The name of a new vector of int64: axes, shapes."""
    return self.constant(np.array(values, np.int64))

  def batch(self) -> str:
    """The batch size of the input, a vector of length one."""
    if not self._batch:
      shape = self.add('Shape', [INPUT])
      self._batch = self.add('Gather', [shape, self.integers([0])], axis=0)
    return self._batch

  def maker(self, name: str) -> Node | None:
    """The node whose output this is."""
    return self._made.get(name)

  def finish(self, result: str) -> None:
    """Names the result, folds what can be folded and drops what is unused."""
    if result not in self._made:  # The input itself.
      result = self.add('Identity', [result])
    self._made[result].output = OUTPUT
    for node in self.nodes:
      node.inputs = [OUTPUT if i == result else i for i in node.inputs]
    self._fold()
    self._drop_unused()

  def _fold(self) -> None:
    """Folds constant factors and terms behind a Conv or Gemm into its weights.

    In evaluation mode that is all of BatchNorm, and the bias. Done in float64,
    rounded once.
    """
    users: dict[str, list[Node]] = {OUTPUT: [Node('end', [], '', {})]}
    for node in self.nodes:
      for name in node.inputs:
        users.setdefault(name, []).append(node)
    for node in list(self.nodes):
      if node.op in ('Conv', 'Gemm') and node.inputs[1] in self.constants:
        self._fold_into(node, users)

  def _fold_into(self, node: Node, users: dict[str, list[Node]]) -> None:
    kernel = self.constants[node.inputs[1]]
    axis = 0 if node.op == 'Conv' else 1
    dtype, channels = kernel.dtype, kernel.shape[axis]
    weights = np.moveaxis(kernel.astype(np.float64), axis, -1)
    bias = np.zeros(channels)
    folded = False
    while len(users.get(node.output, ())) == 1:
      (user,) = users[node.output]
      step = self._affine(user, node.output, channels, kernel.ndim)
      if step is None:
        break
      factor, term = step
      weights, bias = weights * factor, bias * factor + term
      self.nodes.remove(user)
      node.output, folded = user.output, True
      self._made[node.output] = node
    if folded:
      weights = np.moveaxis(weights, -1, axis).astype(dtype)
      named = [self.constant(x) for x in (weights, bias.astype(dtype))]
      node.inputs = [node.inputs[0], *named]

  def _affine(self, node: Node, x: str, channels: int, rank: int):
    """(factor, term), scalars or [channels], if node is factor * x + term."""
    if node.op not in ('Add', 'Sub', 'Mul', 'Div'):
      return None
    left = node.inputs[0] == x
    other = self.constants.get(node.inputs[1 if left else 0])
    if other is None or other.ndim not in (0, rank):
      return None
    if other.size != 1 and other.shape[1] != other.size:
      return None
    if other.size not in (1, channels):
      return None
    c = other.astype(np.float64).reshape(-1)
    if node.op == 'Mul':
      return c, 0.0
    if node.op == 'Div':
      return (1 / c, 0.0) if left else None
    if node.op == 'Add':
      return 1.0, c
    return (1.0, -c) if left else (-1.0, c)

  def _drop_unused(self) -> None:
    needed, kept = {OUTPUT}, []
    for node in reversed(self.nodes):
      if node.output in needed:
        needed.update(node.inputs)
        kept.append(node)
    self.nodes = kept[::-1]
    self.constants = {k: v for k, v in self.constants.items() if k in needed}

  def write(
    self,
    path: pathlib.Path,
    shape: Sequence[int],
    classes: int,
    facts: Mapping[str, str],
  ) -> None:
    """Writes the file; input [N, *shape], output [N, classes], both float32.

    Args:
      path: The file.
      shape: (H, W, C).
      classes: Number of classes.
      facts: Metadata.
    """
    import onnx
    from onnx import helper, numpy_helper

    def value(name, *sizes):
      return helper.make_tensor_value_info(
        name, onnx.TensorProto.FLOAT, ['N', *sizes]
      )

    graph = helper.make_graph(
      [
        helper.make_node(n.op, n.inputs, [n.output], n.output, **n.attributes)
        for n in self.nodes
      ],
      'pfs_jax',
      [value(INPUT, *shape)],
      [value(OUTPUT, classes)],
      [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
    )
    model = helper.make_model(
      graph,
      producer_name='pfs_jax',
      ir_version=IR_VERSION,
      opset_imports=[helper.make_opsetid('', OPSET)],
    )
    helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
