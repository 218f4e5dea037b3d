"""Times a bundle's graphs on the machine that it is to run on."""

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.latency import DeviceProfile
from cq_edge.manifest import TensorSpec
from cq_edge.noise_scheduler import make_noise_scheduler
from runtime.bundle import Bundle
from runtime.denoise import Guidance, denoise
from runtime.engine import Engine

_WARM_UP_RUNS = 2


def measure_graphs(
    engine: Engine, bundle: Bundle, *, runs: int = 9, at_most_s: float = 2.0
) -> DeviceProfile:
    """Returns the median milliseconds of each graph, loading apart.

    Args:
        engine: Runs them; keeps them loaded.
        bundle: Whose graphs they are.
        runs: Of each graph, after two to warm up.
        at_most_s: A graph that takes long is run less often: to about this many seconds, once
            at least.
    """
    medians = {}
    for graph, entry in bundle.manifest.graphs.items():
        inputs = {spec.name: _sample(spec) for spec in entry.inputs}
        engine.load(graph)
        taken: list[float] = []
        start = perf_counter()
        while len(taken) < _WARM_UP_RUNS + runs:
            before = perf_counter()
            engine.run(graph, inputs)
            taken.append((perf_counter() - before) * 1e3)
            if perf_counter() - start > at_most_s:
                break
        medians[graph] = median(taken[_WARM_UP_RUNS:] or taken[-1:])
    entry = bundle.manifest.graph("denoise")
    digest = bundle.manifest.files[entry.file].sha256
    step_ms = _step_ms(engine, bundle)
    return DeviceProfile(entry.backend, digest, medians, step_ms, {"runs": runs})


def _step_ms(engine: Engine, bundle: Bundle) -> float:
    """Returns what a step takes beside its graphs: the median of steps that run none."""
    defaults, schedule = bundle.manifest.defaults, bundle.manifest.noise_schedule
    noise_scheduler = make_noise_scheduler(defaults.noise_scheduler, defaults.steps, schedule)
    modes = "F" + "K" * (len(noise_scheduler.timesteps) - 1)
    inputs = {spec.name: _sample(spec) for spec in bundle.manifest.graph("denoise").inputs}
    guidance = Guidance(inputs["embeddings"], inputs["embeddings"], 2.0)
    cache_schedule = CacheSchedule.from_string(modes)
    records = denoise(engine, noise_scheduler, cache_schedule, inputs["latents"], guidance)
    return median([record.elapsed_ms for record in records][1:] or [0.0])


def _sample(spec: TensorSpec) -> NDArray[Any]:
    """Returns noise of a tensor's shape; indices are 0, which every vocabulary has."""
    if spec.dtype == "int64":
        return np.zeros(spec.shape, np.int64)
    return np.random.default_rng(0).standard_normal(spec.shape).astype(spec.dtype)
