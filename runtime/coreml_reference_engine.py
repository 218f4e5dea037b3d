"""Runs a bundle's Core ML graphs anywhere, with the reference interpreter: slowly."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cq_edge.errors import BundleError, UsageError
from runtime.bundle import Bundle
from runtime.graph_arrays import check_inputs, named_outputs

if TYPE_CHECKING:
    from runtime.mil.interpreter import ReferenceFunction


class CoreMLReferenceEngine:
    """The `Engine` of `.mlpackage` folders where there is no Core ML.

    It computes what the programs say, with float16 stored between operators; how the Neural
    Engine rounds inside them it does not know.

    Args:
        bundle: Gives the packages, and the names, shapes and order of each graph's arrays.
        threads: Of torch in the whole process, 1 or more; None leaves them as they are.

    Raises:
        UsageError: `threads` is below 1.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}: ask for 1 or more")
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self._bundle = bundle
        self._functions: dict[str, ReferenceFunction] = {}

    def load(self, graph: str) -> None:
        """Reads a graph from its package, where it is not loaded already.

        Raises:
            BundleError: The bundle has no such graph, or its package cannot be read.
        """
        if graph in self._functions:
            return
        entry = self._bundle.manifest.graph(graph)
        from runtime.mil.interpreter import read_functions

        held = read_functions(self._bundle.path(entry.file))
        if entry.method not in held:
            there_are = ", ".join(sorted(held))
            raise BundleError(f"{entry.file} has no function {entry.method!r}: it has {there_are}")
        self._functions[graph] = held[entry.method]

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns a graph's outputs by name.

        Raises:
            UsageError: An input is missing, unknown, or of a wrong shape or dtype.
            BundleError: The graph cannot be read, or takes or gives other arrays than the
                manifest says.
        """
        entry = self._bundle.manifest.graph(graph)
        check_inputs(graph, entry, inputs)
        self.load(graph)
        try:
            found = self._functions[graph].run(inputs)
        except UsageError as error:  # the caller's inputs are the manifest's
            raise BundleError(f"{error}, as the manifest says") from error
        return named_outputs(entry, [found[o.name] for o in entry.outputs if o.name in found])

    def unload(self, graph: str) -> None:
        """Frees a graph, where it is loaded."""
        self._functions.pop(graph, None)
