"""`cq-edge build --layout executorch`: a `.pte` with Core ML inside, for apps that link
ExecuTorch."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from apps.build_coreml import FLOAT16_FLOOR_DB, Arrays, CoreMLOptions, stored_unet

if TYPE_CHECKING:
    from torch import nn

    from exporters.graph_spec import GraphSpec
    from exporters.parity import Graph
    from exporters.to_executorch_coreml import Method
    from runtime.mil.interpreter import ReferenceFunction

DELEGATE_FILE = "coreml.pte"
_OWN_ROUNDING = ("float16", "torchao-int8", "torchao-int4", "w8a8")


def delegate_options(options: CoreMLOptions) -> CoreMLOptions:
    """Returns the options with the nearest weights that ExecuTorch can carry: those that are
    rounded before the conversion."""
    if options.weights in _OWN_ROUNDING:
        return options
    return replace(options, weights="torchao-int4" if options.weights == "int4" else "torchao-int8")


def write_delegate(
    modules: "Mapping[str, nn.Module]",
    specs: "Mapping[str, GraphSpec]",
    inputs: Mapping[str, Sequence[Arrays]],
    options: CoreMLOptions,
    path: Path,
) -> None:
    """Writes the program, and checks each method by unpacking the Core ML model in it.

    Args:
        modules: The float modules by graph.
        specs: Their contracts.
        inputs: Sets of inputs of each graph.
        options: Weights and floors; those of `delegate_options` are taken.
        path: The file.

    Raises:
        ExportError: A graph cannot be lowered, or not whole.
        ParityError: One computes something else than its float module.
    """
    from exporters.module_graph import module_graph
    from exporters.parity import check_parity
    from exporters.to_coreml import UNET_GRAPHS
    from exporters.to_executorch_coreml import export_executorch_coreml, unpacked_methods
    from runtime.mil.interpreter import read_functions

    options = delegate_options(options)
    stored = {**modules, **stored_unet(modules, inputs, options)}
    export_executorch_coreml(stored, specs, path, float32_stream=options.float32_stream)
    with tempfile.TemporaryDirectory() as scratch:
        methods = unpacked_methods(path, Path(scratch))
        functions = read_functions(methods["denoise"].package)
    for name in tqdm(specs, desc="check ExecuTorch's Core ML", unit="graph"):
        run = _named(functions[name], methods[name], specs[name])
        given = (inputs[name][0], inputs[name][-1])
        floor_db = options.unet_floor_db if name in UNET_GRAPHS else FLOAT16_FLOOR_DB
        check_parity(name, module_graph(modules[name], specs[name]), run, given, floor_db)


def _named(function: "ReferenceFunction", method: "Method", spec: "GraphSpec") -> "Graph":
    """Returns a function with inputs and outputs named as the contract names them."""

    def run(arrays: Arrays) -> Arrays:
        given = {n: arrays[i.name] for i, n in zip(spec.inputs, method.inputs, strict=True)}
        found = function.run(given)
        return {o.name: found[n] for o, n in zip(spec.outputs, method.outputs, strict=True)}

    return run
