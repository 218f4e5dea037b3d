"""The passes of a measurement with Core ML: on this Mac's operators, or on an iPhone or iPad."""

import argparse
import asyncio
from datetime import UTC, datetime
from importlib.metadata import version

from tqdm import tqdm

from runtime.bundle import Bundle
from runtime.coreml_benchmark import (
    benchmarked_runs,
    benchmarkers,
    connected_device,
    load_times_ms,
    operator_times,
)
from runtime.measure import TimedRun
from runtime.measurement import Measurement

_ROUNDS = 5


def measure_operators(bundle: Bundle, measurement: Measurement) -> None:
    """Adds what Core ML's compute plan says of every operator on this Mac."""
    measurement.operators.extend(operator_times(bundle, benchmarkers(bundle)))


def measure_ios(args: argparse.Namespace, bundle: Bundle, measurement: Measurement) -> None:
    """Fills a measurement from the iPhone or iPad that is connected to this Mac."""
    asyncio.run(_measure_ios(args, bundle, measurement))


async def _measure_ios(args: argparse.Namespace, bundle: Bundle, measurement: Measurement) -> None:
    device = await connected_device(args.team)
    measurement.conditions.update(
        engine=f"coreml, coremltools {version('coremltools')}",
        machine=f"{device.type.value} {device.name}",
        system=f"iOS {device.os_version}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        watched="no: coremltools tells times only, neither memory nor other work",
    )
    graphs = benchmarkers(bundle, device)
    rounds = args.rounds or _ROUNDS
    with tqdm(total=rounds * len(bundle.graphs), desc="timing", unit="call") as bar:
        async for index, graph, taken in benchmarked_runs(graphs, bundle, rounds):
            measurement.runs.extend(TimedRun(index, graph, each_ms) for each_ms in taken)
            measurement.conditions["rounds"] = index
            bar.update()
    measurement.noise = measurement.noise_of_runs()
    for graph, benchmarker in graphs.items():
        first_ms, later_ms = await load_times_ms(benchmarker)
        measurement.load_ms[graph] = {"cold": first_ms, "warm": later_ms}
