"""What a lowered graph hands to its delegate, and what stays outside."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir.lowered_backend_module import get_lowered_backend_modules
from torch.export import ExportedProgram


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """One graph's delegation.

    Attributes:
        delegates: Pieces that the delegate runs; 1 is the best there is.
        delegated_ops_share: Operators inside them over all operators, 0…1.
        delegated_macs_share: Multiply-adds inside them over all multiply-adds, 0…1.
        macs: Multiply-adds of the whole graph.
        outside: Operators left to the portable kernels, by name, with their counts.
    """

    delegates: int
    delegated_ops_share: float
    delegated_macs_share: float
    macs: int
    outside: Mapping[str, int]


def operator_report(program: ExportedProgram) -> OperatorReport:
    """Returns the report of one lowered method."""
    lowered = get_lowered_backend_modules(program.graph_module)
    inside = [node for module in lowered for node in _operators(module.original_module)]
    outside = list(_operators(program))
    macs_inside = sum(map(multiply_adds, inside))
    macs = macs_inside + sum(map(multiply_adds, outside))
    count = len(inside) + len(outside)
    return OperatorReport(
        delegates=len(lowered),
        delegated_ops_share=len(inside) / count if count else 0.0,
        delegated_macs_share=macs_inside / macs if macs else 1.0,
        macs=macs,
        outside=dict(Counter(_name(node) for node in outside)),
    )


def multiply_adds(node: torch.fx.Node) -> int:
    """Returns the multiply-adds of one edge operator; 0 for all that multiply no matrices."""
    name = _name(node)
    if name == "aten.convolution.default":
        weight = _shape(node.args[1])
        # a transposed convolution's weight starts with its input's channels
        per_output = math.prod(weight[1:])
        pixels = _shape(node.args[0]) if node.args[6] else _shape(node)
        return math.prod(pixels) * per_output
    if name == "aten.linear.default":
        return math.prod(_shape(node)) * _shape(node.args[1])[-1]
    if name == "aten.addmm.default":
        return math.prod(_shape(node)) * _shape(node.args[1])[-1]
    if name in ("aten.mm.default", "aten.bmm.default"):
        return math.prod(_shape(node)) * _shape(node.args[0])[-1]
    return 0


def _operators(program: ExportedProgram) -> Iterator[torch.fx.Node]:
    for node in program.graph.nodes:
        if node.op == "call_function" and _name(node) not in (
            "getitem",
            "executorch_call_delegate.default",
        ):
            yield node


def _name(node: torch.fx.Node) -> str:
    name = getattr(node.target, "name", None)
    if name is None:
        return str(getattr(node.target, "__name__", node.target))
    text: str = (name() if callable(name) else name).replace("::", ".")
    overload = getattr(node.target, "_overloadname", None) or "default"
    return text if text.count(".") > 1 else f"{text}.{overload}"


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
