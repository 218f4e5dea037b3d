from dataclasses import replace

import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.errors import ScheduleError
from cq_edge.forecast import Forecast
from cq_edge.influence import noise_response
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.plan_error import forecast_errors, noise_powers, plan_errors
from cq_edge.quantisation_noise import one_branch
from cq_edge.reuse_table import ReuseTable

T, SCALE = 9, 3.0
SCHEDULER = make_noise_scheduler("pndm", T - 1, NoiseScheduleConfig())
ANSWER, NEAR, AS_NOISE, AS_NOISE_UNGUIDED, LAST = 0.23, 0.66, 0.52, 1.16, 24
TINY = 2.0**-40  # so that nothing is clipped


def table(noise_scheduler=SCHEDULER, scale=SCALE):
    rng, total = np.random.default_rng(0), len(noise_scheduler.timesteps)
    gaps = (5, 4, 4)
    errors = [rng.uniform(0.5, 1, (total, g)) * np.linspace(0.2, 1, g) for g in gaps]
    for error in errors:
        anchor, gap = np.indices(error.shape)
        error[anchor + gap >= total] = np.nan
    alone = [error * (np.arange(error.shape[1]) > 0) for error in errors]
    weights = [rng.uniform(-0.5, 0.5, (total, g + 1, g)).astype(np.float32) for g in gaps]
    ones = np.ones((total, gaps[0], 2), np.float32)
    share = rng.uniform(0, 1, errors[0].shape).astype(np.float32)
    influences = (rng.uniform(-1, 1, total), rng.uniform(0, 1, total))
    return ReuseTable(
        noise_scheduler.name, noise_scheduler.steps, scale, 0.25, noise_scheduler.timesteps,
        *influences, errors[0], alone[0], 0.7 * alone[0], *alone[1:], *weights, share, *4 * [ones],
    )  # fmt: skip


def moved(given, scheduler, schedule, kind, source):
    """How far the final latents move with one source of noise at one step, branch by branch and
    value by value as the loop itself runs."""
    latents, history = 0.0, ()
    features = {"prompt": Forecast(), "negative": Forecast()}
    difference, predictions = Forecast(), Forecast()
    for step, mode in enumerate(schedule.modes):
        here = kind if step == source else None
        answer = scheduler.model_input(latents, step) * noise_response(scheduler, step)
        branch = TINY * np.sqrt(given.own[step] * one_branch(given.guidance_scale))
        reused = 1e-5 * (mode.runs > 1)
        if mode is Mode.SKIP:
            last = predictions.points[0][0]
            noise_pred = predictions.at(step, given.skip_weight)
            reused += AS_NOISE * given.skip[last, step - last]
        else:
            said = {}
            for name in ("prompt", "negative")[: 1 if mode.is_unguided else 2]:
                if mode.is_full:
                    feature = (1 - ANSWER) * answer
                    feature += branch * np.sqrt(1 - NEAR) * (here == ("deep", name))
                    features[name] = features[name].after(step, feature)
                else:
                    feature = features[name].at(step, given.feature_weight)
                said[name] = feature + ANSWER * answer
                said[name] += branch * np.sqrt(NEAR) * (here == ("near", name))
            if mode.is_shallow:
                anchor = features["prompt"].points[0][0]
                reused += AS_NOISE * given.shallow[anchor, step - anchor]
            if mode.is_unguided:
                known = difference.points[0][0]
                reused += AS_NOISE_UNGUIDED * given.unguided[known, step - known]
                apart = difference.at(step, given.unguided_weight)
            else:
                apart = said["prompt"] - said["negative"]
                difference = difference.after(step, apart, in_part=mode.is_shallow)
            noise_pred = said["prompt"] + (given.guidance_scale - 1) * apart
            if mode.is_full and step and schedule.modes[step - 1] is not Mode.SKIP:
                anchor = schedule.anchors[step - 1]
                share = given.forecast_share[anchor, step - 1 - anchor]
                noise_pred += share * (predictions.at(step, given.skip_weight) - noise_pred)
                reused += AS_NOISE * share**2 * given.skip[step - 1, 1]
        noise_pred += TINY * np.sqrt(reused) * (here == ("reused", ""))
        if mode is not Mode.SKIP:
            predictions = predictions.after(step, noise_pred, in_part=mode.is_shallow)
        latents, history = scheduler.advance(latents, noise_pred, step, history)
    return latents / TINY


