"""`python -m benchmarks.coreml_sd15`: Stable Diffusion 1.5's UNet as a Core ML package.

The configuration is the real one, the weights are random. Prints time, sizes and the largest
memory, and how the package's shallow function, run by the reference interpreter, agrees with the
eager module.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from apps.build_coreml import (
    COMPRESSION,
    WEIGHTS,
    CoreMLOptions,
    stored_unet,
    weight_compressor,
)
from apps.quiet import quiet_toolchains
from benchmarks.unet_graphs import unet_graphs
from runtime.peak_memory import peak_memory_mib

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from exporters.graph_spec import GraphSpec
    from exporters.to_coreml import Place

_TIMESTEPS = (981.0, 1.0)
_CONFIG = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}  # the rest are the class's defaults


def main() -> int:
    """Prints the figures as Markdown and returns the exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = [weights for weights in WEIGHTS if weights not in ("mixed", "w8a8")]
    parser.add_argument("--weights", choices=choices, default="int8")
    parser.add_argument("--width", type=int, default=320, help="channels of the first block; "
        "less than 320 tries this command quickly")  # fmt: skip
    args = parser.parse_args()
    print("| stage | s | largest memory so far, GiB |")
    print("| --- | --- | --- |")
    with _stage("make the UNet"):
        modules, specs = _graphs(args.width)
    with tempfile.TemporaryDirectory() as scratch:
        with _stage(f"convert, {args.weights}, both functions in one package"):
            places = _exported(modules, specs, args.weights, Path(scratch))
        package = Path(scratch) / places["denoise"].package
        with _stage("run the eager modules and the package's shallow function"):
            agreement = _agreement_db(modules, specs, package)
        _report(modules["denoise"], places, package, agreement)
    return 0


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Prints a row of the table when the block is done."""
    start = perf_counter()
    yield
    print(f"| {name} | {perf_counter() - start:.0f} | {peak_memory_mib() / 1024:.1f} |", flush=True)


def _graphs(width: int) -> "tuple[dict[str, nn.Module], dict[str, GraphSpec]]":
    with quiet_toolchains():
        import torch
        from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    widths = tuple(width * channels // 320 for channels in (320, 640, 1280, 1280))
    unet = UNet2DConditionModel(**{**_CONFIG, "block_out_channels": widths})
    return unet_graphs(unet.eval().requires_grad_(requires_grad=False))


def _exported(
    modules: "dict[str, nn.Module]", specs: "dict[str, GraphSpec]", weights: str, folder: Path
) -> "dict[str, Place]":
    from exporters.to_coreml import export_coreml

    options = CoreMLOptions("ios18", weights, COMPRESSION)
    compress = weight_compressor(modules["denoise"], (), options)
    return export_coreml(stored_unet(modules, {}, options), specs, folder, "ios18", compress)


def _agreement_db(
    modules: "dict[str, nn.Module]", specs: "dict[str, GraphSpec]", package: Path
) -> list[float]:
    """Returns the shallow function's signal-to-error ratio at each timestep, fed the feature
    that the eager full module made there."""
    from cq_edge.metrics import sqnr_db
    from exporters.module_graph import module_graph
    from runtime.mil.interpreter import read_functions

    eager = {name: module_graph(modules[name], specs[name]) for name in modules}
    function = read_functions(package)["denoise_shallow"]
    found = []
    for timestep in _TIMESTEPS:
        given = _inputs(specs["denoise_shallow"], timestep)
        steps = {i.name: given[i.name] for i in specs["denoise"].inputs}
        given["cached_feature"] = eager["denoise"](steps)["cached_feature"]
        expected, actual = eager["denoise_shallow"](given), function.run(given)
        found.append(sqnr_db(expected["noise_pred"], actual["noise_pred"]))
    return found


def _inputs(spec: "GraphSpec", timestep: float) -> "dict[str, NDArray[Any]]":
    """Returns random inputs at a timestep; the corrections change nothing."""
    import numpy as np

    generator = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        i.name: generator.standard_normal(i.shape).astype(np.float32) for i in spec.inputs
    }
    for name, value in (("timestep", timestep), ("gain", 1.0), ("output_gain", 1.0),
                        ("bias", 0.0), ("output_bias", 0.0)):  # fmt: skip
        arrays[name] = np.full_like(arrays[name], value)
    return arrays


def _report(
    full: "nn.Module", places: "dict[str, Place]", package: Path, agreement: list[float]
) -> None:
    from exporters.to_coreml import weight_bytes

    parameters = sum(parameter.numel() for parameter in full.parameters())
    alone, both = places["denoise"].weight_bytes, weight_bytes(package)
    print()
    print(
        f"{parameters / 1e6:.1f} million parameters. Weight file {both:,} bytes, "
        f"{4 * parameters / both:.2f} times smaller than float32; the full function alone takes "
        f"{alone:,}."
    )
    at = ", ".join(
        f"{db:.1f} dB at timestep {timestep:g}"
        for timestep, db in zip(_TIMESTEPS, agreement, strict=True)
    )
    print(f"The package's shallow function against the eager module: {at}.")


if __name__ == "__main__":
    sys.exit(main())
