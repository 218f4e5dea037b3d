"""Runs a function of a saved `.mlpackage`, one operation after another.

Every result is rounded to the type that the program declares for it: float16 between operators
as on the device, float32 inside them.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cq_edge.errors import BundleError, UsageError
from cq_edge.quiet import without_chatter
from runtime.mil.arguments import Arguments
from runtime.mil.arithmetic import ARITHMETIC, Operator
from runtime.mil.compressed import COMPRESSED
from runtime.mil.layout import LAYOUT
from runtime.mil.network import NETWORK

OPERATORS: dict[str, Operator] = {**ARITHMETIC, **LAYOUT, **NETWORK, **COMPRESSED}
_MODEL = Path("Data") / "com.apple.CoreML" / "model.mlmodel"
_DTYPES = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,  # torch computes nothing in uint16
    "int32": torch.int32,
    "bool": torch.bool,
}


class ReferenceFunction:
    """One function of a package, weights decompressed, ready to run.

    Args:
        function: The function as coremltools reads it from the file.
        where: Names it in messages.

    Raises:
        BundleError: It has an operator that the interpreter does not know.
    """

    def __init__(self, function: Any, where: str) -> None:
        self._where = where
        self._inputs: dict[str, Any] = dict(function.inputs)
        self._outputs: list[Any] = list(function.outputs)
        self._weights: dict[int, Tensor] = {}
        self._operations: list[Any] = []
        for operation in function.operations:
            if operation.op_type == "const":
                continue
            self._require_known(operation)
            if operation.op_type.startswith("constexpr_"):
                self._compute(operation, self._weights)
            else:
                self._operations.append(operation)
        self._last_use = {
            id(value): position
            for position, operation in enumerate(self._operations)
            for value in _values(operation)
        }

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each input, in the package's order."""
        return {name: tuple(value.shape) for name, value in self._inputs.items()}

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs, in the package's order."""
        return tuple(value.name for value in self._outputs)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns the function's outputs by name.

        Args:
            inputs: An array for each input, of its shape; whole numbers become int32, the
                widest that Core ML takes.

        Raises:
            UsageError: An input is missing, unknown or of another shape.
            BundleError: An operation has an argument that the interpreter does not do.
        """
        held = {id(self._inputs[name]): t for name, t in self._given(inputs).items()}
        kept = {id(value) for value in self._outputs}
        for position, operation in enumerate(self._operations):
            self._compute(operation, held)
            for value in _values(operation):
                if self._last_use[id(value)] == position and id(value) not in kept:
                    held.pop(id(value), None)
        return {value.name: held[id(value)].numpy() for value in self._outputs}

    def _given(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        if inputs.keys() != self._inputs.keys():
            takes, given = ", ".join(self._inputs), ", ".join(inputs)
            raise UsageError(f"{self._where} takes {takes}; it was given {given}")
        found = {}
        for name, value in self._inputs.items():
            array = np.ascontiguousarray(inputs[name])
            if array.shape != tuple(value.shape):
                raise UsageError(
                    f"{self._where} takes {name} of shape {list(value.shape)}, not "
                    f"{list(array.shape)}"
                )
            found[name] = torch.from_numpy(array).to(_dtype(value))
        return found

    def _require_known(self, operation: Any) -> None:
        if operation.op_type not in OPERATORS:
            known = ", ".join(sorted(OPERATORS))
            raise BundleError(
                f"{self._name(operation)} is of a kind that the reference interpreter does not "
                f"know: it knows {known}"
            )

    def _compute(self, operation: Any, held: dict[int, Tensor]) -> None:
        """Adds what an operation computes to the values held."""
        arguments = {}
        for name, given in operation.inputs.items():
            if isinstance(given, list | tuple):
                arguments[name] = [self._read(value, held) for value in given]
            elif given is not None:
                arguments[name] = self._read(given, held)
        found = OPERATORS[operation.op_type](Arguments(arguments, self._name(operation)))
        results = found if isinstance(found, tuple) else (found,)
        for value, result in zip(operation.outputs, results, strict=True):
            held[id(value)] = result.to(_dtype(value))

    def _read(self, value: Any, held: Mapping[int, Tensor]) -> Any:
        """Returns a value: computed, a decompressed weight, or a constant of the program."""
        found = held.get(id(value), self._weights.get(id(value)))
        if found is None:
            if isinstance(value.val, str):
                return value.val
            found = torch.from_numpy(np.array(value.val))
        return found.float() if found.dtype == torch.float16 else found

    def _name(self, operation: Any) -> str:
        return f"{self._where}: operation {operation.name} ({operation.op_type})"


def read_functions(package: Path) -> dict[str, ReferenceFunction]:
    """Returns the functions of a saved package by name; one alone is called "main".

    Raises:
        BundleError: It is no package, it cannot be read, or it has an unknown operator.
    """
    model = package / _MODEL
    if not model.is_file():
        raise BundleError(f"{package} is no Core ML package: it has no {_MODEL.as_posix()}")
    with without_chatter(logging.ERROR):  # coremltools' warnings about versions
        try:
            import coremltools
            from coremltools.converters.mil.frontend.milproto.load import load
        except ImportError as error:
            raise BundleError(
                f"reading .mlpackage graphs needs coremltools, which cannot be imported ({error}):"
                " pip install coremltools"
            ) from error
        try:
            spec = coremltools.utils.load_spec(str(package))
            weights = str(model.parent / "weights")
            program = load(spec, spec.specificationVersion, weights)
        except Exception as error:
            raise BundleError(f"{package} cannot be read as a Core ML program: {error}") from error
    return {
        name: ReferenceFunction(function, f"function {name} of {package.name}")
        for name, function in program.functions.items()
    }


def _values(operation: Any) -> Iterator[Any]:
    for given in operation.inputs.values():
        if isinstance(given, list | tuple):
            yield from given
        elif given is not None:
            yield given


def _dtype(value: Any) -> torch.dtype:
    from coremltools.converters.mil.mil import types

    name = types.builtin_to_string(value.dtype)
    if name not in _DTYPES:
        raise BundleError(f"value {value.name} has type {name}, which the interpreter cannot hold")
    return _DTYPES[name]
