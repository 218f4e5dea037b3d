from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import ScheduleError
from cq_edge.frontier import ReuseErrors, search_frontier
from cq_edge.quantisation_noise import noise_by_mode

MODE_MS = dict(zip(Mode, (20.0, 6.0, 0.1, 10.1, 3.1, 39.9, 79.7), strict=True))


def random_errors(seed, steps=7, gaps=(3, 2, 2)):
    """Errors with and without order: rising with the gap, and not; of odd seeds with noise, whose
    influence changes its sign."""
    rng = np.random.default_rng(seed)
    rise = (lambda gap: gap) if seed % 2 else (lambda gap: gap > 0)
    noise = noise_by_mode(rng.uniform(0, 1, steps), rng.uniform(-1, 1, steps), 2.0)
    return ReuseErrors(
        *(rng.uniform(0.1, 1, (steps, g + 1)) * rise(np.arange(g + 1)) for g in gaps),
        noise if seed % 2 else {},
        {mode: rng.uniform(0, 1, steps) for mode in Mode} if seed % 2 else {},
    )


def test_the_part_of_reuse_that_is_like_noise_counts_by_its_square():
    alike = replace(random_errors(0), across={mode: np.arange(7.0) for mode in Mode})
    for modes in ("FFFFFFF", "FSKFFFF", "FFfFSFK"):
        schedule = CacheSchedule.from_string(modes)
        never = dict.fromkeys(Mode, np.zeros(7))
        steps = [
            replace(alike, across=never | {mode: (np.arange(7) == step).astype(float)})
            .parts(schedule)
            .noise
            for step, mode in enumerate(schedule.modes)
        ]
        assert steps[0] == 0  # full
        assert [bool(s) for s in steps] == [mode != "F" for mode in modes]
        assert alike.parts(schedule).noise == pytest.approx(np.arange(7) @ steps)
        assert alike.parts(schedule).reuse == random_errors(0).parts(schedule).reuse


def test_skips_go_as_far_as_they_were_measured_where_nothing_goes_unguided():
    skip = np.full((9, 5), 0.5) * (np.arange(5) > 0)
    errors = ReuseErrors(np.ones((9, 2)), skip, np.zeros((9, 1)))
    assert errors.parts(CacheSchedule.from_string("FFKKKKFFF")).reuse == (4 * 0.5) ** 2
    fastest, _ = search_frontier(errors, MODE_MS)[0]
    assert fastest.to_string() == "FKKKKFKKK"
    with pytest.raises(ScheduleError, match=r"^step 6 of FFKKKKKFF is skip"):
        errors.parts(CacheSchedule.from_string("FFKKKKKFF"))


def every_schedule(errors):
    """Every schedule that the errors cover, with what it errs by."""
    letters = "FSKfsDQ" if errors.noise else "FSKfs"
    for rest in product(letters, repeat=len(errors.shallow) - 1):
        try:
            schedule = CacheSchedule.from_string("F" + "".join(rest))
            yield schedule, errors.parts(schedule)
        except ScheduleError:
            continue


def taken_ms(schedule):
    return sum(MODE_MS[mode] for mode in schedule.modes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("squared", [True, False])
def test_no_schedule_beats_the_frontier(seed, squared):
    errors = replace(random_errors(seed), squared=squared)
    found = search_frontier(errors, MODE_MS)
    frontier = [(taken_ms(schedule), error) for schedule, error in found]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(frontier))
    count = 0
    for schedule, parts in every_schedule(errors):
        ms, count = taken_ms(schedule), count + 1
        error = parts.reuse + parts.noise
        assert min(e for t, e in frontier if t <= ms + 1e-6) <= error + 1e-12
    assert count > 4000


@pytest.mark.parametrize("seed", range(4))
def test_a_schedule_of_the_frontier_has_the_error_it_comes_with(seed):
    errors = random_errors(seed)
    for schedule, error in search_frontier(errors, MODE_MS):
        parts = errors.parts(schedule)
        assert parts.reuse + parts.noise == pytest.approx(error)


