"""Core ML's graphs timed by coremltools' own benchmarker: on this Mac, or on an iPhone or iPad.

It runs where Core ML and (for other devices) Xcode are: on macOS. Its classes are
`coremltools.models.ml_program.experimental`'s `perf_utils.MLModelBenchmarker` and
`remote_device.Device`, both declared experimental.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from statistics import median
from typing import Any

from cq_edge.errors import DeviceError
from runtime.bundle import Bundle
from runtime.coreml_engine import SOLE, without_int64
from runtime.measure import sample_inputs
from runtime.operator_time import OperatorTime

_LOADS, _RUNS = 4, 10  # of a call of the benchmarker


def benchmarkers(bundle: Bundle, device: Any = None) -> dict[str, Any]:
    """Returns coremltools' benchmarker of each graph.

    Args:
        bundle: Of Core ML packages.
        device: A prepared device of `connected_device`; None: this Mac.
    """
    from coremltools.models import MLModel
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker

    found = {}
    for graph in bundle.graphs:
        entry = bundle.manifest.graph(graph)
        function = None if entry.method == SOLE else entry.method
        path = str(bundle.path(entry.file))
        model = MLModel(path, function_name=function, skip_model_load=device is not None)
        found[graph] = MLModelBenchmarker(model, device)
    return found


async def connected_device(development_team: str) -> Any:
    """Returns the iPhone or iPad that is connected, with coremltools' runner app launched on it.

    Args:
        development_team: Of the Apple developer account that signs the app.

    Raises:
        DeviceError: There is none, or the app cannot be built, signed or launched.
    """
    from coremltools.models.ml_program.experimental import remote_device as remote

    kinds = (remote.DeviceType.IPHONE, remote.DeviceType.IPAD)
    try:
        devices = [d for kind in kinds for d in remote.Device.get_connected_devices(kind)]
        if len(devices) == 1:
            credentials = remote.AppSigningCredentials(development_team=development_team)
            return await devices[0].prepare_for_model_debugging(credentials=credentials)
    except Exception as error:
        raise DeviceError(f"coremltools cannot use the device: {error}") from error
    names = ", ".join(device.name for device in devices) or "none"
    raise DeviceError(f"connect one iPhone or iPad, in developer mode: connected are {names}")


async def load_times_ms(benchmarker: Any) -> tuple[float, float]:
    """Returns what loading takes the first time, when Core ML compiles for the device, and the
    median of later times."""
    samples = (await benchmarker.benchmark_load(iterations=_LOADS)).samples
    return samples[0], median(samples[1:])


async def benchmarked_runs(
    graphs: Mapping[str, Any], bundle: Bundle, rounds: int
) -> AsyncIterator[tuple[int, str, list[float]]]:
    """Benchmarks graph after graph, round after round.

    Returns:
        An iterator of (round from 1, graph, ms of its runs), each after one run to warm up.
    """
    for index in range(1, 1 + rounds):
        for graph, benchmarker in graphs.items():
            inputs = without_int64(sample_inputs(bundle, graph))
            found = await benchmarker.benchmark_predict(inputs, iterations=_RUNS, warmup=True)
            yield index, graph, list(found.samples)


def operator_times(bundle: Bundle, graphs: Mapping[str, Any]) -> list[OperatorTime]:
    """Returns every operator's share of its graph's time, the largest first."""
    return asyncio.run(_operator_times(bundle, graphs))


async def _operator_times(bundle: Bundle, graphs: Mapping[str, Any]) -> list[OperatorTime]:
    rows = []
    for graph, benchmarker in graphs.items():
        inputs = without_int64(sample_inputs(bundle, graph))
        for info in await benchmarker.benchmark_operation_execution(inputs, _RUNS, warmup=True):
            if info.measurement.statistics is None:
                continue
            usage = info.compute_device_usage
            unit = "–" if usage is None else type(usage.preferred_compute_device).__name__
            taken = info.measurement.statistics.median
            rows.append(OperatorTime(graph, info.spec.type, unit, taken))
    return sorted(rows, key=lambda row: -row.p50_ms)
