import numpy as np
import pytest
import torch

from cq_edge.model.base_error import base_error, final_latents
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

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
    assert base_error(few, many) == pytest.approx(float(expected), rel=1e-5)
    assert expected > 0
    assert base_error(many, many) == 0
