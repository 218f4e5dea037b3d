"""The plan that the project's own planner makes for a speed-up, its graphs measured here."""

from pathlib import Path

from apps.engines import engine_for
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.planner import best_within_loop_ms, plan_frontier
from runtime.bundle import open_bundle
from runtime.measure import measure_graphs


def plan_for_speedup(
    float32: Path, bundle: Path, speedup: float, noise_scheduler: str, steps: int, threads: int
) -> str:
    """Returns the modes of the plan of least predicted error that is so many times as fast as the
    float32 bundle with every step full; of the fastest plan if none is."""
    bundles = [open_bundle(folder) for folder in (float32, bundle)]
    # both before either loads a graph: graphs keep the thread pool they were loaded with
    engines = [engine_for(side, threads) for side in bundles]
    slow, fast = (measure_graphs(e, b, rounds=10) for e, b in zip(engines, bundles, strict=True))
    table = bundles[1].reuse_table(noise_scheduler, steps)
    budget_ms = slow.loop_ms(CacheSchedule.all_full(len(table.timesteps)), 2) / speedup
    noise_schedule = bundles[1].manifest.noise_schedule
    frontier = plan_frontier((table,), fast, 2, noise_schedule)
    plan = best_within_loop_ms(frontier, budget_ms, fast, 2, noise_schedule)
    return plan.schedule.to_string()
