"""Plans of one bundle: how long their pictures are predicted to take and do take."""

from collections.abc import Mapping
from statistics import median
from time import process_time

import numpy as np
from tqdm import tqdm

from apps.engines import engine_for
from benchmarks.plan_ranking import random_plan, with_skips
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.latency import DeviceProfile
from runtime.bundle import Bundle
from runtime.draw import Method, draw

_PLANS, _RUNS = 12, 3  # of each kind, in turns
_PROMPT = "a large red circle on a plain white background"

Plans = list[tuple[str, float, float]]
"""Of each plan its modes, the predicted and the measured milliseconds of a picture."""


def time_plans(bundle: Bundle) -> dict[str, float]:
    """Returns what a picture takes by random plans of a bundle, ms, by their modes: half of them
    with skip steps."""
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    rng = np.random.default_rng(0)
    reusing = [random_plan(rng, table) for _ in range(_PLANS)]
    plans = [*reusing, *(with_skips(rng, plan, table) for plan in reusing)]
    engine = engine_for(bundle, 1)
    taken: dict[str, list[float]] = {}
    for _ in tqdm(range(_RUNS), desc="plans", unit="round"):
        for plan in plans:
            method = Method(bundle, engine, defaults.steps, plan, table)
            before = process_time()  # of one thread: what it takes on a core of its own
            draw(method, _PROMPT, 0)
            taken.setdefault(plan.to_string(), []).append((process_time() - before) * 1e3)
    return {modes: median(found) for modes, found in taken.items()}


def predicted_plans(plans_ms: Mapping[str, float], graphs_ms: Mapping[str, float]) -> Plans:
    """Returns what was measured beside what its graphs' predicted times add up to.

    Args:
        plans_ms: Measured, by modes.
        graphs_ms: Predicted.
    """
    profile = DeviceProfile("xnnpack", "of the timed bundle", graphs_ms)
    return [
        (modes, profile.picture_ms(CacheSchedule.from_string(modes), 2), ms)
        for modes, ms in plans_ms.items()
    ]
