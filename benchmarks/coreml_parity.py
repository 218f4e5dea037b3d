"""`python -m benchmarks.coreml_parity`: how the Core ML UNet agrees with the float module.

Exports both UNet graphs with weights of each kind asked for, and runs them from the disk with the
reference interpreter on inputs of a calibration run: an early step, a late one, and the worst of
all that were sampled; each at its worst output, in dB.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.build_coreml import (
    COMPRESSION,
    WEIGHTS,
    Arrays,
    CoreMLOptions,
    stored_unet,
    weight_compressor,
)
from apps.quiet import quiet_toolchains
from benchmarks.unet_graphs import unet_graphs
from cq_edge.metrics import sqnr_db

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import nn

    from exporters.graph_spec import GraphSpec

    Modules = Mapping[str, nn.Module]
    Specs = Mapping[str, GraphSpec]

_PROMPTS = ("a large red circle on a plain white background", "a small green ring")
_KINDS = "float16,mixed:4,int8,torchao-int8,palette6,mixed:6,int4,torchao-int4,mixed:8,w8a8"


def main() -> int:
    """Prints the table as Markdown and returns the exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a diffusers folder (default: the demo model)")
    parser.add_argument("--weights", default=_KINDS, help="names as `cq-edge build` takes them, "
        "mixed with its compression (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="of DDIM (default: %(default)s)")
    args = parser.parse_args()
    kinds = [_options(parser, kind) for kind in args.weights.split(",")]
    with quiet_toolchains():
        from cq_edge.model.load import load_pipeline

        pipeline = load_pipeline(args.model)
    inputs = _inputs(pipeline, args.steps)
    modules, specs = unet_graphs(pipeline.unet)
    first, last = (inputs["denoise"][i]["timestep"].item() for i in (0, -1))
    print(f"| weights | float32 over both | full, t = {first:g} | t = {last:g} | worst | "
          f"shallow, t = {first:g} | t = {last:g} | worst |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, options in zip(args.weights.split(","), kinds, strict=True):
        print(f"{name}…", file=sys.stderr)
        compress = weight_compressor(modules["denoise"], inputs["denoise"], options)
        exported = stored_unet(modules, inputs, options)
        stream = options.float32_stream
        smaller, agreements = _measured(modules, exported, specs, inputs, compress, stream)
        cells = [f"{db:.1f}" for each in agreements for db in (each[0], each[-1], min(each))]
        print(f"| {name} | {smaller:.2f} | {' | '.join(cells)} |", flush=True)
    return 0


def _options(parser: argparse.ArgumentParser, kind: str) -> CoreMLOptions:
    weights, _, compression = kind.partition(":")
    if weights not in WEIGHTS:
        parser.error(f"{kind!r} is none of {', '.join(WEIGHTS)}")
    return CoreMLOptions("ios18", weights, float(compression or COMPRESSION))


def _inputs(pipeline: "StableDiffusionPipeline", steps: int) -> "Mapping[str, Sequence[Arrays]]":
    """Returns each graph's inputs at steps spread over the loop, as the float modules run it."""
    from cq_edge.model.optimize import OptimizeConfig, calibrate, float_graphs, parity_inputs

    config = OptimizeConfig(_PROMPTS, "ddim", steps, guidance_scale=3.5, max_gap=3)
    graphs = float_graphs(pipeline, config)
    run = (graphs.reference["denoise"], graphs.reference["denoise_shallow"])
    return parity_inputs(pipeline, config, calibrate(pipeline, config, graphs, *run)[0])


def _measured(
    modules: "Modules",
    exported: "Modules",
    specs: "Specs",
    inputs: Mapping[str, Sequence[Arrays]],
    compress: Callable[[Any], Any],
    stream: bool,
) -> tuple[float, list[list[float]]]:
    """Returns how many times smaller than float32 the package is, and the ratios of the full and
    the shallow graph on each set of inputs."""
    from exporters.module_graph import module_graph
    from exporters.to_coreml import export_coreml, weight_bytes
    from runtime.mil.interpreter import read_functions

    found = []
    with tempfile.TemporaryDirectory() as scratch:
        places = export_coreml(
            exported, specs, Path(scratch), "ios18", compress, float32_stream=stream
        )
        package = Path(scratch) / places["denoise"].package
        functions, stored = read_functions(package), weight_bytes(package)
    for name, spec in specs.items():
        reference, run = module_graph(modules[name], spec), functions[name].run
        found.append([_worst_db(reference(arrays), run(arrays)) for arrays in inputs[name]])
    parameters = sum(parameter.numel() for parameter in modules["denoise"].parameters())
    return 4 * parameters / stored, found


def _worst_db(expected: Arrays, actual: Arrays) -> float:
    return min(sqnr_db(array, actual[name]) for name, array in expected.items())


if __name__ == "__main__":
    sys.exit(main())
