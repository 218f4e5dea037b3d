import numpy as np
import pytest

from apps.frontier_margin import margins

ONES = np.ones(3)
OURS = [(4.0, 40 * ONES), (2.0, np.array([49.0, 50.0, 51.0]))]


def test_at_the_speed_of_every_point_ours_is_compared_with_the_best_other():
    others = {
        "near": [(2.0, np.array([48.0, 49.0, 50.0])), (3.0, 46 * ONES), (5.0, 30 * ONES)],
        "far": [(1.0, 90 * ONES), (1.5, 20 * ONES), (4.5, 20 * ONES)],
    }
    rows = margins(OURS, others)
    assert [row["loop_speedup"] for row in rows] == [1.0, 1.5, 2.0, 3.0, 4.0]
    assert [row["next"] for row in rows] == ["far", "near", "near", "near", "near"]
    assert [row["difference"] for row in rows] == pytest.approx([-40, 1, 1, -1, 2])


def test_the_interval_is_of_paired_captions():
    """Captions differ by more than the ways to draw them."""
    (first, *_) = margins(OURS, {"other": [(2.0, np.array([48.0, 49.0, 50.0]))]})
    assert first["difference_ci"] == (1, 1)
    (first, *_) = margins(OURS, {"other": [(2.0, np.array([48.0, 50.0, 52.0]))]})
    low, high = first["difference_ci"]
    assert low < 0 < high


def test_a_way_that_is_too_slow_is_not_compared_and_a_faster_one_counts_as_it_is():
    rows = margins(OURS, {"slow": [(1.0, 50 * ONES)], "fast": [(3.0, 41 * ONES)]})
    found = [(row["loop_speedup"], row["next"], row["difference"]) for row in rows]
    assert found == [(1.0, "slow", 0), (2.0, "fast", 9), (3.0, "fast", 4)]


def test_of_points_of_one_speed_the_best_counts():
    same = [(2.0, 45 * ONES), (2.0, 49 * ONES), (2.0, 40 * ONES), (3.0, 30 * ONES)]
    for curve in (same, same[::-1]):
        first, last = margins(OURS[1:], {"other": curve}), margins(curve, {"ours": OURS[1:]})
        assert (first[0]["difference"], last[0]["difference"]) == (1, -1)
