from dataclasses import replace

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import ScheduleError
from cq_edge.forecast_share import forecast_share, plan_shares
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.plan_error import forecast_errors, noise_powers, plan_errors
from cq_edge.reuse_table import ReuseTable

STEPS, GAPS = 10, 3


def scheduler(name="pndm", steps=STEPS):
    return make_noise_scheduler(name, steps, NoiseScheduleConfig())


def table(noise_scheduler, own=1.0, reused=1e-3, influence=1.0):
    """Of equal errors: of full steps, and of what one step more of reuse adds."""
    total = len(noise_scheduler.timesteps)
    errors = reused * np.tile(np.arange(GAPS, dtype=np.float64), (total, 1))
    noise_pred = own + errors
    for array in (errors, noise_pred):
        array[np.add.outer(range(total), range(GAPS)) >= total] = np.nan
    ones = np.ones((total, GAPS, 2), np.float32)
    weights = np.full((total, GAPS + 1, GAPS), -0.5, np.float32)
    return ReuseTable(
        noise_scheduler.name, noise_scheduler.steps, 3.0, 0.0, noise_scheduler.timesteps,
        *2 * [np.full(total, influence)], noise_pred, *4 * [errors], *3 * [weights],
        np.zeros((total, GAPS), np.float32), *4 * [ones],
    )  # fmt: skip


def with_shares(given, noise_scheduler):
    return replace(given, forecast_share=forecast_share(given, noise_scheduler))


def error(given, noise_scheduler, plan):
    """What a plan is predicted to err by, but that forecasts in full steps count four times."""
    (predicted,) = plan_errors(given, noise_scheduler, [plan])
    forecast = given.shares_in(plan) * forecast_errors(given, plan)
    return predicted + 3 * forecast @ forecast


