"""Walks through jaxprs, the traced programs of JAX.

`walk` carries values of any kind through a program, equation by equation; the
caller computes the outputs of an equation. `surgery` follows channels in this
way, and `export` writes the operators of ONNX.

>>> import jax
>>> def names(equation, inputs):
...   print(equation.primitive.name, inputs)
...   return [max(inputs)] * len(equation.outvars)
>>> walk(jax.make_jaxpr(lambda x: -x + 2.0)(1.0), [7], names, float)
neg [7]
add [7, 2.0]
[7]
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

# Equations that call one program on their own inputs.
CALLS = frozenset(
  """checkpoint closed_call core_call custom_jvp_call custom_vjp_call
  custom_vjp_call_jaxpr jit pjit remat remat2""".split()
)


def called(equation: Any) -> Any | None:
  """The program that an equation calls on its inputs, None if there is none."""
  if equation.primitive.name not in CALLS:
    return None
  for parameter in equation.params.values():
    if isinstance(parameter, core.Jaxpr | core.ClosedJaxpr):
      inner = getattr(parameter, 'jaxpr', parameter)
      if len(inner.invars) == len(equation.invars):
        return parameter
  return None


def walk(
  program: Any,
  arguments: Sequence[Any],
  results: Callable[[Any, list[Any]], Sequence[Any]],
  constant: Callable[[Any], Any],
) -> list[Any]:
  """The values of a program's outputs.

  Args:
    program: A closed jaxpr, or an open one without constants.
    arguments: The values of its inputs.
    results: (equation, values of its inputs) -> values of its outputs.
    constant: The array of a constant or literal -> its value.
  """
  consts = getattr(program, 'consts', ())
  jaxpr = getattr(program, 'jaxpr', program)
  values = dict(zip(jaxpr.invars, arguments, strict=True))
  for var, const in zip(jaxpr.constvars, consts, strict=True):
    values[var] = constant(const)

  def read(atom):
    if isinstance(atom, core.Literal):
      return constant(atom.val)
    return values[atom]

  for equation in jaxpr.eqns:
    outputs = results(equation, [read(v) for v in equation.invars])
    values.update(zip(equation.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]
