"""torch modules become Core ML packages: float16 inside, float32 at the edges.

On iOS 18 the full and the shallow graph are two functions of one package and share their
weights; iOS 17 has no such packages and gets one for each graph.
"""

import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from torch import nn

from cq_edge.errors import ExportError
from cq_edge.quiet import without_chatter
from exporters.coreml_torch_ops import register_torch_ops
from exporters.graph_spec import GraphSpec

TARGETS = {"ios17": ct.target.iOS17, "ios18": ct.target.iOS18}
UNET_GRAPHS = ("denoise", "denoise_shallow")
_WEIGHTS = Path("Data") / "com.apple.CoreML" / "weights" / "weight.bin"
_SOLE = "main"  # what Core ML calls the function of a package that has one
_PACKAGES = {
    "encode": "TextEncoder",
    "denoise": "Unet",
    "denoise_shallow": "UnetShallow",
    "decode": "VAEDecoder",
}
_BEFORE_SINUSOIDS = ("cast", "const", "expand_dims", "mul", "reshape")
_NUMPY = {"float32": np.float32, "int64": np.int32}  # Core ML has no int64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a graph lies: a package's name, the function in it, and how many bytes the graph's
    weights would take alone."""

    package: str
    function: str
    weight_bytes: int


def export_coreml(
    modules: Mapping[str, nn.Module],
    specs: Mapping[str, GraphSpec],
    folder: Path,
    target: str = "ios18",
    compress: Callable[[Any], Any] = lambda model: model,
    *,
    float32_stream: bool = False,
) -> dict[str, Place]:
    """Writes a package for each graph, or one for both UNet graphs, and returns where they are.

    That they compute the right numbers is for `parity.check_parity` to say.

    Args:
        modules: Float modules by graph name, in evaluation mode.
        specs: Their contracts: names, shapes and element types.
        folder: Where the packages are put.
        target: One of `TARGETS`: the oldest system that is to run them.
        compress: Maps a UNet graph's Core ML model to one with smaller weights; equal weights
            must become equal.
        float32_stream: As `half_precision` takes it.

    Raises:
        ExportError: A module cannot be traced, converted or compressed; names the graph.
    """
    places = {}
    shares = target != "ios17" and set(UNET_GRAPHS) <= set(modules)
    with quiet(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, module in modules.items():
            shared = shares and name in UNET_GRAPHS
            package = (Path(scratch) if shared else folder) / f"{_PACKAGES[name]}.mlpackage"
            model = _convert(module, specs[name], target, float32_stream)
            if name in UNET_GRAPHS:
                model = _named(name, "compressed", partial(compress, model))
            _save(model, package)
            places[name] = Place(package.name, _SOLE, weight_bytes(package))
        if shares:
            sources = {name: Path(scratch) / places[name].package for name in UNET_GRAPHS}
            merged = f"{_PACKAGES['denoise']}.mlpackage"
            _merge(sources, folder / merged)
            places |= {
                name: replace(places[name], package=merged, function=name) for name in UNET_GRAPHS
            }
    return places


def weight_bytes(package: Path) -> int:
    """Returns the size of a package's weight file, 0 where all its constants are in the program."""
    path = package / _WEIGHTS
    return path.stat().st_size if path.exists() else 0


def _convert(module: nn.Module, spec: GraphSpec, target: str, float32_stream: bool) -> Any:
    if module.training:
        raise ExportError(f"graph {spec.name} is in training mode: call eval() on its module first")
    examples = tuple(torch.zeros(i.shape, dtype=getattr(torch, i.dtype)) for i in spec.inputs)

    def convert() -> Any:
        register_torch_ops()
        with torch.no_grad():
            program = torch.export.export(module, examples, strict=False).run_decompositions({})
        return ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=TARGETS[target],
            compute_precision=half_precision(float32_stream=float32_stream),
            skip_model_load=True,
            inputs=[ct.TensorType(i.name, i.shape, _NUMPY[i.dtype]) for i in spec.inputs],
            outputs=[ct.TensorType(o.name, dtype=_NUMPY[o.dtype]) for o in spec.outputs],
        )

    return _named(spec.name, "converted", convert)


def half_precision(*, float32_stream: bool) -> Any:
    """Returns what tells coremltools to compute in float16, but for what would not bear it.

    Args:
        float32_stream: Whether the residual stream of the last up block is in float32 too: at the
            last timesteps the noise prediction is a small difference of what flows there.
    """

    def is_selected(operation: Any) -> bool:
        in_stream = float32_stream and _is_in_last_stream(operation)
        return not in_stream and _is_computed_in_float16(operation)

    return ct.transform.FP16ComputePrecision(is_selected)


def _is_computed_in_float16(operation: Any) -> bool:
    """Returns whether an operation is rounded to float16: all are but those that lead to the
    timestep's sinusoids, where float16 cannot tell neighbouring timesteps apart; and the
    convolution of the latents, in which the last timesteps' noise is so small that rounding them
    would alone cost the noise prediction what float16 may cost."""
    if operation.op_type.startswith("constexpr_"):  # a weight: as what computes with it
        return all(map(_is_computed_in_float16, operation.outputs[0].child_ops))
    return not _leads_to_sinusoids(operation) and not _reads_latents(operation)


def _reads_latents(operation: Any) -> bool:
    return operation.op_type == "conv" and operation.x.op is None  # an input of the graph


def _leads_to_sinusoids(operation: Any) -> bool:
    if operation.op_type in ("sin", "cos"):
        return True
    if operation.op_type not in _BEFORE_SINUSOIDS:
        return False
    readers = [reader for value in operation.outputs for reader in value.child_ops]
    return bool(readers) and all(map(_leads_to_sinusoids, readers))


def _is_in_last_stream(operation: Any) -> bool:
    """Returns whether an operation of the last up block joins a skip to the stream, narrows the
    two to the stream's channels, or adds a layer's result."""
    block = operation.enclosing_block
    size = block.outputs[0].shape[2:]

    def is_join(other: Any) -> bool:
        return other.op_type == "concat" and bool(other.outputs[0].shape[2:] == size)

    if operation.op_type == "conv":
        return operation.x.op is not None and is_join(operation.x.op)
    if operation.op_type == "add" and operation.x.shape == operation.y.shape:
        before = takewhile(lambda other: other is not operation, block.operations)
        return bool(operation.x.shape[2:] == size) and any(map(is_join, before))
    return is_join(operation)


def _merge(sources: Mapping[str, Path], package: Path) -> None:
    """Writes one package with the sole function of each source under the graph's name."""

    def merge() -> None:
        parts = ct.utils.MultiFunctionDescriptor()
        for name, source in sources.items():
            parts.add_function(str(source), _SOLE, name)
        parts.default_function_name = next(iter(sources))
        ct.utils.save_multifunction(parts, str(package))

    _named(" and ".join(sources), "put into one package", merge)


def _save(model: Any, package: Path) -> None:
    model.save(str(package))
    # the front end's table of torch's nodes: nothing reads it on a device
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)


def _named(graph: str, done: str, action: Callable[[], Any]) -> Any:
    """Returns what an action of the toolchain returns; its errors name the graph."""
    try:
        return action()
    except Exception as error:
        raise ExportError(f"graph {graph} could not be {done}: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the toolchain's progress bars, logs and deprecations; errors still raise."""
    with without_chatter(logging.ERROR), redirect_stderr(io.StringIO()):
        yield
