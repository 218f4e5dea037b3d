from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode, plan_full_steps
from cq_edge.errors import UsageError
from cq_edge.forecast_share import forecast_share
from cq_edge.frontier import search_frontier
from cq_edge.influence import noise_influence
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.plan_error import plan_errors
from cq_edge.planner import (
    best_at_speedup,
    best_with_full_steps,
    best_within_loop_ms,
    best_within_ms,
    plan_frontier,
    plan_with_full_steps,
    too_few_to_reuse,
    with_better_end,
)
from cq_edge.reuse_table import ReuseTable

PROFILE = DeviceProfile(
    "xnnpack", "ab", {"encode": 2.0, "denoise": 10.0, "denoise_shallow": 3.0, "decode": 5.0}
)


NOISE_SCHEDULE = NoiseScheduleConfig()


def no_forecast(steps, columns):
    """Weights that take the last value again."""
    return np.zeros((steps, columns + 1, columns), np.float32)


def random_table(seed, steps=8, max_gap=3, base_error=0.0, name="ddim"):
    """Of random errors: of shallow, skip and unguided steps."""
    errors = np.random.default_rng(seed).uniform(0.1, 1.0, (steps, max_gap + 1))
    errors[:, 0] = 0
    ones = np.ones((steps, max_gap + 1, 2), np.float32)
    timesteps = make_noise_scheduler(name, steps, NOISE_SCHEDULE).timesteps
    return ReuseTable(
        name, steps, 5.0, base_error, timesteps, *2 * [np.ones(steps)], 2 * errors, 3 * errors,
        errors, 2 * errors[:, :3], 0.7 * errors[:, :2],
        *(no_forecast(steps, columns) for columns in (max_gap + 1, 3, 2)),
        np.zeros(errors.shape, np.float32), *4 * [ones],
    )  # fmt: skip


def without_forecasts(table):
    never = np.zeros((len(table.timesteps), 1))
    weight = no_forecast(len(never), 1)
    return replace(table, skip=never, unguided=never, skip_weight=weight, unguided_weight=weight)


@pytest.mark.parametrize("seed", range(5))
def test_of_full_and_shallow_steps_the_frontier_is_the_papers_program_at_every_count(seed):
    table = replace(without_forecasts(random_table(seed)), noise_influence=np.zeros(8))
    errors = replace(table.reuse_errors(), squared=False)
    for count in range(2, 9):
        papers = plan_full_steps(errors.shallow, count)
        plans = search_frontier(errors, {mode: PROFILE.mode_ms(mode, 2) for mode in Mode})
        ms = PROFILE.loop_ms(papers, 2)
        total = [total for plan, total in plans if PROFILE.loop_ms(plan, 2) <= ms][-1]
        assert total <= errors.total(papers) + 1e-12
        assert best_with_full_steps(errors, count).counts["full"] <= count
        found = errors.total(best_with_full_steps(errors, count))
        assert found == pytest.approx(errors.total(papers))


def test_so_many_full_steps_are_kept_and_no_step_goes_unguided_or_is_repeated():
    table = random_table(3, base_error=0.125)
    table.noise_pred[:, 0] = 0.5
    errors = table.reuse_errors()
    plan = plan_with_full_steps(table, 4, PROFILE, 2, NOISE_SCHEDULE)
    assert plan.schedule.counts["full"] == 4
    assert plan.schedule.unguided == plan.schedule.repeated == 0
    noise_scheduler = make_noise_scheduler("ddim", 8, NOISE_SCHEDULE)
    assert [plan.error] == plan_errors(table, noise_scheduler, [plan.schedule]).tolist()
    assert plan.error > 0.125
    assert plan.picture_ms == PROFILE.picture_ms(plan.schedule, 2)
    reusing = without_forecasts(table).reuse_errors()
    assert errors.total(plan.schedule) <= errors.total(best_with_full_steps(reusing, 4))


def test_too_few_full_steps_are_refused_with_what_would_do():
    with pytest.raises(UsageError, match=r"^1 full steps of 8 are too few .* ask for 2 or more"):
        best_with_full_steps(without_forecasts(random_table(0)).reuse_errors(), 1)
    with pytest.raises(UsageError, match=r"^9 full steps of 8: ask for 1 to 8$"):
        best_with_full_steps(random_table(0).reuse_errors(), 9)


