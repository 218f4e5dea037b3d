"""The passes of a measurement on this machine, with progress bars."""

import argparse
import math
from statistics import median

from tqdm import tqdm

from runtime.bundle import Bundle
from runtime.conditions import cores, thermal_conditions
from runtime.engine import Engine
from runtime.fresh_process import Fresh, MakeEngine, load_and_run
from runtime.measure import RUNS_PER_ROUND, step_ms, timed_runs
from runtime.measurement import Measurement
from runtime.noise import NoiseWatch
from runtime.sustain import sustained_runs

_ROUNDS = 50
_AT_MOST_S = 20.0  # of each graph, where the user names no number of rounds
_WARM_LOADS = 3


def measure_here(
    args: argparse.Namespace, bundle: Bundle, measurement: Measurement, make_engine: MakeEngine
) -> None:
    """Fills a measurement: runs, what a step takes, a sustained run, loading and memory."""
    engine = make_engine(bundle, args.threads)
    measurement.conditions.update(thermal_conditions("before"))
    watch = NoiseWatch(args.threads or cores())
    try:
        _time(engine, bundle, measurement, args.rounds, watch)
        measurement.step_ms = step_ms(engine, bundle)
    finally:
        measurement.noise = watch.noise()
    if args.sustain:
        _sustain(engine, bundle, measurement, args.sustain)
    measurement.conditions.update(thermal_conditions("after"))
    if args.timing_only:
        return
    for graph in bundle.graphs:  # a file that is mapped cannot be dropped from the cache
        engine.unload(graph)
    _load(args, bundle, measurement, make_engine)


def _time(
    engine: Engine,
    bundle: Bundle,
    measurement: Measurement,
    asked: int | None,
    watch: NoiseWatch,
) -> None:
    rounds = _ROUNDS if asked is None else asked
    at_most_s = _AT_MOST_S if asked is None else math.inf
    total = (1 + rounds) * sum(RUNS_PER_ROUND.values())
    runs = timed_runs(engine, bundle, rounds=rounds, at_most_s=at_most_s)
    last = 0
    for run in tqdm(runs, "timing", total, unit="run"):
        measurement.runs.append(run)
        if run.round_index != last:
            last = run.round_index
            watch.tick()
    measurement.conditions["rounds"] = last


def _sustain(engine: Engine, bundle: Bundle, measurement: Measurement, for_s: float) -> None:
    with tqdm(total=round(for_s), desc="sustaining", unit="s") as bar:
        for at_s, taken_ms in sustained_runs(engine, bundle, for_s):
            measurement.sustained.append((at_s, taken_ms))
            bar.update(min(int(at_s), bar.total) - bar.n)


def _load(
    args: argparse.Namespace, bundle: Bundle, measurement: Measurement, make_engine: MakeEngine
) -> None:
    """Loads every graph in fresh processes: once with its file on the disk, then in the cache."""
    for graph in tqdm(bundle.graphs, "loading", unit="graph"):

        def fresh(*, cold: bool, graph: str = graph) -> Fresh:
            return load_and_run(make_engine, bundle, args.threads, graph, cold=cold)

        first = fresh(cold=True)
        loads = measurement.load_ms.setdefault(graph, {})
        if first.read_mib:  # else the system kept the file, or does not tell
            loads["cold"] = first.load_ms
        warm = [fresh(cold=False) for _ in range(_WARM_LOADS)]
        loads["warm"] = median(each.load_ms for each in warm)
        measurement.peak_memory_mib[graph] = max(each.peak_memory_mib for each in warm)
