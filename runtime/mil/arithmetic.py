"""Operators that compute each element by itself, or fold axes away."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.mil.arguments import Arguments

Operator = Callable[[Arguments], Tensor | tuple[Tensor, ...]]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda given: function(given.tensor("x"))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda given: function(given.tensor("x"), given.tensor("y"))


def _clip(given: Arguments) -> Tensor:
    return given.tensor("x").clamp(given.number("alpha", 0.0), given.number("beta", 1.0))


def _gelu(given: Arguments) -> Tensor:
    x, mode = given.tensor("x"), given.text("mode", "EXACT")
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise given.refuse(f"mode {mode}")


def _softmax(given: Arguments) -> Tensor:
    return given.tensor("x").softmax(given.integer("axis", -1))


def _select(given: Arguments) -> Tensor:
    return torch.where(given.tensor("cond").bool(), given.tensor("a"), given.tensor("b"))


def _reduce_mean(given: Arguments) -> Tensor:
    x = given.tensor("x")
    return x.mean(given.integers("axes", range(x.dim())), keepdim=given.flag("keep_dims"))


def _reduce_sum(given: Arguments) -> Tensor:
    x = given.tensor("x")
    return x.sum(given.integers("axes", range(x.dim())), keepdim=given.flag("keep_dims"))


def _reduce_max(given: Arguments) -> Tensor:
    x = given.tensor("x")
    return x.amax(given.integers("axes", range(x.dim())), keepdim=given.flag("keep_dims"))


def _reduce_argmax(given: Arguments) -> Tensor:
    return given.tensor("x").argmax(given.integer("axis", -1), keepdim=given.flag("keep_dims"))


ARITHMETIC: dict[str, Operator] = {
    "add": _binary(torch.add),
    "cast": _unary(lambda x: x),  # the interpreter stores every result as its declared type
    "clip": _clip,
    "cos": _unary(torch.cos),
    "equal": _binary(torch.eq),
    "exp": _unary(torch.exp),
    "gelu": _gelu,
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "logical_and": _binary(torch.logical_and),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mul": _binary(torch.mul),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "reduce_argmax": _reduce_argmax,
    "reduce_max": _reduce_max,
    "reduce_mean": _reduce_mean,
    "reduce_sum": _reduce_sum,
    "relu": _unary(torch.relu),
    "select": _select,
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "softmax": _softmax,
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "sub": _binary(torch.sub),
    "tanh": _unary(torch.tanh),
}
"""By the operator's name in a Core ML program."""
