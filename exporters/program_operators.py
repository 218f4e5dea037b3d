"""What the methods of a `.pte` really run, operator by operator, read from the file itself.

ExecuTorch lowers a graph through many passes, and `xnnpack_peephole` simplifies what comes out:
what XNNPACK is handed stands in the file alone.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir.schema import DelegateCall, KernelCall, Tensor

from cq_edge.errors import ExportError
from cq_edge.operators import Operator, Operators, merged
from exporters.program_file import read_program

_KINDS = {
    "convolution": ("Conv2d", "ConvTranspose2d"),
    "depthwise": ("DepthwiseConv2d",),
    "linear": ("FullyConnected",),
    "matmul": ("BatchMatrixMultiply",),
    "softmax": ("Softmax",),
    "elementwise": ("Add", "Subtract", "Multiply", "Div", "Minimum", "Maximum", "Clamp", "Negate",
                    "Abs", "Square", "Floor", "Ceiling", "PReLU", "LeakyReLU", "Hardswish"),
    "activation": ("Sigmoid", "Gelu", "Exp", "Log", "Tanh", "Sin", "Cos", "ELU", "SquareRoot",
                   "ReciprocalSquareRoot"),
    "mean": ("GlobalAvgPooling2d", "AvgPooling2d", "MaxPooling2d"),
    "layout": ("StaticTranspose", "Concatenate2", "Concatenate3", "Concatenate4", "Concatenate5",
               "StaticSlice", "StaticConstantPad", "StaticResizeBilinear2D", "Copy"),
    "reshape": ("StaticReshape",),
    "quantise": ("Convert",),
}  # fmt: skip
_KIND_OF = {f"XNN{operator}": kind for kind, names in _KINDS.items() for operator in names}
_BITS = {"fp32": 32, "fp16": 16, "int32": 32, "qint32": 32, "qcint32": 32, "qcint4": 4, "qbint4": 4}


@dataclass(frozen=True, slots=True)
class _Value:
    """A tensor of an XNNPACK graph: its type, its sizes, whether it is a constant."""

    dtype: str
    sizes: tuple[int, ...]
    is_constant: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * _BITS.get(self.dtype, 8) // 8


def program_operators(path: Path) -> dict[str, Operators]:
    """Returns the operators of each method of a `.pte` that is delegated to XNNPACK.

    Raises:
        ExportError: A delegate is another's, or runs an operator of a kind unknown here.
    """
    program = read_program(path).program
    found = {}
    for plan in program.execution_plan:
        operators: list[Operator] = []
        for instruction in (i.instr_args for chain in plan.chains for i in chain.instructions):
            if isinstance(instruction, DelegateCall):
                delegate = plan.delegates[instruction.delegate_index]
                if delegate.id != "XnnpackBackend":
                    raise ExportError(
                        f"{path.name}: {plan.name} is delegated to {delegate.id}: only "
                        "XnnpackBackend can be read"
                    )
                blob = bytes(program.backend_delegate_data[delegate.processed.index].data)
                operators.extend(_delegated(_read_graph(blob)))
            elif isinstance(instruction, KernelCall):
                tensors = [plan.values[i].val for i in dict.fromkeys(instruction.args)]
                operators.append(_outside([t for t in tensors if isinstance(t, Tensor)]))
        found[plan.name] = merged(operators)
    return found


def _read_graph(blob: bytes) -> dict[str, Any]:
    """Returns the XNNPACK graph in a delegate's bytes, as ExecuTorch's schema names its parts."""
    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with TemporaryDirectory() as name:
        folder = Path(name)
        schema, binary = folder / "schema.fbs", folder / "graph.bin"
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(blob[start : start + header.flatbuffer_size])
        _flatc_decompile(name, str(schema), str(binary), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
    # a ReLU's upper bound, as flatc writes it, is not JSON
    graph: dict[str, Any] = json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text))
    return graph


def _delegated(graph: Mapping[str, Any]) -> Iterator[Operator]:
    values = dict(map(_value, graph["xvalues"]))
    ends = [values[i].bytes for ids in ("input_ids", "output_ids") for i in graph[ids]]
    yield Operator("call", "float32", 1, 0, 0, 0, sum(ends), 0, 0)
    for node in graph["xnodes"]:
        name, operator = node["xnode_union_type"], node["xnode_union"]
        if name not in _KIND_OF:
            raise ExportError(f"XNNPACK operator {name} is of a kind unknown here")
        ids = {key: values[i] for key, i in operator.items() if key.endswith("_id") and i in values}
        yield _operator(_KIND_OF[name], operator, ids)


def _value(entry: Mapping[str, Any]) -> tuple[int, _Value]:
    union = entry["xvalue_union"]
    tensor = union.get("tensor_value", union)
    dtype = tensor["datatype"].removeprefix("xnn_datatype_")
    is_constant = tensor["constant_buffer_idx"] != 0
    return tensor["id_out"], _Value(dtype, tuple(tensor.get("dims", ())), is_constant)


def _operator(kind: str, operator: Mapping[str, Any], values: Mapping[str, _Value]) -> Operator:
    output = values["output_id"]
    inputs = [value for key, value in values.items() if key != "output_id"]
    batch, rows, depth, columns = _product(kind, operator, values)
    return Operator(
        kind=kind,
        dtype=_computes_on(inputs),
        batch=batch,
        rows=rows,
        depth=depth,
        columns=columns,
        read_bytes=sum(v.bytes for v in inputs if not v.is_constant),
        weight_bytes=sum(v.bytes for v in inputs if v.is_constant),
        written_bytes=output.bytes,
    )


def _computes_on(inputs: list[_Value]) -> str:
    types = {value.dtype for value in inputs}
    if types & {"qcint4", "qbint4"}:
        return "int4"
    if types & {"qdint8", "qcint8", "qint8"}:
        return "int8"
    return "float16" if "fp16" in types else "float32"


def _product(
    kind: str, operator: Mapping[str, Any], values: Mapping[str, _Value]
) -> tuple[int, int, int, int]:
    """Returns batch, rows, depth and columns; pictures have their channels last here."""
    sizes = values["output_id"].sizes
    if kind in ("convolution", "depthwise"):
        kernel = operator["kernel_height"] * operator["kernel_width"]
        depth = kernel * operator["group_input_channels"]
        columns, pixels = operator["group_output_channels"], math.prod(sizes[:-1])
        return operator["groups"], pixels, depth, columns
    if kind == "linear":
        depth = math.prod(values["filter_id"].sizes) // sizes[-1]
        return 1, math.prod(sizes[:-1]), depth, sizes[-1]
    if kind == "matmul":
        *batch, rows, columns = sizes
        return math.prod(batch), rows, values["input1_id"].sizes[-1], columns
    return 1, 0, 0, 0


def _outside(tensors: list[Tensor]) -> Operator:
    """Returns one of the portable kernels, whose last tensor is its result. A table that it looks
    rows up in is not read whole: no more is read than written."""
    sizes = [4 * math.prod(t.sizes) for t in tensors] or [0]
    written = sizes[-1]
    read = sum(min(size, written) for size in sizes[:-1])
    return Operator("outside", "float32", 1, 0, 0, 0, read, 0, written)
