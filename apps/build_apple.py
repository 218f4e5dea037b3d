"""`cq-edge build --layout apple`: what Apple's Swift pipeline loads once it is compiled."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from apps.build_coreml import FLOAT16_FLOOR_DB, Arrays, CoreMLOptions

if TYPE_CHECKING:
    from torch import nn

    from exporters.graph_spec import GraphSpec

APPLE_FOLDER = "apple"
_SCRIPT = """\
#!/bin/sh
# Run this on a Mac with Xcode: it compiles the packages beside it into the folder Resources,
# which StableDiffusionPipeline(resourcesAt:) loads.
set -eu
cd "$(dirname "$0")"
mkdir -p Resources
for package in TextEncoder Unet VAEDecoder; do
    xcrun coremlcompiler compile "$package.mlpackage" Resources
done
cp vocab.json merges.txt Resources
"""


def write_apple_layout(
    modules: "Mapping[str, nn.Module]",
    specs: "Mapping[str, GraphSpec]",
    inputs: Mapping[str, Sequence[Arrays]],
    options: CoreMLOptions,
    compress: Callable[[Any], Any],
    folder: Path,
) -> None:
    """Writes the packages and the script that compiles them, and checks each package.

    Args:
        modules: The float modules by graph.
        specs: Their contracts, in our form.
        inputs: Sets of inputs of each graph, in our form.
        options: Target and floors.
        compress: Of the UNet's weights.
        folder: Has the vocabulary's two files already.

    Raises:
        ExportError: A graph cannot be converted.
        ParityError: One computes something else than its float module.
    """
    from exporters.apple_layout import apple_inputs, apple_modules, apple_specs
    from exporters.module_graph import module_graph
    from exporters.parity import check_parity
    from exporters.to_coreml import export_coreml
    from runtime.mil.interpreter import read_functions

    apple, contracts = apple_modules(modules), apple_specs(specs)
    stream = options.float32_stream
    places = export_coreml(
        apple, contracts, folder, options.target, compress, float32_stream=stream
    )
    for name in tqdm(apple, desc="check Apple's layout", unit="graph"):
        place = places[name]
        run = read_functions(folder / place.package)[place.function].run
        given = [apple_inputs(name, arrays) for arrays in (inputs[name][0], inputs[name][-1])]
        floor_db = options.unet_floor_db if name == "denoise" else FLOAT16_FLOOR_DB
        check_parity(name, module_graph(apple[name], contracts[name]), run, given, floor_db)
    script = folder / "compile.sh"
    script.write_text(_SCRIPT, encoding="utf-8")
    script.chmod(0o755)
