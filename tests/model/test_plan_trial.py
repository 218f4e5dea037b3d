from dataclasses import replace

import numpy as np
import pytest
import torch

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.model.plan_trial import final_latents, mean_distance, scaled_to_trial
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.reuse_table import ReuseTable

_PROMPTS = [(torch.zeros(1, 77, 8), torch.ones(1, 77, 8))] * 2


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


def test_the_base_error_is_the_mean_squared_distance_of_final_latents():
    few, many = (final_latents(_loop(steps), _PROMPTS) for steps in (4, 12))
    pairs = zip(few, many, strict=True)
    expected = np.mean([np.square(x.numpy() - y.numpy()).mean() for x, y in pairs])
    assert mean_distance(few, many) == pytest.approx(float(expected), rel=1e-5)
    assert expected > 0
    assert mean_distance(many, many) == 0


def _shallow(latents, timestep, embeddings, feature, gain, bias, output_gain, output_bias):
    """Takes the feature, which is old latents, for the latents that there are now."""
    del latents, output_gain, output_bias
    corrected = gain.view(1, -1, 1, 1) * feature + bias.view(1, -1, 1, 1)
    return _denoiser(corrected, timestep, embeddings)[0]


def test_the_table_is_scaled_to_what_a_uniform_plan_really_errs_by():
    steps, max_gap = 12, 3
    rng = np.random.default_rng(0)
    errors = rng.uniform(0.1, 1, (steps, max_gap + 1))
    errors[:, 0] = 0
    ones, zeros = (x((steps, max_gap + 1, 4), np.float32) for x in (np.ones, np.zeros))
    never = np.zeros((steps, 1))
    table = ReuseTable(
        "ddim", steps, 1.0, 0.125, np.linspace(900, 1, steps, dtype=np.float32), np.ones(steps),
        errors, errors, never, never, *2 * [never.astype(np.float32)], *2 * [ones, zeros],
    )  # fmt: skip
    loop = _loop(steps)
    finals = final_latents(loop, _PROMPTS)
    scaled = scaled_to_trial(table, loop, _shallow, _PROMPTS, finals, finals)
    # by hand: every second step takes the latents of the step before it
    distances = []
    for number in range(len(_PROMPTS)):
        latents, history, feature = None, (), None
        for visit in loop.run(number, _PROMPTS[number]):
            latents = visit.seen if latents is None else latents
            timestep, scheduler = visit.timestep, loop.noise_scheduler
            feature = feature if visit.step % 2 else latents
            noise_pred = _denoiser(feature, timestep, None)[0]
            latents, history = scheduler.advance(latents, noise_pred, visit.step, history)
        distances.append(float((latents - finals[number]).square().mean()))
    plan = CacheSchedule.uniform(steps, 2)
    found = scaled.final_error(scaled.reuse_errors().total(plan)) - 0.125
    assert found == pytest.approx(np.mean(distances), rel=1e-4)
    assert np.ptp(scaled.influence) == 0
    nothing = replace(table, noise_pred=np.zeros_like(errors))
    assert scaled_to_trial(nothing, loop, _shallow, _PROMPTS, finals, finals) is nothing
