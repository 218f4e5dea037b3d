from itertools import pairwise, product

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, total_error
from cq_edge.errors import UsageError
from cq_edge.latency import DeviceProfile
from cq_edge.planner import best_at_speedup, best_within_ms, plan_frontier

PROFILE = DeviceProfile(
    "xnnpack", "ab", {"encode": 2.0, "denoise": 10.0, "denoise_shallow": 3.0, "decode": 5.0}
)


def random_errors(seed, steps=8, max_gap=3):
    errors = np.random.default_rng(seed).uniform(0.1, 1.0, (steps, max_gap + 1))
    errors[:, 0] = 0
    return errors


def every_schedule(errors):
    """Every schedule of full and shallow steps that the table covers."""
    steps, columns = errors.shape
    for rest in product("FS", repeat=steps - 1):
        schedule = CacheSchedule.from_string("F" + "".join(rest))
        if schedule.max_gap < columns:
            yield schedule


@pytest.mark.parametrize("seed", range(5))
def test_no_schedule_beats_the_frontier(seed):
    errors = random_errors(seed)
    frontier = plan_frontier(errors, PROFILE, 2)
    for schedule in every_schedule(errors):
        error, taken = total_error(errors, schedule), PROFILE.picture_ms(schedule, 2)
        best = best_within_ms(frontier, taken)
        assert best.error <= error + 1e-12
        assert best.picture_ms <= taken


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
    errors[2:] = 0  # whatever follows step 2 is free
    assert plan_frontier(errors, PROFILE, 1)[-1].error == 0
    assert plan_frontier(errors, PROFILE, 1)[-1].schedule.counts["full"] < 8


def test_the_frontier_of_fifty_steps_takes_well_under_a_second():
    from time import perf_counter

    errors = random_errors(0, steps=51, max_gap=10)
    start = perf_counter()
    assert len(plan_frontier(errors, PROFILE, 2)) > 20
    assert perf_counter() - start < 1


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
    message = r"^no plan takes 60 ms or less on this device: the fastest takes 85 ms$"
    with pytest.raises(UsageError, match=message):
        best_within_ms(frontier, 60)
    message = r"^no plan is 9 times faster than every step full on this device: the fastest is "
    with pytest.raises(UsageError, match=message):
        best_at_speedup(frontier, 9)
