import os

import pytest

from apps.engines import ENGINES
from cq_edge.errors import BundleError
from runtime.fresh_rounds import fresh_rounds
from runtime.measure import RUNS_PER_ROUND
from tests.tiny_bundle import FakeEngine


class Fallen(FakeEngine):
    """Ends its process at its first run of the last graph."""

    def run(self, graph, inputs):
        if graph == "decode":
            os._exit(9)
        return super().run(graph, inputs)


def _rounds(engine, bundle):
    return fresh_rounds(engine, bundle, 1, rounds=2, at_most_s=60.0)


def test_rounds_of_real_graphs_come_one_by_one_from_another_process(real_bundle):
    found = list(_rounds(ENGINES["xnnpack"], real_bundle))
    company = [graph for graph, runs in RUNS_PER_ROUND.items() for _ in range(runs)]
    assert [[run.graph for run in each.runs] for each in found] == [company] * 3
    assert [each.runs[0].round_index for each in found] == [0, 1, 2]
    assert all(run.taken_ms > 0 for each in found for run in each.runs)
    assert [len(each.watched.work_ms) for each in found] == [1, 2, 3]
    assert found[0].watched.wall_s < found[2].watched.wall_s


def test_a_process_that_falls_is_told(bundle):
    with pytest.raises(BundleError, match="that times the graphs ended with exit code 9: is there"):
        list(_rounds(Fallen, bundle))