def test_errors_add_up_from_one_full_step_to_the_next_and_their_squares_over_full_steps():
    errors = replace(random_errors(1), noise={}, across={})
    shallow, skip, unguided = errors.shallow, errors.skip, errors.unguided
    runs = {
        "FSSFKKS": [[shallow[0, 1], shallow[0, 2]], [skip[3, 1], skip[3, 2], shallow[3, 3]]],
        "FfsFFFF": [[unguided[0, 1], shallow[1, 1], unguided[0, 2]]],
        "FFsKSFF": [[
            shallow[1, 1] + unguided[1, 1],
            # what is forecast from an unguided shallow step is as wrong as that would be now
            skip[2, 1] + shallow[1, 2] + unguided[1, 2],
            shallow[1, 3],
        ]],
        "FKfFFFF": [[skip[0, 1]], [unguided[0, 2]]],
        # and so is what the negative prompt changes, forecast from a shallow step
        "FSsFSfF": [
            [shallow[0, 1], shallow[0, 2] + unguided[1, 1] + shallow[0, 1]],
            [shallow[3, 1]],
            [unguided[4, 1] + shallow[3, 1]],
        ],
        "FFFFFFF": [],
    }  # fmt: skip
    for modes, given in runs.items():
        schedule = CacheSchedule.from_string(modes)
        reuse = sum(sum(run) ** 2 for run in given)
        assert errors.parts(schedule) == (pytest.approx(reuse), 0)
        assert errors.total(schedule) == pytest.approx(reuse)
        added = replace(errors, squared=False).total(schedule)
        assert added == pytest.approx(sum(sum(run) for run in given))


def test_steps_before_two_computed_ones_are_taken_to_have_been_shallow():
    errors = replace(random_errors(1), noise={}, across={})
    shallow, skip = errors.shallow[0], errors.skip[0]
    one = errors.total(CacheSchedule.from_string("FKSFFFF"))
    two = errors.total(CacheSchedule.from_string("FKSSFFF"))
    assert one == pytest.approx((skip[1] + shallow[2]) ** 2)
    assert two - one == pytest.approx(shallow[3] * (shallow[3] + 2 * (shallow[1] + shallow[2])))


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ("FSSSSFF", "step 4 of FSSSSFF is shallow, but what it would build on is further back than "
         "was measured: make it full"),
        ("FKKKFFF", "step 3 of FKKKFFF is skip, but what it would build on is further back than "
         "was measured: make it full or shallow"),
        ("FfffFFF", "step 3 of FfffFFF is full unguided, but what it would build on is further "
         "back than was measured: make it full"),
        ("FSSSKFF", "step 4 of FSSSKFF is skip, but what it would build on is further back than "
         "was measured: make it full"),
        ("FF", "the schedule has 2 steps and the errors are of 7: they must be equal"),
    ],
)  # fmt: skip
def test_refuses_what_was_not_measured(modes, message):
    errors = random_errors(0)
    with pytest.raises(ScheduleError) as caught:
        errors.total(CacheSchedule.from_string(modes))
    assert str(caught.value).startswith(message)


def test_of_a_long_loop_the_last_eight_steps_may_be_full_several_times():
    noise = noise_by_mode(np.ones(12), np.full(12, 0.5), 1.0)
    errors = ReuseErrors(*3 * [np.ones((12, 1))], noise)
    found = [schedule for schedule, _ in search_frontier(errors, MODE_MS)]
    assert found[0] == CacheSchedule.all_full(12)
    assert found[-1].to_string() == 4 * "F" + 8 * "Q"
    assert any("D" in schedule.to_string() for schedule in found)


def test_plans_of_steps_that_run_once():
    errors = random_errors(1)
    found = [schedule for schedule, _ in search_frontier(errors.once(), MODE_MS)]
    several = {Mode.FULL_TWICE, Mode.FULL_FOUR_TIMES}
    assert {mode for schedule in found for mode in schedule.modes} == {*Mode} - several
    for schedule in found:
        assert errors.once().parts(schedule) == errors.parts(schedule)
    with pytest.raises(ScheduleError, match=r"^step 1 of FDFFFFF is full twice"):
        errors.once().parts(CacheSchedule.from_string("FDFFFFF"))
    with pytest.raises(ScheduleError, match=r"^step 2 of FFQFFFF is full four times"):
        random_errors(0).parts(CacheSchedule.from_string("FFQFFFF"))  # no noise to average


def test_an_array_of_one_column_rules_its_mode_out():
    errors = random_errors(0)
    never = np.zeros((7, 1))
    only = ReuseErrors(errors.shallow, never, never)
    for schedule, _ in search_frontier(only, MODE_MS):
        assert set(schedule.modes) <= {Mode.FULL, Mode.SHALLOW}


def test_the_whole_frontier_of_fifty_steps_takes_well_under_a_second():
    from time import process_time

    taken = []
    for _ in range(3):  # other processes slow some runs
        errors = random_errors(1, 51, (10, 4, 3))
        start = process_time()
        assert len(search_frontier(errors, MODE_MS)) > 100
        taken.append(process_time() - start)
    assert min(taken) < 1
