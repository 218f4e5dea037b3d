import numpy as np
import pytest
import torch

from cq_edge.influence import step_influence
from cq_edge.model.response import measure_response, tried_steps
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

_SHAPE = (4, 4, 4)
_PROMPTS = [(torch.zeros(1, 77, 8), torch.ones(1, 77, 8))]


def _loop(full, name="ddim", steps=12):
    scheduler = make_noise_scheduler(name, steps, NoiseScheduleConfig())
    return Loop(full, scheduler, _SHAPE, guidance_scale=1.0)


def _deaf(latents, timestep, embeddings):
    """Says what it says whatever the latents: errors keep all that the noise scheduler gives."""
    del embeddings
    return torch.full_like(latents, float(timestep) ** 0.5), latents


def _mending(latents, timestep, embeddings):
    """Calls noise whatever is off the latents that it wants."""
    alphas = NoiseScheduleConfig().alphas_bar()
    variance = 1 - alphas[int(timestep)]
    return latents / variance**0.5 + 0.1 * _deaf(latents, timestep, embeddings)[0], latents


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmsolver++"])
def test_a_denoiser_that_hears_nothing_leaves_the_noise_schedulers_own_influence(name):
    loop = _loop(_deaf, name)
    found = measure_response(loop, _PROMPTS).influence
    np.testing.assert_allclose(found, step_influence(loop.noise_scheduler) ** 2, rtol=1e-3)


def test_a_denoiser_that_mends_makes_early_errors_worth_less():
    loop = _loop(_mending)
    alone = step_influence(loop.noise_scheduler) ** 2
    found = measure_response(loop, _PROMPTS).influence
    assert (found[:8] < 0.8 * alone[:8]).all()
    assert found[-1] == pytest.approx(alone[-1], rel=1e-3)  # nobody comes after the last


def test_every_one_of_the_last_steps_is_tried_and_some_before():
    assert tried_steps(51) == [1, 6, 14, 22, 30, 38, 46, 47, 48, 49, 50]
    assert tried_steps(4) == [1, 2, 3]
    assert tried_steps(1) == [0]


def test_progress_is_told_of_every_step():
    told = []
    measure_response(_loop(_deaf), _PROMPTS, lambda: told.append(None))
    assert len(told) == 12 + sum(11 - step for step in tried_steps(12))


def test_the_distance_of_two_loops_is_that_of_their_final_latents():
    few, many = (measure_response(_loop(_mending, "ddim", n), _PROMPTS) for n in (4, 12))
    expected = float(np.square(few.finals[0].numpy() - many.finals[0].numpy()).mean())
    assert few.distance(many) == pytest.approx(expected, rel=1e-5)
    assert expected > 0
    assert many.distance(many) == 0