@pytest.mark.parametrize("name", ["pndm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("modes", ["F", "FS", "FFS", "FSS", "FFSS"])
def test_no_other_share_of_a_step_has_its_loop_err_less(name, modes):
    """Loops in which every full step, once it begins, comes after as many shallow ones."""
    given = with_shares(table(scheduler(name), reused=0.03), scheduler(name))
    total, shallow = len(given.timesteps), modes.count("S")
    text = (modes + total * ("F" + shallow * "S"))[:total] if modes != "F" else total * "F"
    loop = CacheSchedule.from_string(text)
    least, changed = error(given, scheduler(name), loop), 0
    for step in range(1, total):
        anchor = loop.anchors[step - 1]
        if not loop.modes[step].is_full or step - 1 - anchor != shallow:
            continue
        for share in np.linspace(0, 1, 21):
            shares = given.forecast_share.copy()
            shares[anchor, shallow] = share
            found = error(replace(given, forecast_share=shares), scheduler(name), loop)
            assert found > 0.998 * least
            changed += found > 1.01 * least
    assert changed


def test_shares_are_of_every_gap_and_of_no_step_beyond_the_loop():
    found = forecast_share(table(scheduler()), scheduler())
    assert found.dtype == np.float32
    assert found.shape == (STEPS + 1, GAPS)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found > 0).any(axis=0).all()
    anchor, gap = np.indices(found.shape)
    assert (found[anchor + gap + 1 > STEPS] == 0).all()


def test_what_a_table_held_before_is_not_looked_at():
    given = table(scheduler())
    other = replace(given, forecast_share=np.full_like(given.forecast_share, 0.5))
    expected = forecast_share(given, scheduler())
    np.testing.assert_array_equal(forecast_share(other, scheduler()), expected)


def test_without_noise_or_where_a_forecast_errs_far_more_there_is_none():
    """After a shallow step a share may still cancel what that reused."""
    np.testing.assert_array_equal(forecast_share(table(scheduler(), 0, 0), scheduler()), 0)
    assert forecast_share(table(scheduler(), 1.0, 1e3), scheduler())[:, 0].max() < 0.01


def test_a_forecast_without_errors_takes_noise_away():
    given, full = table(scheduler(), 1.0, 0.0), CacheSchedule.all_full(STEPS + 1)
    found = with_shares(given, scheduler())
    before, after = (plan_errors(t, scheduler(), [full])[0] for t in (given, found))
    assert after < 0.6 * before


def test_only_steps_whose_noise_is_followed_have_shares():
    long = scheduler("pndm", 30)
    found = forecast_share(table(long), long)
    step = np.add.outer(np.arange(31), np.arange(GAPS)) + 1
    assert (found[step < 31 - 24] == 0).all()
    assert (found[(step >= 31 - 24) & (step < 31)] > 0).any()


def test_where_no_forecast_was_measured_there_is_none():
    given = table(scheduler())
    never = dict.fromkeys(("skip", "unguided"), given.skip[:, :1])
    weight = np.zeros((STEPS + 1, 2, 1), np.float32)
    weights = {f"{name}_weight": weight for name in never}
    np.testing.assert_array_equal(
        forecast_share(replace(given, **never, **weights), scheduler()), 0
    )


def test_a_loop_of_one_step_has_none():
    one = scheduler("ddim", 1)
    np.testing.assert_array_equal(forecast_share(table(one), one), np.zeros((1, GAPS)))


def test_a_noise_scheduler_of_other_steps_is_refused():
    with pytest.raises(ScheduleError, match=r"^the reuse table was measured on pndm at 10"):
        forecast_share(table(scheduler()), scheduler("pndm", 9))


def error_with(given, noise_scheduler, plan, shares):
    """What a plan is predicted to err by that depends on its shares, of which forecasts count
    twice."""
    (noise,) = noise_powers(given, noise_scheduler, [plan], [shares])
    return noise + 2 * np.square(shares * forecast_errors(given, plan)).sum()


@pytest.mark.parametrize("name", ["pndm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("modes", ["FFSFSSFFFFF", "FSKFFfsFSFD", "FKFKFSFSFSS"])
def test_no_other_share_of_a_step_has_its_plan_err_less(name, modes):
    given, noise_scheduler = table(scheduler(name), reused=0.03), scheduler(name)
    total = len(given.timesteps)
    plan = CacheSchedule.from_string(modes[:total])
    found, changed = plan_shares(given, noise_scheduler, plan), 0
    least = error_with(given, noise_scheduler, plan, found)
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()
    for step in range(total):
        if step == 0 or Mode.SKIP in plan.modes[step - 1 : step + 1]:
            assert found[step] == 0
            continue
        for share in np.linspace(0, 1, 21):
            shares = found.copy()
            shares[step] = share
            other = error_with(given, noise_scheduler, plan, shares)
            assert other > 0.98 * least
            changed += other > 1.01 * least
    assert changed


def test_shallow_steps_have_shares_in_a_plan():
    given, plan = table(scheduler()), CacheSchedule.from_string("FSSFSSFSSFF")
    found = plan_shares(given, scheduler(), plan)
    assert (found[[7, 8]] > 0.05).all()
    assert (given.shares_in(plan)[[7, 8]] == 0).all()
    np.testing.assert_array_equal(256 * found, np.round(256 * found))  # the same on every machine


def test_the_plans_shares_are_better_for_it_than_the_tables():
    given = with_shares(table(scheduler(), reused=0.03), scheduler())
    for modes in ("FFSFSSFFFFF", "FSKFFfsFSFF", "FSFSFSFSFSS"):
        plan = CacheSchedule.from_string(modes)
        shares = plan_shares(given, scheduler(), plan)
        own, tables = (
            error_with(given, scheduler(), plan, s) for s in (shares, given.shares_in(plan))
        )
        assert own < 0.999 * tables


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ("FSSSFFFFFFF", "^step 3 of FSSSFFFFFFF is shallow"),
        ("FSF", "^the schedule has 3 steps and the errors are of 11"),
    ],
)
def test_shares_of_a_plan_that_was_not_measured_are_refused(modes, message):
    with pytest.raises(ScheduleError, match=message):
        plan_shares(table(scheduler()), scheduler(), CacheSchedule.from_string(modes))
