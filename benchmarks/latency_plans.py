"""Plans of one bundle: how long their pictures are predicted to take and do take."""

import json
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
from tqdm import tqdm

from apps.engines import engine_for
from benchmarks.plan_ranking import random_plan, with_skips
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.latency import DeviceProfile
from cq_edge.latency_model import Device
from exporters.program_operators import program_operators
from runtime.bundle import Bundle
from runtime.draw import Method, draw

_PLANS, _RUNS = 12, 3  # of each kind, in turns
_PROMPT = "a large red circle on a plain white background"

Plans = list[tuple[str, float, float]]


def measured_plans(bundle: Bundle, device: Device, work: Path, measure: bool) -> Plans:
    """Returns for each plan its modes, the predicted and the measured milliseconds of a picture.

    Args:
        bundle: Whose plans they are.
        device: Predicts the graphs.
        work: Keeps what was measured.
        measure: Whether to measure anew.
    """
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    rng = np.random.default_rng(0)
    reusing = [random_plan(rng, table) for _ in range(_PLANS)]
    plans = [*reusing, *(with_skips(rng, plan, table) for plan in reusing)]
    path = work / "plans.json"
    if measure or not path.exists():
        path.write_text(json.dumps(_measure(bundle, plans)))
    pictures_ms = json.loads(path.read_text())
    entry = bundle.manifest.graph("denoise")
    operators = program_operators(bundle.path(entry.file))
    times = {graph: device.predict(operators[graph]).ms for graph in bundle.manifest.graphs}
    profile = DeviceProfile(entry.backend, bundle.manifest.files[entry.file].sha256, times)
    return [
        (plan.to_string(), profile.picture_ms(plan, 2), pictures_ms[plan.to_string()])
        for plan in plans
    ]


def _measure(bundle: Bundle, plans: list[CacheSchedule]) -> dict[str, float]:
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    engine = engine_for(bundle, 1)
    taken: dict[str, list[float]] = {}
    for _ in tqdm(range(_RUNS), desc="plans", unit="round"):
        for plan in plans:
            method = Method(bundle, engine, defaults.steps, plan, table)
            before = process_time()  # of one thread: what it takes on a core of its own
            draw(method, _PROMPT, 0)
            taken.setdefault(plan.to_string(), []).append((process_time() - before) * 1e3)
    return {modes: median(found) for modes, found in taken.items()}
