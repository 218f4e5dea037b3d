from itertools import pairwise

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, plan_full_steps
from cq_edge.errors import UsageError
from cq_edge.frontier import ReuseErrors
from cq_edge.latency import DeviceProfile
from cq_edge.planner import (
    best_at_speedup,
    best_with_full_steps,
    best_within_ms,
    plan_frontier,
    plan_with_full_steps,
)

PROFILE = DeviceProfile(
    "xnnpack", "ab", {"encode": 2.0, "denoise": 10.0, "denoise_shallow": 3.0, "decode": 5.0}
)


def random_errors(seed, steps=8, max_gap=3):
    """Errors of shallow, skip and unguided steps, each costlier than the one before."""
    errors = np.random.default_rng(seed).uniform(0.1, 1.0, (steps, max_gap + 1))
    errors[:, 0] = 0
    return ReuseErrors(errors, 2 * errors[:, :3], 0.7 * errors[:, :2])


def without_forecasts(errors):
    never = np.zeros((len(errors.shallow), 1))
    return ReuseErrors(errors.shallow, never, never)


@pytest.mark.parametrize("seed", range(5))
def test_of_full_and_shallow_steps_the_frontier_is_the_papers_program_at_every_count(seed):
    errors = without_forecasts(random_errors(seed))
    for count in range(2, 9):
        papers = plan_full_steps(errors.shallow, count)
        ms = PROFILE.picture_ms(papers, 2)
        best = best_within_ms(plan_frontier(errors, PROFILE, 2), ms)
        assert best.error <= errors.total(papers) + 1e-12
        assert best_with_full_steps(errors, count).counts["full"] <= count
        found = errors.total(best_with_full_steps(errors, count))
        assert found == pytest.approx(errors.total(papers))


def test_so_many_full_steps_are_kept_and_no_step_goes_unguided():
    errors = random_errors(3)
    plan = plan_with_full_steps(errors, 4, PROFILE, 2)
    assert plan.schedule.counts["full"] == 4
    assert plan.schedule.unguided == 0
    assert plan.error == pytest.approx(errors.total(plan.schedule))
    assert plan.picture_ms == PROFILE.picture_ms(plan.schedule, 2)
    fewer = errors.total(best_with_full_steps(without_forecasts(errors), 4))
    assert plan.error <= fewer


def test_too_few_full_steps_are_refused_with_what_would_do():
    with pytest.raises(UsageError, match=r"^1 full steps of 8 are too few .* ask for 2 or more"):
        best_with_full_steps(without_forecasts(random_errors(0)), 1)
    with pytest.raises(UsageError, match=r"^9 full steps of 8: ask for 1 to 8$"):
        best_with_full_steps(random_errors(0), 9)


def test_along_the_frontier_time_rises_and_error_falls():
    frontier = plan_frontier(random_errors(0), PROFILE, 2)
    assert all(a.picture_ms < b.picture_ms for a, b in pairwise(frontier))
    assert all(a.error > b.error for a, b in pairwise(frontier))
    assert frontier[-1].schedule == CacheSchedule.all_full(8)
    assert frontier[-1].speedup == 1
    for plan in frontier:
        assert plan.picture_ms == PROFILE.picture_ms(plan.schedule, 2)


def test_a_full_step_that_helps_nothing_is_not_on_the_frontier():
    errors = random_errors(0)
    for array in (errors.shallow, errors.skip, errors.unguided):
        array[2:] = 0  # whatever builds on step 2 or later is free
    assert plan_frontier(errors, PROFILE, 1)[-1].error == 0
    assert plan_frontier(errors, PROFILE, 1)[-1].schedule.counts["full"] < 8


def test_a_speedup_is_met_and_a_budget_is_kept():
    frontier = plan_frontier(random_errors(1), PROFILE, 2)
    assert best_at_speedup(frontier, 1.0) == frontier[-1]
    for speedup in (1.2, 1.5, 2.0):
        plan = best_at_speedup(frontier, speedup)
        slower = frontier[frontier.index(plan) + 1]
        assert slower.speedup < speedup <= plan.speedup


def test_an_impossible_budget_says_what_is_possible():
    frontier = plan_frontier(random_errors(1), PROFILE, 2)
    assert best_within_ms(frontier, frontier[0].picture_ms) == frontier[0]
    fastest = frontier[0].picture_ms
    message = f"^no plan takes 20 ms or less on this device: the fastest takes {fastest:.0f} ms$"
    with pytest.raises(UsageError, match=message):
        best_within_ms(frontier, 20)
    message = r"^no plan is 9 times faster than every step full on this device: the fastest is "
    with pytest.raises(UsageError, match=message):
        best_at_speedup(frontier, 9)
