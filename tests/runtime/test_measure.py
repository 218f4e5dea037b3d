import math
import time

import numpy as np
import pytest
import scipy.stats

from runtime.bundle import open_bundle
from runtime.measure import RUNS_PER_ROUND, TimedRun, counted_ms, figures, measure_graphs
from runtime.sustain import drift, sustained_runs
from tests.tiny_bundle import FakeEngine, write_bundle


class Paced(FakeEngine):
    """Takes 20 ms for the full graph, counts runs, and knows what was loaded together."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, int] = {}
        self.together: set[frozenset[str]] = set()

    def run(self, graph, inputs):
        self.runs[graph] = self.runs.get(graph, 0) + 1
        self.together.add(frozenset(self.loaded))
        if graph == "denoise":
            time.sleep(0.02)
        return super().run(graph, inputs)


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def test_every_graph_is_timed_with_inputs_of_its_shapes_in_the_company_of_a_picture(bundle):
    engine = Paced()
    profile = measure_graphs(engine, bundle, rounds=3)
    # four rounds, and once more the full graph, guided, before the steps that run no graph
    expected = {graph: 4 * runs for graph, runs in RUNS_PER_ROUND.items()}
    assert engine.runs == {**expected, "denoise": expected["denoise"] + 2}
    first = engine.calls.index("denoise")
    assert engine.calls[first : first + 9] == ["denoise"] * 4 + ["denoise_shallow"] * 4 + [
        "denoise"
    ]
    assert 0 < profile.step_ms < 20
    assert profile.graphs_ms["denoise"] >= 20
    assert profile.graphs_ms["denoise_shallow"] < profile.graphs_ms["denoise"]
    profile.require_graphs("xnnpack", bundle.manifest.files["graphs.pte"].sha256)


def test_no_more_is_loaded_than_a_picture_has_loaded(bundle):
    engine = Paced()
    measure_graphs(engine, bundle, rounds=1)
    denoisers = frozenset({"denoise", "denoise_shallow"})
    assert engine.together == {frozenset({"encode"}), denoisers, frozenset({"decode"})}
    assert engine.loaded == {"encode"}  # what a picture runs first


def test_a_slow_graph_is_run_less_often(bundle):
    engine = Paced()
    measure_graphs(engine, bundle, rounds=30, at_most_s=0.07)
    assert 1 <= engine.runs["denoise"] <= 5 + 2
    assert engine.runs["encode"] > engine.runs["denoise"]


def test_the_first_round_does_not_count_unless_it_is_all_there_is():
    runs = [TimedRun(0, "encode", 9.0), TimedRun(0, "encode", 8.0), TimedRun(1, "encode", 2.0)]
    assert counted_ms(runs) == {"encode": [2.0]}
    assert counted_ms(runs[:2]) == {"encode": [8.0]}
    elsewhere = TimedRun(0, "encode", 7.0, process=1)
    assert counted_ms([*runs[:2], elsewhere]) == {"encode": [8.0, 7.0]}


def test_quantiles_are_numpys():
    taken = np.random.default_rng(0).uniform(1, 9, 101)
    row = figures([TimedRun(1, "encode", ms) for ms in taken])
    found = (row.p10_ms, row.p50_ms, row.p90_ms, row.p99_ms)
    assert np.allclose(found, np.quantile(taken, (0.1, 0.5, 0.9, 0.99)), atol=1e-5)
    assert row.runs == 101
    assert row.low_ms is None and row.high_ms is None


def _run_of_processes(rng):
    """The runs of twelve processes, some slower by a few percent throughout."""
    levels = 10 * np.exp(rng.normal(0, 0.03, 12))
    return [
        TimedRun(1 + index, "decode", level * rng.normal(1, 0.002), process)
        for process, level in enumerate(levels)
        for index in range(10)
    ]


def test_the_stated_spread_holds_as_many_processes_as_it_says_as_often_as_it_says():
    rng, enough = np.random.default_rng(0), []
    for _ in range(2000):
        row = figures(_run_of_processes(rng))
        limits = (math.log(ms / 10) / 0.03 / math.sqrt(2) for ms in (row.low_ms, row.high_ms))
        below, above = ((1 + math.erf(limit)) / 2 for limit in limits)
        enough.append(above - below >= 0.95)
    assert np.mean(enough) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("count", [2, 5, 12, 30])
def test_the_stated_spread_is_a_tolerance_interval(count):
    medians = np.exp(np.random.default_rng(count).normal(1, 0.02, count))
    row = figures([TimedRun(1, "decode", ms, process) for process, ms in enumerate(medians)])
    n = min(count, 12)  # more processes than that count as so many
    chi2 = scipy.stats.chi2.ppf(0.05, n - 1)
    factor = scipy.stats.norm.ppf(0.975) * np.sqrt((n - 1) * (1 + 1 / n) / chi2)
    width = np.exp(factor * np.std(np.log(medians), ddof=1))
    assert row.high_ms == pytest.approx(np.median(medians) * width, rel=1e-3)
    assert row.low_ms == pytest.approx(np.median(medians) / width, rel=1e-3)


def test_two_measurements_lie_within_each_others_stated_spread():
    rng = np.random.default_rng(1)
    rows = [figures(_run_of_processes(rng)) for _ in range(1000)]
    pairs = zip(rows[::2], rows[1::2], strict=True)
    agree = [a.low_ms <= b.p50_ms <= a.high_ms and b.low_ms <= a.p50_ms <= b.high_ms
             for a, b in pairs]  # fmt: skip
    assert np.mean(agree) > 0.95


def test_a_sustained_run_ends_in_time_and_tells_drift(bundle):
    runs = list(sustained_runs(Paced(), bundle, 0.3))
    assert 5 <= len(runs) <= 15
    assert 0.3 <= runs[-1][0] < 0.5
    assert all(taken_ms >= 20 for _, taken_ms in runs)
    slowing = [(float(i), 10.0 if i < 10 else 13.0) for i in range(20)]
    assert drift(slowing) == pytest.approx(1.3)
    assert drift(slowing[:9]) is None
