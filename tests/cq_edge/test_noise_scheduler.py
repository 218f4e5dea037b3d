"""Our noise schedulers against diffusers' own, over whole trajectories."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from cq_edge.errors import ScheduleError
from cq_edge.noise_scheduler import NAMES, NoiseScheduleConfig, make_noise_scheduler

SD15 = NoiseScheduleConfig()
SHAPE = (1, 4, 8, 8)
_SEED = 11  # of the noise that LCM adds


def theirs(name, config):
    shared = config.to_dict()
    alpha_one, clips = shared.pop("set_alpha_to_one"), shared.pop("clip_sample")
    if name == "ddim":
        return DDIMScheduler(**shared, set_alpha_to_one=alpha_one, clip_sample=clips)
    if name == "pndm":
        return PNDMScheduler(**shared, set_alpha_to_one=alpha_one, skip_prk_steps=True)
    if name == "euler":
        return EulerDiscreteScheduler(**shared)
    if name == "lcm":
        return LCMScheduler(**shared, set_alpha_to_one=alpha_one)
    return DPMSolverMultistepScheduler(**shared)


def noise_predictions(count):
    rng = np.random.default_rng(7)
    return 0.3 * rng.standard_normal((count, *SHAPE)).astype(np.float32)


def their_trajectory(name, steps, config):
    """Returns what diffusers feeds the network at each step, then its final latents."""
    scheduler = theirs(name, config)
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noise_predictions(1)[0]) * float(scheduler.init_noise_sigma)
    given = {"generator": torch.Generator().manual_seed(_SEED)} if name == "lcm" else {}
    seen = []
    for t, noise in zip(
        scheduler.timesteps, noise_predictions(len(scheduler.timesteps)), strict=True
    ):
        seen.append(scheduler.scale_model_input(latents, t).numpy())
        latents = scheduler.step(torch.from_numpy(noise), t, latents, **given).prev_sample
    return scheduler, np.stack([*seen, latents.numpy()])


def our_trajectory(name, steps, config, convert=lambda array: array):
    scheduler = make_noise_scheduler(name, steps, config)
    latents = convert(noise_predictions(1)[0]) * scheduler.init_noise_sigma
    history, seen = (), []
    generator = torch.Generator().manual_seed(_SEED)
    for step, noise in enumerate(noise_predictions(len(scheduler.timesteps))):
        seen.append(np.asarray(scheduler.model_input(latents, step)))
        latents, history = scheduler.advance(latents, convert(noise), step, history)
        if scheduler.fresh_noise[step]:
            fresh = torch.randn(SHAPE, generator=generator).numpy()
            latents = latents + scheduler.fresh_noise[step] * convert(fresh)
    return scheduler, np.stack([*seen, np.asarray(latents)]), latents


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 14, 15, 20, 50])
def test_equals_diffusers_at_every_step(name, prediction_type, spacing, steps):
    config = replace(SD15, prediction_type=prediction_type, timestep_spacing=spacing)
    reference, expected = their_trajectory(name, steps, config)
    scheduler, found, _ = our_trajectory(name, steps, config)
    np.testing.assert_array_equal(scheduler.timesteps, reference.timesteps.numpy())
    assert scheduler.timesteps.dtype == np.float32
    assert scheduler.init_noise_sigma == pytest.approx(float(reference.init_noise_sigma), rel=1e-4)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [999, 500, 333, 100, 64, 16])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_equal_diffusers_at_many_step_counts(name, steps, spacing):
    config = replace(SD15, timestep_spacing=spacing)
    if name == "lcm" and steps > 50:
        pytest.skip("refused: see below")
    if name == "dpmsolver++" and steps == 999 and spacing == "leading":
        pytest.skip("refused: see below")
    reference = theirs(name, config)
    reference.set_timesteps(steps)
    found = make_noise_scheduler(name, steps, config).timesteps
    np.testing.assert_array_equal(found, reference.timesteps.numpy().astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"num_train_timesteps": 500},
    ],
    ids=str,
)
def test_equals_diffusers_on_other_noise_schedules(name, change):
    config = replace(SD15, **change)
    _, expected = their_trajectory(name, 20, config)
    _, found, _ = our_trajectory(name, 20, config)
    # LCM's clean latents are large where the noise ends near ᾱ = 0
    assert np.abs(found - expected).max() < 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clips_the_clean_picture_as_diffusers_does(prediction_type):
    config = replace(SD15, prediction_type=prediction_type, clip_sample=True)
    _, expected = their_trajectory("ddim", 20, config)
    _, found, _ = our_trajectory("ddim", 20, config)
    _, unclipped, _ = our_trajectory("ddim", 20, replace(config, clip_sample=False))
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(found - unclipped).max() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers_on_the_cosine_schedule_to_float32_accuracy(name):
    config = replace(SD15, beta_schedule="squaredcos_cap_v2")
    _, expected = their_trajectory(name, 20, config)
    _, found, _ = our_trajectory(name, 20, config)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_torch_as_on_numpy(name):
    _, on_numpy, latents = our_trajectory(name, 7, SD15)
    _, on_torch, tensor = our_trajectory(name, 7, SD15, torch.from_numpy)
    assert latents.dtype == np.float32
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(on_numpy, on_torch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_advance_leaves_its_arguments_alone(name):
    scheduler = make_noise_scheduler(name, 5, SD15)
    latents, noise = noise_predictions(2)
    kept = latents.copy(), noise.copy()
    history = ()
    for step in range(len(scheduler.timesteps)):
        _, history = scheduler.advance(latents, noise, step, history)
    np.testing.assert_array_equal(latents, kept[0])
    np.testing.assert_array_equal(noise, kept[1])


def test_pndm_evaluates_the_denoiser_once_more_than_its_steps():
    assert len(make_noise_scheduler("pndm", 50, SD15).timesteps) == 51
    assert len(make_noise_scheduler("pndm", 1, SD15).timesteps) == 1


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("ddpm", 10, 'noise scheduler "ddpm" is unknown: use ddim, pndm, euler, dpmsolver++, lcm'),
        ("lcm", 51, "lcm cannot run 51 steps: ask for 1 to 50"),
        ("ddim", 0, "ddim cannot run 0 steps: ask for 1 to 1000"),
        ("ddim", 1001, "ddim cannot run 1001 steps: ask for 1 to 1000"),
        (
            "ddim",
            1000,
            "ddim cannot run 1000 steps with leading spacing and steps_offset 1: timesteps "
            "repeat or leave 0 to 999; ask for at most 999",
        ),
        (
            "dpmsolver++",
            1000,
            "dpmsolver++ cannot run 1000 steps with leading spacing and steps_offset 1: "
            "timesteps repeat or leave 0 to 999; ask for at most 998",
        ),
    ],
)
def test_says_which_steps_would_work(name, steps, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        make_noise_scheduler(name, steps, SD15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_every_accepted_step_count_gives_finite_moves(name, spacing):
    config = NoiseScheduleConfig(num_train_timesteps=30, timestep_spacing=spacing)
    for steps in range(1, 31):
        try:
            scheduler, found, _ = our_trajectory(name, steps, config)
        except ScheduleError:
            continue
        assert np.isfinite(found).all(), steps
        assert scheduler.timesteps.min() >= 0


def test_reads_the_config_that_diffusers_writes():
    scheduler = theirs("pndm", SD15)
    assert NoiseScheduleConfig.from_diffusers(scheduler.config) == SD15
    for name in ("ddim", "euler", "dpmsolver++", "lcm"):
        found = NoiseScheduleConfig.from_diffusers(theirs(name, SD15).config)
        assert found == SD15, name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "clip_sample_range",
            2.0,
            "clip_sample_range = 2.0, which is not implemented: only 1.0 is",
        ),
        ("thresholding", True, "thresholding = True, which is not implemented: only False is"),
        ("trained_betas", [0.1], "trained_betas = [0.1], which is not implemented: only None is"),
        (
            "use_karras_sigmas",
            True,
            "use_karras_sigmas = True, which is not implemented: only False is",
        ),
    ],
)
def test_refuses_a_diffusers_config_that_asks_for_other_arithmetic(key, value, message):
    config = {**SD15.to_dict(), key: value}
    whole = f"the pipeline's scheduler has {message}"
    with pytest.raises(ScheduleError, match=f"^{re.escape(whole)}$"):
        NoiseScheduleConfig.from_diffusers(config)


def test_refuses_a_diffusers_config_without_betas():
    with pytest.raises(
        ScheduleError,
        match=r"^the pipeline's scheduler config has no beta_end: use one saved by diffusers$",
    ):
        NoiseScheduleConfig.from_diffusers({"beta_start": 0.1, "beta_schedule": "linear"})


def test_a_config_survives_json():
    config = replace(SD15, prediction_type="v_prediction", steps_offset=0)
    assert NoiseScheduleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_end": 1.5}, "beta_end is 1.5: it must lie between 0 and 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0: it must be 1 or more"),
        ({"steps_offset": -1}, "steps_offset is -1: it must be 0 or more"),
        (
            {"prediction_type": "sample"},
            'prediction_type is "sample": it must be one of epsilon, v_prediction',
        ),
        (
            {"colour": "red"},
            "a noise schedule has no key colour: its keys are num_train_timesteps, beta_start, "
            "beta_end, beta_schedule, prediction_type, steps_offset, timestep_spacing, "
            "set_alpha_to_one, clip_sample",
        ),
    ],
)
def test_refuses_a_noise_schedule_that_cannot_be(change, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        NoiseScheduleConfig.from_dict({**SD15.to_dict(), **change})
