"""Which engine runs a bundle."""

import platform
from collections.abc import Callable

from cq_edge.errors import BundleError
from runtime.bundle import Bundle
from runtime.coreml_engine import CoreMLEngine
from runtime.coreml_reference_engine import CoreMLReferenceEngine
from runtime.engine import Engine
from runtime.executorch_engine import ExecuTorchEngine

BACKENDS = {"executorch": "xnnpack", "coreml": "coreml"}
"""What the manifest calls the graphs of each toolchain that the command line names."""


def has_coreml() -> bool:
    """Returns whether this system has Core ML itself."""
    return platform.system() == "Darwin"


def coreml_engine(bundle: Bundle, threads: int | None) -> Engine:
    """Returns Core ML, or elsewhere than on macOS the reference interpreter."""
    return (CoreMLEngine if has_coreml() else CoreMLReferenceEngine)(bundle, threads)


ENGINES: dict[str, Callable[[Bundle, int | None], Engine]] = {
    "xnnpack": ExecuTorchEngine,
    "coreml": coreml_engine,
}


def engine_for(bundle: Bundle, threads: int | None) -> Engine:
    """Returns the engine of a bundle's backend, its first choice if it has several.

    Raises:
        BundleError: No engine here runs it.
    """
    backend = bundle.manifest.graph("denoise").backend
    if backend not in ENGINES:
        known = ", ".join(ENGINES)
        raise BundleError(f"{bundle.folder} is for {backend!r}: this cq-edge runs {known}")
    return ENGINES[backend](bundle, threads)
