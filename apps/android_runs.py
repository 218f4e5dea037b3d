"""The passes of a measurement on a phone, with progress bars."""

import argparse
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

import numpy as np
from tqdm import tqdm

from runtime.adb import find_phone
from runtime.android import PhoneRunner, phone_conditions, runner_on_phone, thermal_status
from runtime.bundle import Bundle
from runtime.measure import TimedRun, counted_ms
from runtime.measurement import Measurement

_ROUNDS = 5
_WARM_UP_RUNS, _RUNS = 2, 10  # of each call of the runner
_WATCHED_MS = 500.0  # how long runs last while their memory is looked at, now and then


def measure_android(args: argparse.Namespace, bundle: Bundle, measurement: Measurement) -> None:
    """Fills a measurement: runs in rounds over the graphs, a sustained run, memory."""
    phone = find_phone(args.serial)
    measurement.conditions.update(phone_conditions(phone))
    measurement.conditions.update(
        engine=f"xnnpack, {args.runner.name} of the user",
        threads=args.threads or "chosen by the runner",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        exporter=f"executorch {version('executorch')}",
        thermal_status_before=thermal_status(phone),
        step_ms="not measured: the runner runs graphs only",
        load_cold="not measured: a phone's cache cannot be dropped without root",
    )
    with runner_on_phone(phone, args.runner, bundle, args.threads, args.timeout) as runner:
        try:
            _time(runner, bundle.graphs, measurement, args.rounds or _ROUNDS)
        finally:
            if measurement.is_profile:
                measurement.noise = measurement.noise_of_runs()
        if args.sustain:
            _sustain(runner, measurement, args.sustain)
        measurement.conditions["thermal_status_after"] = thermal_status(phone)
        if not args.timing_only:
            _watch_memory(runner, bundle.graphs, measurement)


def _time(
    runner: PhoneRunner, graphs: Sequence[str], measurement: Measurement, rounds: int
) -> None:
    """Calls the runner for graph after graph, round after round; the first runs of a call are
    its warm-up."""
    loads: dict[str, list[float]] = {graph: [] for graph in graphs}
    with tqdm(total=rounds * len(graphs), desc="timing", unit="call") as bar:
        for index in range(rounds):
            for graph in graphs:
                told = runner.run(graph, _WARM_UP_RUNS + _RUNS)
                for number, taken_ms in enumerate(told.taken_ms):
                    counts = 0 if number < _WARM_UP_RUNS else index + 1
                    measurement.runs.append(TimedRun(counts, graph, taken_ms, index))
                if told.load_ms:
                    loads[graph].append(told.load_ms)
                    measurement.load_ms[graph] = {"warm": median(loads[graph])}
                bar.update()
            measurement.conditions["rounds"] = index + 1


def _watch_memory(runner: PhoneRunner, graphs: Sequence[str], measurement: Measurement) -> None:
    taken_ms = {graph: median(own) for graph, own in counted_ms(measurement.runs).items()}
    for graph in tqdm(graphs, "memory", unit="graph"):
        runs = math.ceil(_WATCHED_MS / taken_ms[graph]) + 1
        measurement.peak_memory_mib[graph] = runner.peak_memory_mib(graph, runs)


def _sustain(runner: PhoneRunner, measurement: Measurement, for_s: float) -> None:
    """Runs the full graph in one call, as often as takes so long at its median."""
    one_ms = median(counted_ms(measurement.runs)["denoise"])
    told = runner.run("denoise", max(1, math.ceil(for_s * 1e3 / one_ms)))
    ends = np.cumsum(told.taken_ms) / 1e3
    measurement.sustained.extend(zip(ends.tolist(), told.taken_ms, strict=True))
