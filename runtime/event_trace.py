"""What single operators take, where ExecuTorch was built with its event tracer (the wheel is not).

Interfaces: `_load_for_executorch(…, enable_etdump=True)` and `write_etdump_result_to_file` of
ExecuTorch's extension module, which writes no file where there is no tracer; the dump's schema is
`executorch.devtools.etdump`'s. Operators inside a delegate are told where the delegate tells them
(XNNPACK: built with its profiling too), else the delegate's piece counts as one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from cq_edge.errors import UsageError
from runtime.bundle import Bundle
from runtime.executorch_engine import extension_library
from runtime.measure import sample_inputs
from runtime.operator_time import OperatorTime

_RUNS = 20
_KERNEL = "native_call_"  # how names of what no delegate runs begin
_PIECE = "DELEGATE_CALL"


def traced_operators(bundle: Bundle, threads: int | None) -> list[OperatorTime]:
    """Returns what the event tracer tells of every operator of a bundle's graphs, the longest
    first.

    Args:
        bundle: Of `.pte` graphs.
        threads: Of ExecuTorch's thread pool; None leaves it as it is.

    Raises:
        UsageError: This build of ExecuTorch has no event tracer.
    """
    library = extension_library()
    if threads is not None:
        library._unsafe_reset_threadpool(threads)
    found = [
        row
        for graph in bundle.graphs
        for row in operator_times(graph, _traced(library, bundle, graph))
    ]
    return sorted(found, key=lambda row: -row.p50_ms)


def operator_times(graph: str, dump: bytes) -> list[OperatorTime]:
    """Returns the median of each operator over the runs that an event tracer's dump holds.

    Args:
        graph: Its name.
        dump: As ExecuTorch wrote it: times in ns.
    """
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

    taken: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
    for run in deserialize_from_etdump_flatcc(dump).run_data:
        seen = Counter[tuple[str, str]]()
        events = [event.profile_event for event in run.events or []]
        for operator, ms in _operators([event for event in events if event is not None]):
            taken[(*operator, seen[operator])].append(ms)
            seen[operator] += 1
    return [OperatorTime(graph, kind, unit, median(ms)) for (kind, unit, _), ms in taken.items()]


def _operators(events: list[Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """Yields (kind, unit) and ms of each operator of a run; whole runs, loading and what wraps an
    operator are none."""
    inside = {event.instruction_id for event in events if _delegated(event)}
    for event in events:
        name, ms = event.name or "", (event.end_time - event.start_time) / 1e6
        if _delegated(event):
            yield (event.delegate_debug_id_str or name, "delegate"), ms
        elif name == _PIECE and event.instruction_id not in inside:
            yield ("a delegate's piece", "delegate"), ms
        elif name.startswith(_KERNEL):
            yield (name.removeprefix(_KERNEL), "portable"), ms


def _delegated(event: Any) -> bool:
    number = event.delegate_debug_id_int
    return bool(event.delegate_debug_id_str) or (number is not None and number >= 0)


def _traced(library: Any, bundle: Bundle, graph: str) -> bytes:
    import torch

    entry, inputs = bundle.manifest.graph(graph), sample_inputs(bundle, graph)
    module = library._load_for_executorch(str(bundle.path(entry.file)), enable_etdump=True)
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in entry.inputs]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dump"
        module.run_method(entry.method, tensors)
        module.write_etdump_result_to_file(str(path))
        if not path.exists():
            raise UsageError(
                "this ExecuTorch was built without its event tracer, as the wheel is: build it "
                "with EXECUTORCH_ENABLE_EVENT_TRACER, or time the parts of the full graph with "
                "--blocks"
            )
        for _ in range(_RUNS):
            module.run_method(entry.method, tensors)
        module.write_etdump_result_to_file(str(path))
        return path.read_bytes()