def test_along_the_frontier_time_rises_and_error_falls():
    frontier = plan_frontier([random_table(0)], PROFILE, 2, NOISE_SCHEDULE)
    assert all(a.picture_ms < b.picture_ms for a, b in pairwise(frontier))
    assert all(a.error > b.error for a, b in pairwise(frontier))
    assert frontier[-1].schedule == CacheSchedule.all_full(8)
    assert frontier[-1].speedup == 1
    noise_scheduler = make_noise_scheduler("ddim", 8, NOISE_SCHEDULE)
    predicted = plan_errors(random_table(0), noise_scheduler, [plan.schedule for plan in frontier])
    assert [plan.error for plan in frontier] == pytest.approx(predicted.tolist())
    for plan in frontier:
        assert plan.picture_ms == PROFILE.picture_ms(plan.schedule, 2)


def test_the_frontier_has_plans_whose_noise_cancels_and_plans_that_average_it_away():
    """The last predictions of PNDM count with changing signs."""
    noise_scheduler = make_noise_scheduler("pndm", 11, NOISE_SCHEDULE)
    total, few = 12, np.minimum(np.arange(4), 1) * 1e-3
    timesteps, errors = noise_scheduler.timesteps, np.tile(few, (12, 1))
    ones, forecast = np.ones((total, 4, 2), np.float32), no_forecast(total, 4) - 0.5
    table = ReuseTable(
        "pndm", 11, 5.0, 0.0, timesteps, noise_influence(noise_scheduler), np.ones(total),
        1 + errors, *2 * [errors], 4 * errors[:, :3], 9 * errors[:, :2], forecast,
        *(no_forecast(total, columns) - 0.5 for columns in (3, 2)),
        np.zeros((total, 4), np.float32), *4 * [ones],
    )  # fmt: skip
    table = replace(table, forecast_share=forecast_share(table, noise_scheduler))
    frontier = plan_frontier([table], PROFILE, 2, NOISE_SCHEDULE)
    ours = {plan.schedule for plan in frontier}
    costs = {mode: PROFILE.mode_ms(mode, 2) for mode in Mode}
    for errors in table.errors_to_search():
        found = [schedule for schedule, _ in search_frontier(errors, costs)]
        predicted = plan_errors(table, noise_scheduler, found)
        for schedule, error in zip(found, predicted, strict=True):
            if PROFILE.loop_ms(schedule, 2) > 2 * 10 * total:
                assert schedule not in ours  # it takes longer than every step full
                continue
            assert best_within_ms(frontier, PROFILE.picture_ms(schedule, 2)).error <= error
        assert ours & set(found) != ours  # neither search finds all of them


@pytest.mark.parametrize("branches", [1, 2])
def test_a_better_end_is_priced_like_any_plan(branches):
    few = random_table(2, steps=5, name="euler")
    device = (PROFILE, branches, NOISE_SCHEDULE)
    full_ms = PROFILE.loop_ms(CacheSchedule.all_full(8), branches)
    gains = {-5.0: [], 0.0: [], 20.0: []}
    for plan in plan_frontier([random_table(1), few], *device):
        loop_ms = PROFILE.loop_ms(plan.schedule, branches)
        for spare_ms in gains:
            found = with_better_end(plan, loop_ms + spare_ms, *device)
            found_ms = PROFILE.loop_ms(found.schedule, branches)
            assert found_ms <= loop_ms + max(spare_ms, 0)
            assert found.speedup == pytest.approx(full_ms / found_ms)
            assert found.picture_ms == PROFILE.picture_ms(found.schedule, branches)
            name, steps = plan.table.noise_scheduler, plan.table.steps
            noise_scheduler = make_noise_scheduler(name, steps, NOISE_SCHEDULE)
            (error,) = plan_errors(plan.table, noise_scheduler, [found.schedule])
            assert found.error == pytest.approx(error)
            gains[spare_ms].append(plan.error - found.error)
        assert with_better_end(plan, 1e9, *device).speedup > 1 - 1e-9
    assert min(gains[0.0]) >= 0
    assert max(gains[0.0]) > 0
    assert gains[-5.0] == gains[0.0]
    assert sum(gains[20.0]) > sum(gains[0.0])


