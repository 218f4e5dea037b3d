"""`python -m benchmarks.coreml_sizes`: what the Core ML UNet takes in each weight format.

Exports both UNet graphs and reads the sizes from the files: the full graph alone, both as
functions of one package, both as packages of their own.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from apps.build_coreml import COMPRESSION, CoreMLOptions, stored_unet, weight_compressor
from apps.quiet import quiet_toolchains
from benchmarks.unet_graphs import unet_graphs

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_WEIGHTS = ("float16", "int8", "torchao-int8", "int4", "torchao-int4", "palette6")


def main() -> int:
    """Prints the table as Markdown and returns the exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a diffusers folder (default: the demo model)")
    args = parser.parse_args()
    with quiet_toolchains():
        from cq_edge.model.load import load_pipeline

        pipeline = load_pipeline(args.model)
    float32 = 4 * sum(parameter.numel() for parameter in pipeline.unet.parameters())
    print("| weights | full alone, bytes | both in one | one over full alone | separate | "
          "float32 over both |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- |")
    for weights in _WEIGHTS:
        print(f"{weights}…", file=sys.stderr)
        full, shallow, both = _sizes(pipeline, weights)
        print(
            f"| {weights} | {full:,} | {both:,} | {both / full - 1:+.2%} | {full + shallow:,} | "
            f"{float32 / both:.2f} |",
            flush=True,
        )
    return 0


def _sizes(pipeline: "StableDiffusionPipeline", weights: str) -> tuple[int, int, int]:
    """Returns the bytes of the weight files of the full graph, the shallow graph and both."""
    with quiet_toolchains():
        from exporters.to_coreml import UNET_GRAPHS, export_coreml, weight_bytes

    modules, specs = unet_graphs(pipeline.unet)
    options = CoreMLOptions("ios18", weights, COMPRESSION)
    compress = weight_compressor(modules["denoise"], (), options)
    modules = stored_unet(modules, {}, options)
    with tempfile.TemporaryDirectory() as scratch:
        stream = options.float32_stream
        places = export_coreml(
            modules, specs, Path(scratch), "ios18", compress, float32_stream=stream
        )
        both = weight_bytes(Path(scratch) / places["denoise"].package)
    full, shallow = (places[name].weight_bytes for name in UNET_GRAPHS)
    return full, shallow, both


if __name__ == "__main__":
    sys.exit(main())
