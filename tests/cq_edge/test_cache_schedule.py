"""Cache schedules; the dynamic program against exhaustive search."""

import itertools
import math
import re

import numpy as np
import pytest

from cq_edge.cache_schedule import (
    CacheSchedule,
    Mode,
    paper_segment_bounds,
    plan_full_steps,
)
from cq_edge.errors import ScheduleError
from cq_edge.frontier import ReuseErrors


def random_errors(rng, step_count, max_gap, top=None):
    """Returns a table; whole numbers below `top` make ties and exact sums."""
    shape = (step_count, max_gap + 1)
    errors = rng.integers(0, top, shape).astype(float) if top else rng.random(shape)
    errors[:, 0] = 0
    anchor, gap = np.indices(shape)
    errors[anchor + gap >= step_count] = math.nan
    return errors


def exhaustive(errors, full_steps, shortest, longest):
    """Returns the least total and the first anchors, in lexicographic order, that reach it."""
    step_count = len(errors)
    best = (math.inf, None)
    for rest in itertools.combinations(range(1, step_count), full_steps - 1):
        anchors = (0, *rest)
        lengths = np.diff([*anchors, step_count])
        if lengths.min() < shortest or lengths.max() > longest:
            continue
        total = 0.0
        for anchor, length in zip(anchors, lengths, strict=True):
            total += errors[anchor, :length].sum()
        best = min(best, (total, anchors))
    return best


def anchors_of(schedule):
    return tuple(segment.start for segment in schedule.segments())


def total_error(errors, schedule):
    """The sum of the errors of a schedule's shallow steps."""
    never = np.zeros((len(errors), 1))
    return ReuseErrors(errors, never, never, squared=False).total(schedule)


@pytest.mark.parametrize("seed", range(12))
def test_plan_equals_exhaustive_search_with_ties(seed):
    rng = np.random.default_rng(seed)
    feasible = infeasible = 0
    for _ in range(25):
        step_count = int(rng.integers(1, 10))
        max_gap = int(rng.integers(0, step_count + 1))
        errors = random_errors(rng, step_count, max_gap, top=4)
        full_steps = int(rng.integers(1, step_count + 1))
        shortest = int(rng.integers(1, 3))
        longest = int(rng.integers(shortest, max(shortest, max_gap + 1) + 1))
        total, anchors = exhaustive(errors, full_steps, shortest, longest)
        if anchors is None or longest > max_gap + 1:
            infeasible += 1
            with pytest.raises(ScheduleError):
                plan_full_steps(errors, full_steps, min_segment=shortest, max_segment=longest)
            continue
        feasible += 1
        plan = plan_full_steps(errors, full_steps, min_segment=shortest, max_segment=longest)
        assert anchors_of(plan) == anchors
        assert total_error(errors, plan) == total
    assert feasible > 3
    assert infeasible > 3


@pytest.mark.parametrize("seed", range(5))
def test_plan_equals_exhaustive_search_on_real_numbers(seed):
    rng = np.random.default_rng(seed)
    errors = random_errors(rng, 11, 6)
    for full_steps in range(2, 12):
        plan = plan_full_steps(errors, full_steps)
        total, anchors = exhaustive(errors, full_steps, 1, 7)
        assert anchors_of(plan) == anchors
        assert total_error(errors, plan) == pytest.approx(total, abs=1e-12)


def test_of_equally_good_plans_the_earliest_anchors_win():
    errors = np.zeros((6, 6))
    assert plan_full_steps(errors, 3).to_string() == "FFFSSS"
    assert plan_full_steps(errors, 3, min_segment=2).to_string() == "FSFSFS"
    assert plan_full_steps(errors, 2, max_segment=4).to_string() == "FSFSSS"


