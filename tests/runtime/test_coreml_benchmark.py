"""coremltools' benchmarker runs on macOS only: here its interface is checked, and what is made of
what it tells."""

import asyncio
import inspect
from types import SimpleNamespace

from runtime.coreml_benchmark import benchmarked_runs, load_times_ms, operator_times
from runtime.operator_time import OperatorTime


class Benchmarker:
    """Takes what coremltools' takes."""

    async def benchmark_load(self, iterations=1):
        return SimpleNamespace(samples=[90.0, 5.0, 4.0, 6.0][:iterations])

    async def benchmark_predict(self, inputs=None, iterations=1, warmup=False):
        assert warmup
        assert all(array.dtype != "int64" for array in inputs.values())
        return SimpleNamespace(samples=[2.0] * iterations)

    async def benchmark_operation_execution(self, inputs=None, iterations=1, warmup=False):
        del inputs, iterations, warmup
        told = [("conv", 1.5, SimpleNamespace(preferred_compute_device=Benchmarker())),
                ("relu", 0.5, None), ("const", None, None)]  # fmt: skip
        return [
            SimpleNamespace(
                spec=SimpleNamespace(type=kind),
                compute_device_usage=usage,
                measurement=SimpleNamespace(
                    statistics=None if taken is None else SimpleNamespace(median=taken)
                ),
            )
            for kind, taken, usage in told
        ]


def test_the_stand_in_takes_what_coremltools_takes():
    from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    from coremltools.models.ml_program.experimental.remote_device import (
        AppSigningCredentials,
        Device,
    )

    for name in ("benchmark_load", "benchmark_predict", "benchmark_operation_execution"):
        theirs = inspect.signature(getattr(MLModelBenchmarker, name)).parameters
        assert list(inspect.signature(getattr(Benchmarker, name)).parameters) == list(theirs)
    assert list(inspect.signature(MLModelBenchmarker).parameters) == ["model", "device"]
    assert "development_team" in inspect.signature(AppSigningCredentials).parameters
    assert "credentials" in inspect.signature(Device.prepare_for_model_debugging).parameters


def test_runs_come_round_by_round(bundle):
    async def collect():
        graphs = {"encode": Benchmarker(), "decode": Benchmarker()}
        return [row async for row in benchmarked_runs(graphs, bundle, 2)]

    rows = asyncio.run(collect())
    assert [(index, graph) for index, graph, _ in rows] == [
        (1, "encode"), (1, "decode"), (2, "encode"), (2, "decode")
    ]  # fmt: skip
    assert all(taken == [2.0] * 10 for _, _, taken in rows)


def test_the_first_load_compiles():
    assert asyncio.run(load_times_ms(Benchmarker())) == (90.0, 5.0)


def test_operators_are_told_the_largest_first(bundle):
    rows = operator_times(bundle, {"decode": Benchmarker()})
    assert rows == [
        OperatorTime("decode", "conv", "Benchmarker", 1.5),
        OperatorTime("decode", "relu", "–", 0.5),
    ]
