from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.quantisation_errors import _alike, _left, _repeated
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from runtime.denoise import moved_apart


@pytest.fixture
def right():
    return np.random.default_rng(0).standard_normal((8, 3, 4, 16, 16))


def test_offsets_of_a_channel_at_a_step_are_taken_away(right):
    offset = np.random.default_rng(1).standard_normal((3, 4, 1, 1))
    assert _left(right, right + offset, gains=False) < 1e-20
    assert _left(right, right + offset, gains=True) < 1e-20


def test_gains_take_gains_which_offsets_leave(right):
    gain = 1 + np.random.default_rng(1).uniform(-0.2, 0.2, (3, 4, 1, 1))
    assert _left(right, gain * right, gains=True) < 1e-20
    assert _left(right, gain * right, gains=False) > 0.5 * np.square(gain * right - right).mean()


def test_noise_is_left_and_what_is_fitted_to_it_does_not_carry_over(right):
    noise = 0.1 * np.random.default_rng(1).standard_normal(right.shape)
    for gains in (False, True):
        left = _left(right, right + noise, gains=gains) / np.square(noise).mean()
        assert 0.98 < left < 1.02


def test_errors_of_neighbouring_steps_are_as_alike_as_they_were_drawn():
    fresh = np.random.default_rng(0).standard_normal((8, 20, 4, 8, 8))
    assert _alike(fresh) == pytest.approx(0, abs=0.01)
    mixed = fresh.copy()
    mixed[:, 1::2] = 0.6 * fresh[:, ::2] + 0.8 * fresh[:, 1::2]  # every other pair alike by 0.6
    pairs = 10 / 19
    assert _alike(mixed) == pytest.approx(0.6 * pairs, abs=0.01)


def test_of_several_runs_the_mean_is_taken_on_latents_moved_to_either_side():
    seen_by_graph = []

    def squares(latents, _, *context):
        seen_by_graph.append(latents)
        return latents**2 + context[0], latents

    noise_scheduler = make_noise_scheduler("ddim", 4, NoiseScheduleConfig())
    loop = Loop(squares, noise_scheduler, (4, 2, 2), 3.0)
    prompt = ((torch.tensor(0.0),), (torch.tensor(1.0),))
    visit = next(iter(loop.run(0, prompt)))
    visit, latents = replace(visit, step=2), visit.seen[0].double().numpy()
    seen_by_graph.clear()
    once, twice, four_times = _repeated(squares, loop, visit, prompt)
    assert len(seen_by_graph) == 2 * (1 + 4)
    for moved, given in zip(
        seen_by_graph[2::2], moved_apart(visit.seen.numpy(), 2, 4), strict=True
    ):
        np.testing.assert_array_equal(moved, given)
    np.testing.assert_allclose(once, latents**2 + 3, rtol=1e-5)
    for several in (twice, four_times):  # (x + d)² and (x - d)², on the mean x² + d²
        np.testing.assert_allclose(several - once, 0.02**2, atol=2e-6)
