"""Does the device get slower when it works for long? Runs of the full graph without a pause."""

from collections.abc import Iterator, Sequence
from statistics import median
from time import perf_counter

from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.measure import sample_inputs

_SHARE = 5  # the first and the last fifth of the runs are compared


def sustained_runs(engine: Engine, bundle: Bundle, for_s: float) -> Iterator[tuple[float, float]]:
    """Runs the full graph for some seconds.

    Returns:
        An iterator of the runs as they are done: when it ended, in seconds from the start, and
        what it took, in ms.
    """
    inputs = sample_inputs(bundle, "denoise")
    engine.run("denoise", inputs)
    start = before = perf_counter()
    while before - start < for_s:
        engine.run("denoise", inputs)
        now = perf_counter()
        yield now - start, (now - before) * 1e3
        before = perf_counter()


def drift(runs: Sequence[tuple[float, float]]) -> float | None:
    """Returns the median of the last fifth of the runs over that of the first: above 1 where
    the device got slower; None of fewer than ten runs."""
    count = len(runs) // _SHARE
    if count < 2:
        return None
    taken = [taken_ms for _, taken_ms in runs]
    return median(taken[-count:]) / median(taken[:count])
