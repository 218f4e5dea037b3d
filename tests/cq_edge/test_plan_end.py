from itertools import product

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import ScheduleError
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.plan_end import better_end
from cq_edge.plan_error import plan_errors
from tests.cq_edge.test_plan_error import SCHEDULER, T, table

ALL = CacheSchedule.all_full(T)


def error(schedule):
    return plan_errors(table(), SCHEDULER, [schedule])[0]


def ends_one_change_away(schedule):
    """One step full, so often, or shallow instead, or two exchanged."""
    for step in range(1, T):
        for mode in (Mode.FULL, Mode.FULL_TWICE, Mode.FULL_FOUR_TIMES, Mode.SHALLOW):
            yield *schedule.modes[:step], mode, *schedule.modes[step + 1 :]
    for one, other in product(range(1, T), repeat=2):
        modes = list(schedule.modes)
        modes[one], modes[other] = modes[other], modes[one]
        yield tuple(modes)


@pytest.mark.parametrize("modes", ["FSSSSFSSS", "FSFSSFKFS", "FFfFsSKFF", "FKKFfKsFK"])
def test_no_change_of_a_step_and_no_exchange_of_two_is_better_and_fast_enough(modes):
    start = CacheSchedule.from_string(modes)
    full = start.counts["full"]
    found = better_end(table(), SCHEDULER, start, lambda s: s.counts["full"] <= full)
    assert found.counts["full"] <= full
    assert error(found) <= error(start)
    for changed in ends_one_change_away(found):
        try:
            schedule = CacheSchedule(changed)
            changed_error = error(schedule)
        except ScheduleError:
            continue
        if schedule.counts["full"] <= full:
            assert changed_error > (1 - 1e-3) * error(found)


def test_a_better_end_is_found():
    starts = [CacheSchedule.from_string(modes) for modes in ("FSSSSFSSS", "FSFSSFKFS")]
    for start in starts:
        found = better_end(table(), SCHEDULER, start, lambda s: s.counts["full"] <= 4)
        assert error(found) < 0.99 * error(start)


def test_a_plan_stays_where_nothing_else_is_fast_enough():
    assert better_end(table(), SCHEDULER, ALL, lambda s: s == ALL) == ALL


def test_the_last_twelve_steps_change_and_no_others():
    long = make_noise_scheduler("pndm", 19, NoiseScheduleConfig())
    start, asked = CacheSchedule.from_string("FSSSS" * 4), []

    def fits(schedule):
        asked.append(schedule.modes)
        return False

    assert better_end(table(long), long, start, fits) == start
    changed = np.array(asked) != np.array(start.modes)
    np.testing.assert_array_equal(changed.any(axis=0), [False] * 8 + [True] * 12)
    assert (changed.sum(axis=1) <= 2).all()


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ("FSSSSSFFF", "^step 5 of FSSSSSFFF is shallow"),
        ("FSFSFSFS", "^the schedule has 8 steps and the errors are of 9"),
        ("FSFSFSFSFSF", "^the schedule has 11 steps and the errors are of 9"),
    ],
)
def test_a_schedule_that_the_table_does_not_know_is_refused(modes, message):
    with pytest.raises(ScheduleError, match=message):
        better_end(table(), SCHEDULER, CacheSchedule.from_string(modes), lambda _: True)
