"""Runs a bundle's graphs with Core ML itself, on macOS."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import BundleError
from runtime.bundle import Bundle
from runtime.graph_arrays import check_inputs, named_outputs

SOLE = "main"
"""What Core ML calls the function of a package that has one."""


class CoreMLEngine:
    """The `Engine` of `.mlpackage` folders; Core ML places the work on the chip's units itself.

    Args:
        bundle: Gives the packages, and the names, shapes and order of each graph's arrays.
        threads: Ignored: Core ML chooses them.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        del threads
        self._bundle = bundle
        self._models: dict[str, Any] = {}

    def load(self, graph: str) -> None:
        """Compiles and loads a graph, where it is not loaded already.

        Raises:
            BundleError: The bundle has no such graph, or Core ML refuses it.
        """
        if graph in self._models:
            return
        entry = self._bundle.manifest.graph(graph)
        function = None if entry.method == SOLE else entry.method
        try:
            import coremltools

            path = str(self._bundle.path(entry.file))
            self._models[graph] = coremltools.models.MLModel(path, function_name=function)
        except Exception as error:
            raise BundleError(f"{entry.file}: Core ML refuses {entry.method!r}: {error}") from error

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns a graph's outputs by name.

        Raises:
            UsageError: An input is missing, unknown, or of a wrong shape or dtype.
            BundleError: The graph cannot be loaded, failed, or gave other outputs than the
                manifest says.
        """
        entry = self._bundle.manifest.graph(graph)
        check_inputs(graph, entry, inputs)
        self.load(graph)
        try:
            found = self._models[graph].predict(without_int64(inputs))
        except Exception as error:
            raise BundleError(f"{entry.file}: {entry.method!r} failed: {error}") from error
        return named_outputs(entry, [found[o.name] for o in entry.outputs if o.name in found])

    def unload(self, graph: str) -> None:
        """Frees a graph, where it is loaded."""
        self._models.pop(graph, None)


def without_int64(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Returns the arrays as Core ML takes them: it has no int64."""
    return {n: a.astype(np.int32) if a.dtype == np.int64 else a for n, a in inputs.items()}