def test_more_full_steps_never_cost_more():
    rng = np.random.default_rng(3)
    anchor, gap = np.indices((20, 20))
    errors = gap * (1 + rng.random(20))[anchor]  # grows with the gap, as real ones do
    totals = [total_error(errors, plan_full_steps(errors, k)) for k in range(1, 21)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 0


def test_as_many_full_steps_as_steps_is_the_uncached_loop():
    errors = random_errors(np.random.default_rng(0), 8, 3)
    assert plan_full_steps(errors, 8) == CacheSchedule.all_full(8)


def bad_entry(value, anchor, gap):
    errors = np.zeros((8, 3))
    errors[anchor, gap] = value
    return errors


@pytest.mark.parametrize(
    ("errors", "arguments", "message"),
    [
        (
            np.zeros((50, 6)),
            {"full_steps": 7},
            "50 steps do not split into 7 segments of at most 6: ask for 9 to 50 full steps, or "
            "raise max_segment to 8 (calibrated with max_gap 7)",
        ),
        (
            np.zeros((50, 10)),
            {"full_steps": 7, "max_segment": 6},
            "50 steps do not split into 7 segments of at most 6: ask for 9 to 50 full steps, or "
            "raise max_segment to 8",
        ),
        (
            np.zeros((10, 10)),
            {"full_steps": 4, "min_segment": 3},
            "10 steps do not split into 4 segments of at least 3: ask for 1 to 3 full steps, or "
            "lower min_segment to 2",
        ),
        (
            np.zeros((10, 10)),
            {"full_steps": 0},
            "10 steps do not split into 0 segments of at most 10: ask for 1 to 10 full steps",
        ),
        (
            np.zeros((10, 10)),
            {"full_steps": 11},
            "10 steps do not split into 11 segments of at least 1: ask for 1 to 10 full steps",
        ),
        (
            np.zeros((5, 5)),
            {"full_steps": 6, "min_segment": 3, "max_segment": 4},
            "5 steps do not split into 6 segments of at least 3: widen the bounds 3 to 4",
        ),
        (
            np.zeros((10, 4)),
            {"full_steps": 3, "max_segment": 6},
            "segments of up to 6 steps need reuse errors up to gap 5, but they are known up to "
            "3: lower max_segment to 4, or calibrate with a larger max_gap",
        ),
        (
            np.zeros((10, 4)),
            {"full_steps": 3, "min_segment": 3, "max_segment": 2},
            "segments of 3 to 2 steps do not exist: min_segment must be 1 or more and "
            "max_segment no less than min_segment",
        ),
        (
            np.zeros(5),
            {"full_steps": 1},
            "the error table has shape (5,): it must be (T, G+1)",
        ),
        (
            bad_entry(math.nan, 2, 1),
            {"full_steps": 3},
            "the reuse error of step 3 with anchor 2 is nan: it must be a number of 0 or more",
        ),
        (
            bad_entry(-1.0, 5, 2),
            {"full_steps": 3},
            "the reuse error of step 7 with anchor 5 is -1.0: it must be a number of 0 or more",
        ),
        (
            bad_entry(0.5, 4, 0),
            {"full_steps": 3},
            "the reuse error of step 4 with anchor 4 is 0.5: it must be 0",
        ),
    ],
)
def test_says_why_a_plan_is_impossible_and_what_would_do(errors, arguments, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        plan_full_steps(errors, **arguments)


def test_the_cure_that_a_refusal_names_works():
    cure = re.compile(r"ask for (?:exactly )?(\d+)(?: to (\d+))? full steps")
    for step_count, shortest, longest in itertools.product(range(1, 12), range(1, 5), range(1, 6)):
        if longest < shortest or longest > step_count:
            continue
        errors = np.zeros((step_count, step_count))
        bounds = {"min_segment": shortest, "max_segment": longest}
        for full_steps in range(step_count + 2):
            try:
                plan_full_steps(errors, full_steps, **bounds)
            except ScheduleError as error:
                if found := cure.search(str(error)):
                    for count in filter(None, found.groups()):
                        plan_full_steps(errors, int(count), **bounds)
                if found := re.search(r"(raise max|lower min)_segment to (\d+)", str(error)):
                    key = "max_segment" if found[1] == "raise max" else "min_segment"
                    plan_full_steps(errors, full_steps, **{**bounds, key: int(found[2])})


def test_the_papers_bounds_always_allow_a_split():
    for step_count in range(1, 60):
        for full_steps in range(1, step_count + 1):
            low, high = paper_segment_bounds(step_count, full_steps)
            assert low * full_steps <= step_count <= high * full_steps
    assert paper_segment_bounds(50, 10) == (3, 10)
    assert paper_segment_bounds(50, 17) == (2, 6)
    assert paper_segment_bounds(5, 2) == (2, 6)


def test_the_papers_bounds_refuse_more_full_steps_than_steps():
    message = "5 steps cannot have 6 full ones: ask for 1 to 5"
    with pytest.raises(ScheduleError, match=f"^{message}$"):
        paper_segment_bounds(5, 6)


def test_unguided_steps_are_anchors_of_unguided_steps():
    schedule = CacheSchedule.from_string("FsfsKsFS")
    assert schedule.anchors == (0, 0, 2, 2, 2, 2, 6, 6)
    assert schedule.counts == {"full": 3, "shallow": 4, "skip": 1}
    assert schedule.unguided == 4
    assert schedule.to_string() == "FsfsKsFS"
    assert str(Mode.SHALLOW_UNGUIDED) == "shallow unguided"


def test_steps_that_run_several_times_are_full_ones():
    schedule = CacheSchedule.from_string("FSDSQsFK")
    assert schedule.anchors == (0, 0, 2, 2, 4, 4, 6, 6)
    assert schedule.counts == {"full": 4, "shallow": 3, "skip": 1}
    assert [mode.runs for mode in schedule.modes] == [1, 1, 2, 1, 4, 1, 1, 1]
    assert schedule.repeated == 2
    assert schedule.to_string() == "FSDSQsFK"
    assert str(Mode.FULL_FOUR_TIMES) == "full four times"


def test_a_schedule_knows_its_anchors_counts_gaps_and_segments():
    schedule = CacheSchedule.from_string("FSSKFSF")
    assert schedule.anchors == (0, 0, 0, 0, 4, 4, 6)
    assert schedule.counts == {"full": 3, "shallow": 3, "skip": 1}
    assert schedule.max_gap == 2  # the skip step reuses no feature
    assert schedule.segments() == (range(4), range(4, 6), range(6, 7))
    assert schedule.to_string() == "FSSKFSF"
    assert len(schedule) == 7


def test_uniform_schedules():
    assert CacheSchedule.uniform(7, 3).to_string() == "FSSFSSF"
    assert CacheSchedule.uniform(4, 1) == CacheSchedule.all_full(4)
    assert CacheSchedule.uniform(2, 9).to_string() == "FS"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CacheSchedule(()),
            "a cache schedule needs at least one step: this one has none",
        ),
        (
            lambda: CacheSchedule.from_string("SF"),
            "step 0 is shallow, but nothing was computed before: make it full",
        ),
        (
            lambda: CacheSchedule.from_string("DF"),
            "step 0 is full twice, but only later steps may be: make it full",
        ),
        (
            lambda: CacheSchedule.from_string("FSX"),
            'step 2 of "FSX" is "X": use F for full, S for shallow, K for skip, f and s for '
            "unguided ones, D and Q for full twice and four times",
        ),
        (
            lambda: CacheSchedule(("full",)),
            "step 0 has mode 'full': it must be a Mode",
        ),
        (
            lambda: CacheSchedule.from_string("FfKS"),
            "step 3 is shallow and guided, but its anchor, step 1, ran without the negative "
            "prompt: make step 3 unguided or step 1 guided",
        ),
        (
            lambda: CacheSchedule.uniform(5, 0),
            "interval is 0: it must be 1 (all full) or more",
        ),
    ],
)
def test_refuses_what_cannot_run(make, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        make()


def test_a_mode_is_its_name():
    assert Mode("shallow") is Mode.SHALLOW
    assert str(Mode.SKIP) == "skip"
