"""Runs a bundle's graphs with ExecuTorch's Python runtime."""

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import BundleError, UsageError
from cq_edge.freed_memory import forget_pages, give_back
from cq_edge.manifest import GraphEntry
from runtime.bundle import Bundle
from runtime.graph_arrays import check_inputs, named_outputs


class ExecuTorchEngine:
    """The `Engine` of `.pte` files.

    Args:
        bundle: Gives the files, and the names, shapes and order of each graph's arrays.
        threads: Of the whole process's ExecuTorch thread pool, 1 or more; None leaves the
            pool as it is (one thread per core).

    Raises:
        UsageError: `threads` is below 1.
        BundleError: executorch is not installed.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}: ask for 1 or more")
        self._bundle = bundle
        self._methods: dict[str, Any] = {}
        self._library = extension_library()
        if threads is not None:
            # methods keep the pool they were loaded with, so this comes before any load
            with _without_chatter():
                self._library._unsafe_reset_threadpool(threads)

    def load(self, graph: str) -> None:
        """Loads a graph from its file, where it is not loaded already.

        Raises:
            BundleError: The bundle has no such graph, or its file cannot be loaded.
        """
        if graph in self._methods:
            return
        entry = self._entry(graph)
        path, check = self._bundle.path(entry.file), self._library.Verification.InternalConsistency
        try:
            with _without_chatter():
                # a program per graph: dropping it is the only way to free its method
                program = self._library._load_program(str(path), program_verification=check)
                held = [program.get_method_name(i) for i in range(program.num_methods())]
                if entry.method in held:
                    self._methods[graph] = program.load_method(entry.method)
                    forget_pages(path)
        except RuntimeError as error:
            raise BundleError(f"{entry.file}: cannot load {entry.method!r}: {error}") from error
        if graph not in self._methods:
            raise BundleError(
                f"{entry.file} has no method {entry.method!r}: it has {', '.join(sorted(held))}"
            )

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns a graph's outputs by name.

        Raises:
            UsageError: An input is missing, unknown, or of a wrong shape or dtype.
            BundleError: The graph cannot be loaded, failed, or gave other outputs than the
                manifest says.
        """
        entry = self._entry(graph)
        check_inputs(graph, entry, inputs)
        self.load(graph)
        import torch

        tensors = [torch.from_numpy(_writable(inputs[spec.name])) for spec in entry.inputs]
        try:
            results = self._methods[graph](tensors)
        except RuntimeError as error:
            raise BundleError(f"{entry.file}: {entry.method!r} failed: {error}") from error
        outputs = [tensor.numpy() for tensor in results]
        return named_outputs(entry, outputs)

    def unload(self, graph: str) -> None:
        """Frees a graph, where it is loaded."""
        if self._methods.pop(graph, None) is not None:
            give_back()

    def _entry(self, graph: str) -> GraphEntry:
        entry = self._bundle.manifest.graph(graph)
        if not entry.file.endswith(".pte"):
            raise BundleError(f"{entry.file} is no ExecuTorch program: it must be a .pte file")
        return entry


def extension_library() -> ModuleType:
    """Returns ExecuTorch's extension module.

    Not `executorch.runtime`, which wraps it: that imports the whole exporter (torchao and
    torch's compiler too) only for the decorators of its warnings, which takes longer than a
    small bundle takes to make a picture.
    """
    try:
        import torch  # noqa: F401 - the extension needs its symbols, and says so obscurely
        from executorch.extension.pybindings import _portable_lib
    except ImportError as error:
        raise BundleError(
            f"running .pte graphs needs executorch, which cannot be imported ({error}): "
            "pip install executorch"
        ) from error
    library: ModuleType = _portable_lib
    return library


def _without_chatter() -> redirect_stderr[io.StringIO]:
    """Silences the extension's log of the processor it finds; its errors are exceptions."""
    return redirect_stderr(io.StringIO())


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array that torch may wrap: C-contiguous and writable (copied if need be)."""
    return np.require(array, requirements=["C", "W"])
