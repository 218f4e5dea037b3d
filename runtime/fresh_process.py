"""What must be measured in a process that has done nothing before, such as loading and memory."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from cq_edge.errors import BundleError, CQEdgeError
from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.measure import sample_inputs
from runtime.peak_memory import peak_memory_mib

Answer = TypeVar("Answer")
MakeEngine = Callable[[Bundle, int | None], Engine]
_FRESH_PAGES = "5"  # to clear_refs: the peak starts anew (proc_pid_clear_refs(5))


@dataclass(frozen=True, slots=True)
class Fresh:
    """What a fresh process found of one graph.

    Attributes:
        load_ms: Of loading it, the engine's library imported before.
        read_mib: Of its file, read from the disk meanwhile; None where the system does not
            tell.
        peak_memory_mib: What loading and one run added to the process at their peak.
    """

    load_ms: float
    read_mib: float | None
    peak_memory_mib: float


def load_and_run(
    make_engine: MakeEngine, bundle: Bundle, threads: int | None, graph: str, *, cold: bool
) -> Fresh:
    """Loads and runs one graph in a fresh process.

    Args:
        make_engine: Named at the top of a module, so that the process can import it.
        bundle: Whose graph it is.
        threads: Of the engine.
        graph: Its name.
        cold: Whether its files are first dropped from the system's cache, where it can be.

    Raises:
        CQEdgeError: The process ended without an answer, or said why it could not.
    """
    if cold:
        _drop_from_cache(bundle, graph)
    found = answers(_measure, make_engine, bundle, threads, graph, does=f"loads graph {graph}")
    with closing(found):
        return next(found)


def answers(
    function: Callable[..., Iterable[Answer]], *arguments: Any, does: str
) -> Generator[Answer, None, None]:
    """Yields what a function yields in a process that has done nothing before.

    The process ends when the function has, or the iterator is closed.

    Args:
        function: Named at the top of a module, so that the process can import it.
        arguments: Of the function.
        does: What messages say of the process, e.g. "loads graph encode".

    Raises:
        CQEdgeError: The function raised it, or the process ended before the function did.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    with _interrupts_kept_from_children():
        process.start()
    theirs.close()
    try:
        while (found := ours.recv()) is not _END:
            if isinstance(found, CQEdgeError):
                raise found
            yield found
    except EOFError:
        process.join()
        raise BundleError(
            f"the process that {does} ended with exit code {process.exitcode}: is there too "
            "little memory?"
        ) from None
    finally:
        process.kill()
        process.join()


_END = None  # what follows the last answer


def _answer(
    connection: Connection, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]
) -> None:
    try:
        for found in function(*arguments):
            connection.send(found)
        connection.send(_END)
    except CQEdgeError as error:
        connection.send(error)


def _measure(
    make_engine: MakeEngine, bundle: Bundle, threads: int | None, graph: str
) -> Iterator[Fresh]:
    engine = make_engine(bundle, threads)
    inputs = sample_inputs(bundle, graph)
    gc.collect()
    before_mib, read_before = _start_peak_mib(), _read_mib()
    start = perf_counter()
    engine.load(graph)
    load_ms = (perf_counter() - start) * 1e3
    read_after = _read_mib()
    engine.run(graph, inputs)
    read = None if read_before is None or read_after is None else read_after - read_before
    yield Fresh(load_ms, read, max(0.0, peak_memory_mib() - before_mib))


def _drop_from_cache(bundle: Bundle, graph: str) -> None:
    """Drops what the graph's file, or files of a package, hold of the system's cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    path = bundle.path(bundle.manifest.graph(graph).file)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # only pages that are on the disk can be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _interrupts_kept_from_children() -> Iterator[None]:
    """Lets processes that start here inherit that Ctrl-C is not for them: the parent ends them."""
    before: Any = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_peak_mib() -> float:
    """Lets the peak start anew where the system can, and returns what it starts from."""
    try:
        Path("/proc/self/clear_refs").write_text(_FRESH_PAGES)
    except OSError:
        return peak_memory_mib()
    return _status_mib("VmRSS") or peak_memory_mib()


def _status_mib(key: str) -> float | None:
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return None


def _read_mib() -> float | None:
    """Returns what this process has read from storage; None where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(x.split()[1]) / 2**20 for x in lines if x.startswith("read_bytes:"))
