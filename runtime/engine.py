"""What the loop asks of whatever runs the graphs."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Engine(Protocol):
    """Runs a bundle's graphs by name: `encode`, `denoise`, `denoise_shallow`, `decode`.

    The arrays of each graph are those of its entry in the manifest.
    """

    def load(self, graph: str) -> None:
        """Makes a graph ready to run; does nothing where it is already."""
        ...

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns a graph's outputs by name, in arrays of the caller's own.

        Loads the graph first where it is not.
        """
        ...

    def unload(self, graph: str) -> None:
        """Frees a graph's memory; does nothing where it is not loaded."""
        ...
