"""torch modules become one ExecuTorch program whose methods are delegated to Core ML whole.

For apps that link ExecuTorch on iOS or macOS. Inside lies one Core ML model with a function for
each method; what the methods share is stored once. iOS 18 / macOS 15 and later.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import torch
from executorch.backends.apple.coreml import executorchcoreml
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import nn

from cq_edge.errors import ExportError
from exporters.coreml_torch_ops import register_torch_ops
from exporters.graph_spec import GraphSpec
from exporters.to_coreml import half_precision, quiet
from exporters.to_executorch import example_inputs

_PRECISION = "model_compute_precision_from_compile_specs"


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the program: the Core ML function that computes it, and what that one calls the
    method's inputs and outputs, in the method's order."""

    package: Path
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def export_executorch_coreml(
    modules: Mapping[str, nn.Module],
    specs: Mapping[str, GraphSpec],
    path: Path,
    *,
    float32_stream: bool = False,
) -> None:
    """Writes a `.pte` whose methods are the given modules.

    That it computes the right numbers is for `parity.check_parity` to say, of what
    `unpacked_methods` finds in it.

    Args:
        modules: In evaluation mode, by graph; weights float or of `weight_only`.
        specs: Their contracts.
        path: The file, written beside its place and then renamed.
        float32_stream: As `to_coreml.half_precision` takes it.

    Raises:
        ExportError: A module cannot be traced or lowered, or not whole.
    """
    compile_specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT16
    )
    try:
        with quiet(), _precision(half_precision(float32_stream=float32_stream)), torch.no_grad():
            register_torch_ops()
            programs = {
                name: torch.export.export(module, example_inputs(specs[name]), strict=False)
                for name, module in modules.items()
            }
            edge = to_edge_transform_and_lower(
                programs, partitioner=[CoreMLPartitioner(compile_specs=compile_specs)]
            )
            content = edge.to_executorch().buffer
    except Exception as error:
        raise ExportError(f"{', '.join(modules)} could not be lowered: {error}") from error
    for plan in deserialize_pte_binary(content).program.execution_plan:
        if len(plan.delegates) != 1 or plan.operators:
            outside = ", ".join(operator.name for operator in plan.operators) or "nothing"
            raise ExportError(
                f"graph {plan.name} is {len(plan.delegates)} pieces of Core ML and outside it "
                f"{outside}: it should be one piece"
            )
    beside = path.with_name(f"{path.name}.partial")
    beside.write_bytes(content)
    beside.replace(path)


def unpacked_methods(path: Path, folder: Path) -> dict[str, Method]:
    """Unpacks the Core ML model of a `.pte` of this kind and returns its methods by name.

    Args:
        path: The program.
        folder: Where the model is put; made where it is missing.

    Raises:
        ExportError: There is no such model in the program.
    """
    file = deserialize_pte_binary(path.read_bytes())
    named = file.named_data
    packed = [named.buffers[entry.buffer_index] for entry in named.pte_data.values()]
    if len(packed) != 1:
        raise ExportError(f"{path.name} holds {len(packed)} Core ML models, not 1")
    folder.mkdir(parents=True, exist_ok=True)
    executorchcoreml.unflatten_directory_contents(bytes(packed[0]), str(folder))
    (metadata,) = folder.glob("*/metadata.json")  # in a folder named for the delegate's place
    names = json.loads(metadata.read_text(encoding="utf-8"))["methods"]
    package = metadata.parent / "model.mlpackage"
    return {
        plan.name: _method(plan, package, names[plan.name]) for plan in file.program.execution_plan
    }


def _method(plan: Any, package: Path, names: Mapping[str, list[str]]) -> Method:
    """Returns a method whose one instruction calls the delegate, with values in an order that is
    not the method's own."""
    (instruction,) = plan.chains[0].instructions
    values = zip(
        instruction.instr_args.args, [*names["inputNames"], *names["outputNames"]], strict=True
    )
    by_value = dict(values)
    inputs, outputs = (tuple(by_value[v] for v in side) for side in (plan.inputs, plan.outputs))
    return Method(package, plan.name, inputs, outputs)


@contextmanager
def _precision(ours: Any) -> Iterator[None]:
    """Makes ExecuTorch convert with the operators in float32 that `to_coreml` keeps there; its
    options know one precision for all."""
    theirs: Callable[..., Any] = getattr(CoreMLBackend, _PRECISION)
    setattr(CoreMLBackend, _PRECISION, staticmethod(lambda _specs: ours))
    try:
        yield
    finally:
        setattr(CoreMLBackend, _PRECISION, staticmethod(theirs))
