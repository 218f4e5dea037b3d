"""Runs a bundle's graphs with ExecuTorch's Python runtime."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import BundleError, UsageError
from cq_edge.manifest import GraphEntry, TensorSpec
from runtime.bundle import Bundle


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
        portable_lib = _portable_lib()
        if threads is not None:
            # methods keep the pool they were loaded with, so this comes before any load
            with _without_chatter():
                portable_lib._unsafe_reset_threadpool(threads)

    def load(self, graph: str) -> None:
        """Loads a graph from its file, where it is not loaded already.

        Raises:
            BundleError: The bundle has no such graph, or its file cannot be loaded.
        """
        if graph in self._methods:
            return
        entry = self._entry(graph)
        from executorch.runtime import Runtime

        try:
            # a program per graph: dropping it is the only way to free its method
            with _without_chatter():
                program = Runtime.get().load_program(self._bundle.path(entry.file))
                if entry.method in program.method_names:
                    self._methods[graph] = program.load_method(entry.method)
        except (RuntimeError, OSError) as error:
            raise BundleError(f"{entry.file}: cannot load {entry.method!r}: {error}") from error
        if graph not in self._methods:
            held = ", ".join(sorted(program.method_names))
            raise BundleError(f"{entry.file} has no method {entry.method!r}: it has {held}")

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns a graph's outputs by name.

        Raises:
            UsageError: An input is missing, unknown, or of a wrong shape or dtype.
            BundleError: The graph cannot be loaded, failed, or gave other outputs than the
                manifest says.
        """
        entry = self._entry(graph)
        _check_inputs(graph, entry, inputs)
        self.load(graph)
        import torch

        tensors = [torch.from_numpy(_writable(inputs[spec.name])) for spec in entry.inputs]
        try:
            results = self._methods[graph].execute(tensors)
        except RuntimeError as error:
            raise BundleError(f"{entry.file}: {entry.method!r} failed: {error}") from error
        outputs = [tensor.numpy() for tensor in results]
        found = [_describe(array) for array in outputs]
        expected = [_describe_spec(spec) for spec in entry.outputs]
        if found != expected:
            raise BundleError(
                f"{entry.file}: {entry.method!r} gave {', '.join(found)}, but the manifest says "
                f"{', '.join(expected)}"
            )
        return {spec.name: array for spec, array in zip(entry.outputs, outputs, strict=True)}

    def unload(self, graph: str) -> None:
        """Frees a graph, where it is loaded."""
        self._methods.pop(graph, None)

    def _entry(self, graph: str) -> GraphEntry:
        entry = self._bundle.manifest.graph(graph)
        if not entry.file.endswith(".pte"):
            raise BundleError(f"{entry.file} is no ExecuTorch program: it must be a .pte file")
        return entry


def _portable_lib() -> ModuleType:
    try:
        from executorch.extension.pybindings import portable_lib
    except ImportError as error:
        raise BundleError(
            f"running .pte graphs needs executorch, which cannot be imported ({error}): "
            "pip install executorch"
        ) from error
    return portable_lib


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Silences the C++ runtime's log of what it finds, which it writes to the process's stderr."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental", of all we call
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check_inputs(graph: str, entry: GraphEntry, inputs: Mapping[str, NDArray[Any]]) -> None:
    names = [spec.name for spec in entry.inputs]
    if set(inputs) != set(names):
        raise UsageError(
            f"graph {graph!r} takes {', '.join(names)}; it was given {', '.join(inputs)}"
        )
    for spec in entry.inputs:
        found, expected = _describe(inputs[spec.name]), _describe_spec(spec)
        if found != expected:
            raise UsageError(f"graph {graph!r} takes {spec.name} as {expected}, not {found}")


def _describe(array: NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"


def _describe_spec(spec: TensorSpec) -> str:
    return f"{tuple(spec.shape)} {spec.dtype}"


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """Returns an array that torch may wrap: C-contiguous and writable (copied if need be)."""
    return np.require(array, requirements=["C", "W"])
