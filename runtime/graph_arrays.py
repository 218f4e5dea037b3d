"""The arrays that go into a graph and come out of it, held against the manifest."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from cq_edge.errors import BundleError, UsageError
from cq_edge.manifest import GraphEntry, TensorSpec


def check_inputs(graph: str, entry: GraphEntry, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Returns if a graph's inputs are those of its entry.

    Raises:
        UsageError: One is missing, unknown, or of a wrong shape or dtype.
    """
    if inputs.keys() != {spec.name for spec in entry.inputs}:
        names = ", ".join(spec.name for spec in entry.inputs)
        raise UsageError(f"graph {graph!r} takes {names}; it was given {', '.join(inputs)}")
    for spec in entry.inputs:
        array = inputs[spec.name]
        if not _fits(array, spec):
            found, expected = _describe(array), _describe_spec(spec)
            raise UsageError(f"graph {graph!r} takes {spec.name} as {expected}, not {found}")


def named_outputs(entry: GraphEntry, outputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Returns a graph's outputs, in the order of its entry, by name.

    Raises:
        BundleError: They are others than the manifest says.
    """
    if len(outputs) != len(entry.outputs) or not all(map(_fits, outputs, entry.outputs)):
        found = ", ".join(_describe(array) for array in outputs)
        expected = ", ".join(_describe_spec(spec) for spec in entry.outputs)
        raise BundleError(
            f"{entry.file}: {entry.method!r} gave {found}, but the manifest says {expected}"
        )
    return {spec.name: array for spec, array in zip(entry.outputs, outputs, strict=True)}


def _fits(array: NDArray[Any], spec: TensorSpec) -> bool:
    return array.shape == spec.shape and array.dtype == spec.dtype


def _describe(array: NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"


def _describe_spec(spec: TensorSpec) -> str:
    return f"{tuple(spec.shape)} {spec.dtype}"
