"""Times graphs in turns, so that a disturbance meets many of them a little, not one whole.

What is timed is one thread's processor time: what a run takes on a core of its own, also where
other programs take the core away now and then. Caches and memory are shared with them still.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import thread_time

import numpy as np
from numpy.typing import NDArray

from exporters.graph_spec import GraphSpec
from exporters.to_executorch import load_graph

_TURN_MS = 60.0  # of runs of one graph before the next one's turn
_FEWEST = 3

Run = Callable[[], object]


def set_threads(count: int) -> None:
    """Makes graphs that are loaded from now on run on so many threads."""
    from executorch.extension.pybindings import _portable_lib

    _portable_lib._unsafe_reset_threadpool(count)


def loaded(path: Path, spec: GraphSpec) -> tuple[Run, float]:
    """Returns a function that runs one graph on noise, and the milliseconds of loading it, the
    file being in the system's memory."""
    path.read_bytes()
    before = thread_time()
    graph = load_graph(path, spec)
    load_ms = (thread_time() - before) * 1e3
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.generic]] = {
        i.name: np.zeros(i.shape, np.int64)
        if i.dtype == "int64"
        else rng.standard_normal(i.shape).astype(np.float32)
        for i in spec.inputs
    }
    return lambda: graph(arrays), load_ms


def time_round(runs: Mapping[str, Run]) -> dict[str, float]:
    """Returns the median milliseconds of a turn of every graph, in an order drawn anew."""
    order = np.random.default_rng().permutation(list(runs))
    return {str(name): _turn(runs[str(name)]) for name in order}


def _turn(run: Run) -> float:
    run()  # the first one finds the caches full of another graph
    taken: list[float] = []
    while len(taken) < _FEWEST or sum(taken) < _TURN_MS:
        before = thread_time()
        run()
        taken.append((thread_time() - before) * 1e3)
    return median(taken)
