"""The passes of a measurement on this machine, with progress bars."""

import argparse
import math
from contextlib import closing
from statistics import median
from time import perf_counter, sleep
from typing import Any

from tqdm import tqdm

from runtime.bundle import Bundle
from runtime.conditions import thermal_conditions
from runtime.engine import Engine
from runtime.fresh_process import Fresh, MakeEngine, load_and_run
from runtime.fresh_rounds import fresh_rounds
from runtime.measure import RUNS_PER_ROUND, step_ms
from runtime.measurement import Measurement
from runtime.noise import Noise, Watched, speed_conditions
from runtime.sustain import sustained_runs

_ROUNDS = 120
_AT_MOST_S = 20.0  # of each graph, where the user names no number of rounds
_AT_MOST_EACH_S = 4.0  # likewise, in one process
_PROCESSES = 12  # that the rounds are done in
# between their starts: what the clock and the neighbours on a shared processor do over seconds
# would be alike in processes that follow at once, and their medians then tell too little of it
_APART_S = 7.0
_WARM_LOADS = 3


def measure_here(
    args: argparse.Namespace, bundle: Bundle, measurement: Measurement, make_engine: MakeEngine
) -> None:
    """Fills a measurement: runs, what a step takes, a sustained run, loading and memory."""
    measurement.conditions.update(thermal_conditions("before"))
    _time(args, bundle, measurement, make_engine)
    engine = make_engine(bundle, args.threads)
    measurement.step_ms = step_ms(engine, bundle)
    if args.sustain:
        _sustain(engine, bundle, measurement, args.sustain)
    measurement.conditions.update(thermal_conditions("after"))
    if args.timing_only:
        return
    for graph in bundle.graphs:  # a file that is mapped cannot be dropped from the cache
        engine.unload(graph)
    _load(args, bundle, measurement, make_engine)


def _time(
    args: argparse.Namespace, bundle: Bundle, measurement: Measurement, make_engine: MakeEngine
) -> None:
    """Times the graphs in fresh processes, some seconds apart; none follows once a graph has
    taken its time."""
    rounds = _ROUNDS if args.rounds is None else args.rounds
    at_most_s, each_s = _AT_MOST_S, _AT_MOST_EACH_S
    if args.rounds is not None:
        at_most_s = each_s = math.inf
    processes = min(_PROCESSES, rounds)
    watched: dict[int, Watched] = {}
    next_s = 0.0
    bar = tqdm(total=(processes + rounds) * sum(RUNS_PER_ROUND.values()), desc="timing", unit="run")
    try:
        for process in range(processes):
            # the last ones of a number that does not divide have one round less
            share, done = -(-rounds // (processes - process)), measurement.rounds
            rounds -= share
            if measurement.longest_s > at_most_s:
                break
            _wait_until(next_s, bar)
            next_s = perf_counter() + (0.0 if args.quick else _APART_S)
            given = (make_engine, bundle, args.threads)
            with closing(fresh_rounds(*given, rounds=share, at_most_s=each_s)) as found:
                for each in found:
                    watched[process] = each.watched
                    measurement.add(each.runs, process, done)
                    bar.update(len(each.runs))
    finally:
        bar.close()
        measurement.conditions.update(rounds=measurement.rounds, processes=len(watched))
        measurement.conditions.update(speed_conditions(list(watched.values())))
        measurement.noise = Noise.of(list(watched.values()))


def _wait_until(moment_s: float, bar: "tqdm[Any]") -> None:
    left_s = moment_s - perf_counter()
    if left_s > 0:
        bar.set_postfix_str("waiting, to see other moments")
        sleep(left_s)
        bar.set_postfix_str("")


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
