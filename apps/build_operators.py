"""Writes what a bundle's graphs compute, so that their times can be predicted without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cq_edge.operators import OPERATORS_FILE, Operators, save_operators

if TYPE_CHECKING:
    from cq_edge.model.optimize import Optimized
    from exporters.graph_spec import GraphSpec


def write_operators(
    folder: Path,
    program: Path,
    optimized: "Optimized",
    specs: "Mapping[str, GraphSpec]",
    coreml_weight_bits: float | None,
) -> None:
    """Writes `operators.json` into a bundle's folder.

    Args:
        folder: Of the bundle.
        program: Its `.pte`; read if it is there.
        optimized: The float modules, which are watched for Core ML.
        specs: Of the graphs.
        coreml_weight_bits: That Core ML stores a weight of the UNet in, on average; None where
            the bundle has no packages.
    """
    backends: dict[str, Mapping[str, Operators]] = {}
    if program.exists():
        from exporters.program_operators import program_operators

        backends["xnnpack"] = program_operators(program)
    if coreml_weight_bits is not None:
        from exporters.module_operators import module_operators
        from exporters.to_executorch import example_inputs

        backends["coreml"] = {
            name: module_operators(
                optimized.reference[name].eval(),
                example_inputs(spec),
                dtype="float16",
                weight_bits=coreml_weight_bits if name.startswith("denoise") else 16.0,
            )
            for name, spec in specs.items()
        }
    save_operators(folder / OPERATORS_FILE, backends)
