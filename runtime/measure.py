"""Times a bundle's graphs on the machine that it is to run on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.latency import DeviceProfile, GraphFigures
from cq_edge.manifest import TensorSpec
from cq_edge.noise_scheduler import make_noise_scheduler
from runtime.bundle import Bundle
from runtime.denoise import denoise
from runtime.engine import Engine
from runtime.generate import guided_by

# the runs of a round, in the order and company in which a picture needs them: what ran just
# before decides what lies in the caches and which memory must be fetched again, so that a graph
# timed alone, or in other company, is another measurement
RUNS_PER_ROUND = {"encode": 2, "denoise": 4, "denoise_shallow": 4, "decode": 1}
# what a picture has loaded together, last first: its first graph then is loaded already
_STAGES = (("decode",), ("denoise", "denoise_shallow"), ("encode",))
# how many standard deviations either side of the mean hold 95 % of a normal distribution with 95 %
# confidence, by 2 to 12 values
_TOLERANCE_FACTORS = (
    38.281, 9.993, 6.399, 5.094, 4.423, 4.013, 3.736, 3.535, 3.382, 3.261, 3.163,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run of a graph.

    Attributes:
        round_index: Rounds count from 0, which warms up.
        graph: Its name.
        taken_ms: Wall time, from arrays in to arrays out.
        process: Processes that ran graphs count from 0.
    """

    round_index: int
    graph: str
    taken_ms: float
    process: int = 0

    @property
    def warms_up(self) -> bool:
        """Whether it does not count."""
        return self.round_index == 0


def timed_runs(
    engine: Engine,
    bundle: Bundle,
    graphs: Sequence[str],
    *,
    rounds: int,
    at_most_s: float = math.inf,
) -> Iterator[TimedRun]:
    """Runs graphs in rounds, so that what slows the machine for a while slows all alike.

    Args:
        engine: Runs them; keeps them loaded.
        bundle: Whose graphs they are.
        graphs: Their names.
        rounds: After one to warm up; see `RUNS_PER_ROUND`.
        at_most_s: A graph that has run this long, warm-up included, is left out of what follows;
            each runs once at least.

    Returns:
        An iterator of the runs as they are done. Stopping early is allowed.
    """
    inputs = {graph: sample_inputs(bundle, graph) for graph in graphs}
    for graph in inputs:
        engine.load(graph)
    spent_ms = dict.fromkeys(inputs, 0.0)
    for index in range(1 + rounds):
        for graph in inputs:
            for _ in range(RUNS_PER_ROUND[graph]):
                if spent_ms[graph] > at_most_s * 1e3:
                    break
                start = perf_counter()
                engine.run(graph, inputs[graph])
                taken_ms = (perf_counter() - start) * 1e3
                spent_ms[graph] += taken_ms
                yield TimedRun(index, graph, taken_ms)


def counted(runs: Sequence[TimedRun]) -> dict[str, list[TimedRun]]:
    """Returns the runs that count, by graph; a graph that was too slow for more than the warm-up
    counts with its last run of each process."""
    found: dict[str, list[TimedRun]] = {}
    for graph in dict.fromkeys(run.graph for run in runs):
        own = [run for run in runs if run.graph == graph]
        last = {run.process: run for run in own}
        found[graph] = [run for run in own if not run.warms_up] or list(last.values())
    return found


def counted_ms(runs: Sequence[TimedRun]) -> dict[str, list[float]]:
    """Returns what the runs that count took, ms, by graph."""
    return {graph: [run.taken_ms for run in own] for graph, own in counted(runs).items()}


def figures(runs: Sequence[TimedRun]) -> GraphFigures:
    """Returns the quantiles of a graph's runs, all of which count, and the range of other
    processes' medians, ms."""
    quantiles = np.percentile([run.taken_ms for run in runs], (10, 50, 90, 99))
    p10, p50, p90, p99 = (max(1e-5, round(float(q), 5)) for q in quantiles)
    found = GraphFigures(p50, p10, p90, p99, runs=len(runs))
    factor = _factor_of_processes(runs)
    if factor is None:
        return found
    low_ms = max(1e-6, round(p50 / factor, 6))
    return replace(found, low_ms=low_ms, high_ms=round(p50 * factor, 5))