def test_the_best_plan_for_a_loop_is_the_best_that_fits_or_the_fastest():
    device = (PROFILE, 2, NOISE_SCHEDULE)
    frontier = plan_frontier([random_table(1)], *device)
    for loop_ms in (1.0, 60.0, 100.0, 150.0):
        fits = [p for p in frontier if PROFILE.loop_ms(p.schedule, 2) <= loop_ms]
        expected = with_better_end(fits[-1] if fits else frontier[0], loop_ms, *device)
        assert best_within_loop_ms(frontier, loop_ms, *device) == expected


def test_a_full_step_that_helps_nothing_is_not_on_the_frontier():
    table = random_table(0)
    for array in (table.noise_pred, table.shallow, table.skip, table.unguided):
        array[2:] = 0  # whatever builds on step 2 or later is free
    assert plan_frontier([table], PROFILE, 1, NOISE_SCHEDULE)[-1].error == 0
    assert plan_frontier([table], PROFILE, 1, NOISE_SCHEDULE)[-1].schedule.counts["full"] < 8


def test_fewer_steps_are_chosen_where_their_base_error_is_worth_it():
    own, few = random_table(0), random_table(1, steps=4, base_error=0.3, name="dpmsolver++")
    frontier = plan_frontier([own, few], PROFILE, 2, NOISE_SCHEDULE)
    for plan in (
        *plan_frontier([own], PROFILE, 2, NOISE_SCHEDULE),
        *plan_frontier([few], PROFILE, 2, NOISE_SCHEDULE),
    ):
        assert best_within_ms(frontier, plan.picture_ms).error <= plan.error
    names = [plan.table.noise_scheduler for plan in frontier]
    assert names[0] == "dpmsolver++"
    assert names[-1] == "ddim"
    every_step = PROFILE.loop_ms(CacheSchedule.all_full(8), 2)
    for plan in frontier:
        assert plan.speedup == every_step / PROFILE.loop_ms(plan.schedule, 2)


def test_the_papers_objective_says_nothing_of_other_steps():
    own, few = random_table(0), random_table(1, steps=4, name="dpmsolver++")
    frontier = plan_frontier([own, few], PROFILE, 2, NOISE_SCHEDULE, "feature_l1")
    assert {plan.table.noise_scheduler for plan in frontier} == {"ddim"}


def test_a_speedup_is_met_and_a_budget_is_kept():
    frontier = plan_frontier([random_table(1)], PROFILE, 2, NOISE_SCHEDULE)
    assert best_at_speedup(frontier, 1.0) == frontier[-1]
    for speedup in (1.2, 1.5, 2.0):
        plan = best_at_speedup(frontier, speedup)
        slower = frontier[frontier.index(plan) + 1]
        assert slower.speedup < speedup <= plan.speedup


def test_an_impossible_budget_says_what_is_possible():
    frontier = plan_frontier([random_table(1)], PROFILE, 2, NOISE_SCHEDULE)
    assert best_within_ms(frontier, frontier[0].picture_ms) == frontier[0]
    fastest = frontier[0].picture_ms
    message = f"^no plan takes 20 ms or less on this device: the fastest takes {fastest:.0f} ms$"
    with pytest.raises(UsageError, match=message):
        best_within_ms(frontier, 20)
    message = r"^no plan is 9 times faster than every step full on this device: the fastest is "
    with pytest.raises(UsageError, match=message):
        best_at_speedup(frontier, 9)


def test_a_loop_of_few_steps_is_told_to_run_them_all_full():
    assert too_few_to_reuse(5) is None
    assert too_few_to_reuse(50) is None
    rest = (
        " next to nothing to reuse: features change too much between so few, so every step of the "
        "default plan is full, and what is gained here is the smaller, faster graph"
    )
    assert too_few_to_reuse(4) == f"4 steps have{rest}"
    assert too_few_to_reuse(1) == f"a single step has{rest}"
