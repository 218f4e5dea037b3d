import time

import pytest

from runtime.bundle import open_bundle
from runtime.measure import measure_graphs
from tests.tiny_bundle import FakeEngine, write_bundle


class Paced(FakeEngine):
    """Takes 20 ms for the full graph, and counts runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, int] = {}

    def run(self, graph, inputs):
        self.runs[graph] = self.runs.get(graph, 0) + 1
        if graph == "denoise":
            time.sleep(0.02)
        return super().run(graph, inputs)


@pytest.fixture
def bundle(tmp_path):
    write_bundle(tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


def test_every_graph_is_timed_with_inputs_of_its_shapes(bundle):
    engine = Paced()
    profile = measure_graphs(engine, bundle, runs=3)
    # once more of the full graph, guided, before the steps that run no graph
    assert engine.runs == {**dict.fromkeys(bundle.manifest.graphs, 2 + 3), "denoise": 2 + 3 + 2}
    assert 0 < profile.step_ms < 20
    assert profile.graphs_ms["denoise"] >= 20
    assert profile.graphs_ms["denoise_shallow"] < profile.graphs_ms["denoise"]
    profile.require_graphs("xnnpack", bundle.manifest.files["graphs.pte"].sha256)


def test_a_slow_graph_is_run_less_often(bundle):
    engine = Paced()
    measure_graphs(engine, bundle, runs=100, at_most_s=0.07)
    assert 1 <= engine.runs["denoise"] <= 5 + 2
    assert engine.runs["encode"] > engine.runs["denoise"]
