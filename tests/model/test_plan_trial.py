from dataclasses import replace

import numpy as np
import pytest
import torch

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.frontier import search_frontier
from cq_edge.model.plan_trial import final_latents, scaled_to_trial, typical_distance
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.plan_error import noise_powers
from cq_edge.reuse_table import ReuseTable

_PROMPTS = [((torch.zeros(1, 77, 8),), (torch.ones(1, 77, 8),))] * 2


def _loop(steps):
    scheduler = make_noise_scheduler("ddim", steps, NoiseScheduleConfig())
    return Loop(_denoiser, scheduler, (4, 4, 4), guidance_scale=1.0)


def _denoiser(latents, timestep, embeddings):
    del embeddings
    return 0.5 * latents + float(timestep) / 1000, latents


def test_the_final_latents_are_what_each_run_ends_in_and_every_step_is_told():
    loop, told = _loop(5), []
    finals = final_latents(loop, _PROMPTS, lambda: told.append(None))
    assert len(told) == 2 * 5
    for number, found in enumerate(finals):
        *_, last = loop.run(number, _PROMPTS[number])
        assert torch.equal(found, last.after)


def test_the_distance_of_final_latents_is_the_mean_of_their_decibels():
    few, many = (final_latents(_loop(steps), _PROMPTS) for steps in (4, 12))
    pairs = zip(few, many, strict=True)
    decibels = [np.log(np.square(x.numpy() - y.numpy()).mean()) for x, y in pairs]
    assert typical_distance(few, many) == pytest.approx(float(np.exp(np.mean(decibels))), rel=1e-5)
    assert typical_distance(many, many) == 0


def _shallow(latents, timestep, embeddings, feature, gain, bias, output_gain, output_bias):
    """Takes the feature, which is old latents, for the latents that there are now."""
    del latents, output_gain, output_bias
    corrected = gain.view(1, -1, 1, 1) * feature + bias.view(1, -1, 1, 1)
    return _denoiser(corrected, timestep, embeddings)[0]


def _table(steps, max_gap, skip):
    """Of random errors; noise predictions go on by half, features by a quarter."""
    errors = np.random.default_rng(0).uniform(0.1, 1, (steps, max_gap + 1))
    errors[:, 0] = 0
    ones, zeros = (x((steps, max_gap + 1, 4), np.float32) for x in (np.ones, np.zeros))
    never = np.zeros((steps, 1))
    half = np.full((steps, skip.shape[1] + 1, skip.shape[1]), 0.5, np.float32)
    quarter = np.full((steps, max_gap + 2, max_gap + 1), 0.25, np.float32)
    none = np.zeros((steps, 2, 1), np.float32)
    return ReuseTable(
        "ddim", steps, 1.0, 0.125, _loop(steps).noise_scheduler.timesteps,
        *2 * [np.ones(steps)], 2 * errors, errors, errors.copy(), skip, never, quarter, half, none,
        np.zeros(errors.shape, np.float32), *2 * [ones, zeros],
    )  # fmt: skip


def _gone_on(values, step, weight, reach):
    """What a step's value is taken to be; weights are of changes over fewer steps than `reach`."""
    (before, first), (newest, last) = [values[0], *values][-2:]
    goes_on = newest - before < reach and step - newest < reach - 1
    return last + weight * (last - first) if goes_on else last


def _by_hand(loop, number, modes, reach):
    """The final latents of a plan; `reach` is of predictions."""
    scheduler, computed, features = loop.noise_scheduler, [], []
    visits = list(loop.run(number, _PROMPTS[number]))
    latents, history = visits[0].seen, ()
    for step, mode in enumerate(modes):
        timestep = visits[step].timestep
        # what a shallow step computed is not gone on from
        kept = len(computed) - modes[:step].rstrip("K").endswith("S")
        if mode == "F":
            features.append((step, latents))
            noise_pred = _denoiser(latents, timestep, None)[0]
            computed[kept:] = [(step, noise_pred)]
        elif mode == "S":
            feature = _gone_on(features, step, 0.25, reach=5)
            computed[kept:] = [(step, _denoiser(feature, timestep, None)[0])]
        noise_pred = _gone_on(computed, step, 0.5, reach) if mode == "K" else computed[-1][1]
        latents, history = scheduler.advance(latents, noise_pred, step, history)
    return latents