def by_hand(given, scheduler, schedule):
    followed = range(max(0, len(schedule) - LAST), len(schedule))
    alike = 0.26 * 0.73 ** np.abs(np.subtract.outer(followed, followed))
    runs = np.array([{"D": 2, "Q": 4}.get(letter, 1) for letter in schedule.to_string()])
    alike += np.diag(0.74 / runs[followed.start :])
    power = 0.0
    for layers in ("deep", "near"):
        for name in ("prompt", "negative"):
            far = np.array([moved(given, scheduler, schedule, (layers, name), k) for k in followed])
            power += far @ alike @ far
    reused = [moved(given, scheduler, schedule, ("reused", ""), k) for k in followed]
    return power + np.square(reused).sum()


PLANS = [CacheSchedule.from_string(modes) for modes in (
    "FFFFFFFFF", "FSFSSFKFS", "FFfFsSKFF", "FKKFfKsFK", "FFSSSSFFf", "FDSFfDQKQ"
)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "steps", "scale", "schedule"),
    [
        ("pndm", 8, 3.0, {}),
        ("pndm", 27, 1.0, {}),
        ("euler", 28, 3.0, {}),
        ("ddim", 9, 3.0, {"clip_sample": True}),
        ("dpmsolver++", 28, 3.0, {"prediction_type": "v_prediction"}),
    ],
)
def test_noise_is_what_the_loop_makes_of_every_source(name, steps, scale, schedule):
    scheduler = make_noise_scheduler(name, steps, NoiseScheduleConfig(**schedule))
    given, total = table(scheduler, scale), len(scheduler.timesteps)
    plans = [CacheSchedule.from_string((3 * plan.to_string() + "FFF")[:total]) for plan in PLANS]
    expected = np.array([by_hand(given, scheduler, plan) for plan in plans])
    found = noise_powers(given, scheduler, plans)
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)


def test_of_every_step_computed_it_is_what_the_tables_influence_says():
    given = replace(table(), forecast_share=np.zeros((T, 5), np.float32))
    every = given.reuse_errors().parts(PLANS[0])
    assert noise_powers(given, SCHEDULER, PLANS)[0] == pytest.approx(every.noise)


def test_a_plan_errs_by_what_all_plans_do_its_noise_and_its_reuse():
    given = table()
    errors = given.reuse_errors()
    expected = 0.25 + noise_powers(given, SCHEDULER, PLANS)
    for number, plan in enumerate(PLANS):
        forecast = given.shares_in(plan) * forecast_errors(given, plan)
        expected[number] += errors.parts(plan).reuse + np.square(forecast).sum()
    np.testing.assert_allclose(plan_errors(given, SCHEDULER, PLANS), expected)


def test_a_forecast_errs_as_a_skip_does_and_by_what_the_step_before_did_not_compute():
    given = table()
    shallow, skip, unguided = map(np.sqrt, (given.shallow, given.skip, given.unguided))
    reused = np.zeros(T)
    reused[3], reused[4] = shallow[1, 1], shallow[1, 2] + unguided[2, 1]
    reused[5] = unguided[2, 2]
    found = forecast_errors(given, CacheSchedule.from_string("FFSsfKKFF"))
    expected = (np.r_[0, skip[:-1, 1]] + reused) * given.reuse_influence
    np.testing.assert_allclose(found, expected)
    weight = given.skip_weight[:, :2, :1]
    never = replace(given, skip=given.skip[:, :1], skip_weight=weight)
    assert (forecast_errors(never, PLANS[0]) == 0).all()


def test_other_shares_can_be_tried():
    given = table()
    other = replace(given, forecast_share=0.5 * given.forecast_share)
    shares = np.array([other.shares_in(plan) for plan in PLANS])
    found = noise_powers(given, SCHEDULER, PLANS, shares)
    np.testing.assert_allclose(found, noise_powers(other, SCHEDULER, PLANS))
    assert (found[0] != noise_powers(given, SCHEDULER, PLANS)[0]).any()


def test_without_noise_and_reuse_nothing_is_added():
    five, four = np.zeros((T, 5)), np.zeros((T, 4))
    nothing = replace(table(), noise_pred=five, shallow=five, skip=four, unguided=four)
    found = plan_errors(nothing, SCHEDULER, PLANS)
    several = np.array([plan.repeated > 0 for plan in PLANS])
    np.testing.assert_array_equal(found[~several], 0.25)
    assert (found[several] > 0.25).all()  # what moving latents apart does


def test_a_noise_scheduler_of_other_steps_is_refused():
    other = make_noise_scheduler("pndm", T, NoiseScheduleConfig())
    with pytest.raises(ScheduleError, match=r"^the reuse table was measured on pndm at 8"):
        plan_errors(table(), other, PLANS)


def test_a_step_that_was_not_measured_is_refused():
    with pytest.raises(ScheduleError, match=r"^step 5 of FSSSSSFFF is shallow"):
        plan_errors(table(), SCHEDULER, [CacheSchedule.from_string("FSSSSSFFF")])
