"""What a function costs as its input grows: its matrix products, and how many of them must wait for one another.

XLA's own figure (`compiled.cost_analysis()`) charges the body of a loop once, whatever the number of trips, so that a
recurrent network seems to cost the same at every length. Here the jaxpr is read and a scan is charged for every trip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

UNREACHED = -math.inf


class Cost(NamedTuple):
  flops: float
  """Of matrix products and convolutions; 2 for a multiplication and addition."""
  chain: int
  """Sequential operations: products on the longest path from an input to an output."""


def cost(function: Callable, *arguments: Any) -> Cost:
  """Of `function` on arguments of these shapes (arrays or `jax.ShapeDtypeStruct`s); nothing is computed.

  Raises:
    ValueError: it has a while loop, whose trips are not known beforehand.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  depths, flops = _walk(jaxpr, [0.0] * len(jaxpr.invars))
  return Cost(flops, int(max((depth for depth in depths if depth != UNREACHED), default=0)))


def loop_free_flops(function: Callable, *arguments: Any) -> float:
  """XLA's figure for the compiled program, elementwise operations included; loop bodies count once."""
  return float(jax.jit(function).lower(*arguments).compile().cost_analysis()['flops'])


def power(lengths, values) -> float:
  """The exponent p of value ~ length^p, by least squares on logarithms."""
  return float(np.polyfit(np.log(np.asarray(lengths, float)), np.log(np.asarray(values, float)), 1)[0])


def _walk(jaxpr: core.Jaxpr, depths: list[float]) -> tuple[list[float], float]:
  """Depth of every output, given that of every input; and FLOPs."""
  known, flops = dict(zip(jaxpr.invars, depths)), 0.0

  def depth(atom) -> float:
    return UNREACHED if isinstance(atom, core.Literal) else known.get(atom, UNREACHED)

  for equation in jaxpr.eqns:
    inputs = [depth(atom) for atom in equation.invars]
    outputs, charge = _equation(equation, inputs)
    flops += charge
    known.update(zip(equation.outvars, outputs))
  return [depth(atom) for atom in jaxpr.outvars], flops


def _equation(equation, inputs: list[float]) -> tuple[list[float], float]:
  name, parameters = equation.primitive.name, equation.params
  if name == 'scan':
    return _scan(parameters, inputs)
  if name == 'while':
    raise ValueError('A while loop has no number of trips that is known beforehand; write it as a scan.')
  if name == 'cond':
    branches = [_walk(branch.jaxpr, inputs[1:]) for branch in parameters['branches']]
    return [max(depths) for depths in zip(*(outputs for outputs, _ in branches))], max(f for _, f in branches)
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    if key in parameters:
      inner = parameters[key]
      return _walk(getattr(inner, 'jaxpr', inner), inputs)
  flops = _product_flops(equation)
  deepest = max(inputs, default=UNREACHED) + (1 if flops else 0)
  return [deepest] * len(equation.outvars), flops


def _scan(parameters, inputs: list[float]) -> tuple[list[float], float]:
  """All trips in turn: a trip waits for the one before it by the carried values alone."""
  body, length = parameters['jaxpr'].jaxpr, parameters['length']
  constants, carried = parameters['num_consts'], parameters['num_carry']
  carry, flops = inputs[constants:constants + carried], 0.0
  outputs = [UNREACHED] * len(body.outvars)
  for _ in range(length):
    depths, charge = _walk(body, [*inputs[:constants], *carry, *inputs[constants + carried:]])
    carry, flops = depths[:carried], flops + charge
    outputs = [max(pair) for pair in zip(outputs, depths)]
  return [*carry, *outputs[carried:]], flops


def _product_flops(equation) -> float:
  name = equation.primitive.name
  if name == 'dot_general':
    (contracted, _), _ = equation.params['dimension_numbers']
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
  elif name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    inner = math.prod(kernel) // kernel[equation.params['dimension_numbers'].rhs_spec[0]]
  else:
    return 0.0
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
