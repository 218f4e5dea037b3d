import numpy as np
import pytest

from apps.ablation import PARTIAL, gain_cell, gains
from cq_edge.metrics import mean_interval

PAPERS = {
    "naive": (5.3, np.array([30.0, 31.0, 35.0])),
    "naive, cache half": (5.2, np.array([33.0, 34.0, 37.0])),
    "naive, corrected": (5.1, np.array([34.0, 33.0, 39.0])),
}
OURS = {
    "ours, no correction": (5.4, np.array([40.0, 40.0, 40.0])),
    "ours, cache half alone": (5.3, np.array([41.0, 42.0, 43.0])),
    "ours, quantisation alone": (5.2, np.array([43.0, 44.0, 44.0])),
    "ours": (5.1, np.array([44.0, 44.0, 45.0])),
}


def test_on_the_papers_schedule_halves_come_in_turn_and_on_ours_each_beside_the_other():
    papers, ours = gains(PAPERS | OURS)
    assert (papers["schedule"], papers["loop_speedup"], papers["captions"]) == (
        "the paper's",
        5.1,
        3,
    )
    found = [papers[f"{half}_db"] for half in ("cache", "quantisation", "both")]
    assert found == pytest.approx([8 / 3, 2 / 3, 10 / 3])
    found = [ours[f"{half}_db"] for half in ("cache", "quantisation", "both")]
    assert found == pytest.approx([2 / 3, 7 / 3, 13 / 3])


def test_the_interval_is_of_paired_captions():
    (papers,) = gains(PAPERS)
    assert papers["quantisation_db_ci"] == mean_interval(np.array([1.0, -1.0, 2.0]))
    low, high = papers["quantisation_db_ci"]
    assert gain_cell(papers, "quantisation") == f"+0.67 ({low:+.2f} to {high:+.2f})"


def test_a_schedule_that_was_not_drawn_in_every_way_is_left_out():
    assert [row["schedule"] for row in gains(OURS)] == ["ours"]
    assert gains({name: OURS[name] for name in ("ours", "ours, no correction")}) == []


def test_ways_that_lack_a_half_are_partial():
    assert set(PAPERS | OURS) - PARTIAL == {"naive, corrected", "ours"}
