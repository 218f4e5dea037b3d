"""Which engine runs a bundle."""

from collections.abc import Callable

from cq_edge.errors import BundleError
from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.executorch_engine import ExecuTorchEngine

ENGINES: dict[str, Callable[[Bundle, int | None], Engine]] = {"xnnpack": ExecuTorchEngine}


def engine_for(bundle: Bundle, threads: int | None) -> Engine:
    """Returns the engine of a bundle's backend.

    Raises:
        BundleError: No engine here runs it.
    """
    backend = bundle.manifest.graph("denoise").backend
    if backend not in ENGINES:
        known = ", ".join(ENGINES)
        raise BundleError(f"{bundle.folder} is for {backend!r}: this cq-edge runs {known}")
    return ENGINES[backend](bundle, threads)