@pytest.mark.parametrize("skips", [True, False])
def test_the_table_is_scaled_to_every_step_full_and_half_way_to_a_plan_that_computes_little(skips):
    steps = 20
    # skipping once costs nearly nothing, twice in a row much
    skip = np.tile([0.0, 1e-6, 9.0], (steps, 1)) if skips else np.zeros((steps, 1))
    table, loop = _table(steps, 3, skip), _loop(steps)
    errors = table.noise_pred.copy()
    errors[:, 0] = 1e-6
    table = replace(table, noise_pred=errors)
    full = final_latents(loop, _PROMPTS)
    exact = [latents + 1e-3 for latents in full]  # what a float denoiser would end in
    told = []
    scaled = scaled_to_trial(
        table, loop, _shallow, _PROMPTS, full, exact, 0.25, lambda: told.append(None)
    )
    assert len(told) == 2 * steps
    assert np.ptp(scaled.reuse_influence) == np.ptp(scaled.noise_influence) == 0
    errors = scaled.reuse_errors()
    shared = scaled.base_error - table.base_error
    full_error = errors.total(CacheSchedule.all_full(steps))
    parts = np.array([0.75, 2.5 * 0.25])  # new at every step, and what stays counts for more
    assert [full_error, shared] == pytest.approx(1e-6 * parts / parts.sum(), rel=1e-3)
    noisy = replace(table, noise_influence=scaled.noise_influence)
    costs = {Mode.FULL: 1, Mode.SHALLOW: 0.1, Mode.SKIP: 0}
    found = search_frontier(noisy.reuse_errors().once(), costs)
    plan = [schedule for schedule, _ in found if schedule.counts["full"] <= 8][-1]
    assert ("K" in plan.to_string()) == skips
    pairs = [(_by_hand(loop, n, plan.to_string(), skip.shape[1] + 1), exact[n]) for n in range(2)]
    distances = torch.stack([(found - expected).square().mean() for found, expected in pairs])
    measured = float(distances.log().mean().exp())
    (noise,) = noise_powers(scaled, loop.noise_scheduler, [plan])
    # half way from what was predicted to what is left of what was measured
    predicted = table.reuse_errors().parts(plan).reuse
    expected = np.sqrt(predicted * (measured - noise - shared))
    assert errors.parts(plan).reuse == pytest.approx(expected, rel=1e-4)


def test_a_table_without_errors_is_left_as_it_is():
    table, loop = _table(12, 3, np.zeros((12, 1))), _loop(12)
    nothing = np.zeros_like(table.noise_pred)
    nothing = replace(table, noise_pred=nothing, shallow=nothing)
    finals = final_latents(loop, _PROMPTS)
    scaled = scaled_to_trial(nothing, loop, _shallow, _PROMPTS, finals, finals, 0.0)
    for name in ("noise_influence", "reuse_influence"):
        np.testing.assert_array_equal(getattr(scaled, name), getattr(nothing, name))


def test_where_all_noise_stays_none_is_left_to_plans():
    table, loop = _table(12, 3, np.zeros((12, 1))), _loop(12)
    finals = final_latents(loop, _PROMPTS)
    exact = [latents + 1e-3 for latents in finals]
    scaled = scaled_to_trial(table, loop, _shallow, _PROMPTS, finals, exact, 1.0)
    np.testing.assert_array_equal(scaled.noise_influence, 0)
    assert scaled.base_error - table.base_error == pytest.approx(1e-6, rel=1e-3)
