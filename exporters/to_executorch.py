"""torch modules become one ExecuTorch program file with a method each, delegated to XNNPACK.

Weights that methods share are stored once, under the hash of their content.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import CatConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.backend import utils as backend_utils
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Node

from cq_edge.errors import ExportError
from cq_edge.freed_memory import forget_pages, give_back
from cq_edge.quiet import without_chatter
from exporters.graph_spec import GraphSpec
from exporters.lean_partitioner import lean_partitioner
from exporters.operator_report import OperatorReport, operator_report
from exporters.parity import Arrays
from exporters.uncopied_constants import uncopied_constants
from exporters.xnnpack_mend import mended_channels_last_pass
from exporters.xnnpack_peephole import simplified_xnnpack_graphs

Modules = Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]]
_DTYPES = {"float32": np.float32, "int64": np.int64}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written: the file's bytes and each graph's delegation."""

    bytes: int
    graphs: Mapping[str, OperatorReport]


def export_executorch(modules: Modules, path: Path) -> ExportReport:
    """Writes one `.pte` whose methods are the given modules, and returns what it holds.

    The file is written beside its place and then renamed, so that no half of one is ever found
    there. That it computes the right numbers is for `parity.check_parity` to say.

    Args:
        modules: For each method its module, in evaluation mode and float32 or quantised, and
            example inputs, whose shapes the method has from then on.
        path: The file; what is there is replaced.

    Raises:
        ExportError: If a module cannot be traced or lowered; names the method.
    """
    with without_chatter():
        programs = {name: _trace(name, *traced) for name, traced in modules.items()}
        try:
            with (
                mended_channels_last_pass(),
                simplified_xnnpack_graphs(),
                uncopied_constants(),
                lean_partitioner(),
            ):
                edge = to_edge_transform_and_lower(
                    programs,
                    partitioner=[XnnpackPartitioner(configs=_partitioner_configs())],
                    compile_config=EdgeCompileConfig(_check_ir_validity=False),
                )
            graphs = {name: operator_report(edge.exported_program(name)) for name in modules}
            program = edge.to_executorch()
        except Exception as error:
            raise ExportError(f"{', '.join(modules)} could not be lowered: {error}") from error
        finally:
            # they hold nodes and graphs, and so all constants
            backend_utils.is_same_node.cache_clear()
            FakeTensorMode.cache_clear()
    beside = path.with_name(f"{path.name}.partial")
    with beside.open("wb") as file:
        program.write_to_file(file)
    beside.replace(path)
    return ExportReport(path.stat().st_size, graphs)


def example_inputs(spec: GraphSpec) -> tuple[Tensor, ...]:
    """Returns zeros of a graph's input shapes and types, to trace its module with."""
    return tuple(torch.from_numpy(np.zeros(i.shape, _DTYPES[i.dtype])) for i in spec.inputs)


def load_graph(path: Path, spec: GraphSpec) -> Callable[[Arrays], dict[str, NDArray[np.generic]]]:
    """Returns the file's method `spec.name` as a function of named arrays.

    For checking exports here; what ships runs through `runtime`.

    Raises:
        ExportError: If the file has no such method.
    """
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    if spec.name not in program.method_names:
        has = ", ".join(sorted(program.method_names))
        raise ExportError(f"{path.name} has no method {spec.name}: it has {has}")
    method = program.load_method(spec.name)
    forget_pages(path)

    def run(arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        inputs = [
            torch.from_numpy(np.ascontiguousarray(arrays[i.name], dtype=_DTYPES[i.dtype]))
            for i in spec.inputs
        ]
        outputs = method.execute(inputs)
        # the engine reuses its output buffers in the next run
        return {o.name: t.numpy().copy() for o, t in zip(spec.outputs, outputs, strict=True)}

    return run


class OneGraphAtATime:
    """Runs a file's methods with one of them loaded: a loaded graph has its weights in memory."""

    def __init__(self, path: Path, specs: Mapping[str, GraphSpec]) -> None:
        self._path = path
        self._specs = specs
        self._loaded: tuple[str, Callable[[Arrays], Arrays]] | None = None

    def run(self, name: str, arrays: Arrays) -> Arrays:
        """Returns a method's outputs by name.

        Raises:
            ExportError: If the file has no such method.
        """
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # before the next is there
            give_back()
            self._loaded = name, load_graph(self._path, self._specs[name])
        return self._loaded[1](arrays)


def tensor_function(
    graph: Callable[[Arrays], dict[str, NDArray[np.generic]]], spec: GraphSpec
) -> Callable[..., Any]:
    """Returns a graph as a function of tensors in call order, as its module is."""

    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        arrays = {i.name: t.numpy() for i, t in zip(spec.inputs, tensors, strict=True)}
        found = graph(arrays)
        outputs = tuple(torch.from_numpy(found[o.name]) for o in spec.outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    return run


class _SelfCatConfig(CatConfig):  # type: ignore[misc]
    """Also takes a concatenation of a tensor with itself, which is nearest upsampling."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Returns whether two tensors or more are concatenated, equal ones counted apart."""
        tensors: Any = node.args[0]
        return bool(self.check_common_constraints(node, ep)) and len(tensors) >= 2


def _partitioner_configs() -> list[type]:
    return [_SelfCatConfig if c is CatConfig else c for c in ALL_PARTITIONER_CONFIGS]


def _trace(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    if module.training:
        raise ExportError(f"graph {name} is in training mode: call eval() on its module first")
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, strict=False)
    except Exception as error:
        raise ExportError(f"graph {name} could not be traced: {error}") from error
