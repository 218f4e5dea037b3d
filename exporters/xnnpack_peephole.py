"""Removes work from a lowered XNNPACK graph that changes no number.

ExecuTorch lowers operator by operator: a picture that leaves channels last and returns to it is
transposed twice, a constant is transposed anew in every run, and three projections of the same
tokens each quantise them. On small pictures such operators cost as much as the convolutions.
Physical layouts are explicit in the XNNPACK graph, which makes them easy to see there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import executorch.backends.xnnpack.xnnpack_preprocess as preprocess
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNGraph,
    XNNQuantizedTensorValue,
    XNNStaticReshape,
    XNNStaticTranspose,
    XNNTensorValue,
    XNode,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_INVALID_VALUE_ID

_original_serialize = preprocess.serialize_xnnpack_binary


@contextmanager
def simplified_xnnpack_graphs() -> Iterator[None]:
    """Simplifies every XNNPACK graph lowered within the context."""

    def serialize(graph: XNNGraph, constants: bytearray) -> bytes:
        simplify(graph)
        binary: bytes = _original_serialize(graph, constants)
        return binary

    preprocess.serialize_xnnpack_binary = serialize
    try:
        yield
    finally:
        preprocess.serialize_xnnpack_binary = _original_serialize


def simplify(graph: XNNGraph) -> None:
    """Merges transposes, drops those that move nothing, shares equal operators, in place."""
    _Simplifier(graph).run()


class _Simplifier:
    """One walk in execution order; `aliases` maps a dropped value to the one that replaces it."""

    def __init__(self, graph: XNNGraph) -> None:
        self.graph = graph
        self.values = {_tensor(value).id_out: value for value in graph.xvalues}
        self.aliases: dict[int, int] = {}
        self.producers: dict[int, XNode] = {}
        self.seen: dict[str, int] = {}

    def run(self) -> None:
        kept = [node for node in self.graph.xnodes if not self._is_dropped(node)]
        self.graph.xnodes = _live(kept, set(self.graph.output_ids))
        used = {i for node in self.graph.xnodes for i in (*_inputs(node), _output(node))}
        used.update(self.graph.input_ids, self.graph.output_ids)
        self.graph.xvalues = [v for v in self.graph.xvalues if _tensor(v).id_out in used]

    def _is_dropped(self, node: XNode) -> bool:
        operator = node.xnode_union
        for name in _input_names(operator):
            value = getattr(operator, name)
            setattr(operator, name, self.aliases.get(value, value))
        output = _output(node)
        is_external = output in self.graph.output_ids
        if isinstance(operator, XNNStaticTranspose | XNNStaticReshape):
            self._reach_through(operator)
            if not is_external and self._moves_nothing(operator):
                return True
        key = self._key(node)
        if not is_external and key in self.seen:
            self.aliases[output] = self.seen[key]
            return True
        if not is_external:
            self.seen[key] = output
        self.producers[output] = node
        return False

    def _reach_through(self, operator: XNNStaticTranspose | XNNStaticReshape) -> None:
        """Makes a transpose of a transpose, or reshape of a reshape, read the original."""
        producer = self.producers.get(operator.input_id)
        if producer is None or type(producer.xnode_union) is not type(operator):
            return
        before: Any = producer.xnode_union
        if isinstance(operator, XNNStaticTranspose):
            operator.perm = [before.perm[axis] for axis in operator.perm]
        operator.input_id = before.input_id

    def _moves_nothing(self, operator: XNNStaticTranspose | XNNStaticReshape) -> bool:
        source = _tensor(self.values[operator.input_id])
        result = _tensor(self.values[operator.output_id])
        if list(source.dims) == list(result.dims) and _keeps_order(operator, source):
            self.aliases[operator.output_id] = operator.input_id
            return True
        if source.constant_buffer_idx != 0 and _keeps_order(operator, source):
            result.constant_buffer_idx = source.constant_buffer_idx
            return True
        return False

    def _key(self, node: XNode) -> str:
        """Returns what two nodes that compute the same have in common."""
        operator = node.xnode_union
        parts = [
            f"{f.name}={getattr(operator, f.name)}"
            for f in fields(operator)
            if f.name != "output_id"
        ]
        value = self.values[_output(node)].xvalue_union
        result = _tensor(self.values[_output(node)])
        quantisation = value.quant_params if isinstance(value, XNNQuantizedTensorValue) else None
        shape = f"{result.datatype} {list(result.dims)} {quantisation} {node.output_min_max}"
        return f"{type(operator).__name__} {parts} {shape}"


def _keeps_order(operator: XNNStaticTranspose | XNNStaticReshape, source: XNNTensorValue) -> bool:
    if isinstance(operator, XNNStaticReshape):
        return True
    moved = [axis for axis in operator.perm if source.dims[axis] != 1]
    return moved == sorted(moved)


def _live(nodes: list[XNode], needed: set[int]) -> list[XNode]:
    kept = []
    for node in reversed(nodes):
        if _output(node) in needed:
            kept.append(node)
            needed.update(_inputs(node))
    return kept[::-1]


def _tensor(value: Any) -> XNNTensorValue:
    union = value.xvalue_union
    return union.tensor_value if isinstance(union, XNNQuantizedTensorValue) else union


def _input_names(operator: object) -> list[str]:
    names = [f.name for f in fields(operator)]  # type: ignore[arg-type]
    return [n for n in names if n.endswith("_id") and n != "output_id"]


def _inputs(node: XNode) -> list[int]:
    ids = [getattr(node.xnode_union, name) for name in _input_names(node.xnode_union)]
    return [i for i in ids if i != XNN_INVALID_VALUE_ID]


def _output(node: XNode) -> int:
    output: int = node.xnode_union.output_id
    return output