def _factor_of_processes(runs: Sequence[TimedRun]) -> float | None:
    """Returns within which factor of the median those of 95 of 100 processes lie, with 95 %
    confidence; None of a single process.

    Source: W. G. Howe, "Two-sided tolerance limits for normal populations" (1969): the standard
    deviation of the logarithms of the medians times z·sqrt((n − 1)(1 + 1/n)/χ²), z the 0.975
    quantile, χ² the 0.05 quantile of n − 1 degrees of freedom. A prediction interval, which is
    narrower, holds what it says on the average of measurements: one that saw a calm minute says
    too little, and two must agree.
    """
    by_process: dict[int, list[float]] = {}
    for run in runs:
        by_process.setdefault(run.process, []).append(run.taken_ms)
    count = len(by_process)
    if count < 2:
        return None
    deviation = float(np.std(np.log([median(ms) for ms in by_process.values()]), ddof=1))
    return math.exp(_TOLERANCE_FACTORS[min(count, 1 + len(_TOLERANCE_FACTORS)) - 2] * deviation)


def measure_graphs(
    engine: Engine, bundle: Bundle, *, rounds: int = 5, at_most_s: float = 2.0
) -> DeviceProfile:
    """Returns the median milliseconds of each graph, loading apart.

    Loads together what a picture does (see `_STAGES`), so that no more memory is needed.

    Args:
        engine: Runs them; what a picture loads first is left loaded.
        bundle: Whose graphs they are.
        rounds: See `timed_runs`.
        at_most_s: Likewise.
    """
    graphs_ms: dict[str, float] = {}
    stages = [[graph for graph in stage if graph in bundle.graphs] for stage in _STAGES]
    for graphs in filter(None, stages):  # some models have no `encode`
        for graph in graphs_ms:
            engine.unload(graph)
        runs = list(timed_runs(engine, bundle, graphs, rounds=rounds, at_most_s=at_most_s))
        graphs_ms |= {graph: median(taken) for graph, taken in counted_ms(runs).items()}
        if "denoise" in graphs:
            beside_ms = step_ms(engine, bundle)
    return DeviceProfile(
        bundle.manifest.graph("denoise").backend,
        bundle.graphs_sha256(),
        {graph: graphs_ms[graph] for graph in bundle.graphs},
        beside_ms,
        {"rounds": rounds},
    )


def step_ms(engine: Engine, bundle: Bundle) -> float:
    """Returns what a step takes beside its graphs: the median of steps that run none."""
    defaults, schedule = bundle.manifest.defaults, bundle.manifest.noise_schedule
    noise_scheduler = make_noise_scheduler(defaults.noise_scheduler, defaults.steps, schedule)
    modes = "F" + "K" * (len(noise_scheduler.timesteps) - 1)
    inputs = sample_inputs(bundle, "denoise")
    latents = inputs["latents"]
    context = {name: inputs[name] for name in inputs if name not in ("latents", "timestep")}
    guidance = guided_by(bundle.manifest, context, context, 2.0)
    cache_schedule, noise = CacheSchedule.from_string(modes), repeat(latents)
    records = denoise(engine, noise_scheduler, cache_schedule, latents, guidance, None, noise)
    return median([record.elapsed_ms for record in records][1:] or [0.0])


def sample_inputs(bundle: Bundle, graph: str) -> Mapping[str, NDArray[Any]]:
    """Returns noise of the shapes of a graph's inputs; indices are 0, which every vocabulary
    has."""
    return {spec.name: _sample(spec) for spec in bundle.manifest.graph(graph).inputs}


def _sample(spec: TensorSpec) -> NDArray[Any]:
    if spec.dtype == "int64":
        return np.zeros(spec.shape, np.int64)
    return np.random.default_rng(0).standard_normal(spec.shape).astype(spec.dtype)
