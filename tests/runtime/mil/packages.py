"""Small Core ML packages, made by coremltools' own builder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
from coremltools.converters.mil import Builder as mb

from runtime.mil.interpreter import ReferenceFunction, read_functions


def write_package(
    folder: Path,
    build: Callable[..., Any],
    *shapes: tuple[int, ...],
    target: Any = ct.target.iOS18,
) -> Path:
    """Writes a program whose inputs have these shapes; nothing in it is optimised away."""
    specs = [mb.TensorSpec(shape) for shape in shapes]
    program = mb.program(input_specs=specs, opset_version=target)(build)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = folder / "small.mlpackage"
    model.save(str(path))
    return path


def read_main(package: Path) -> ReferenceFunction:
    return read_functions(package)["main"]
