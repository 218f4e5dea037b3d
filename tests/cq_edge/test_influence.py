import numpy as np
import pytest

from cq_edge.influence import noise_influence, reuse_influence, step_influence
from cq_edge.noise_scheduler import (
    NAMES,
    PREDICTION_TYPES,
    NoiseScheduleConfig,
    make_noise_scheduler,
)


def _final(noise_scheduler, predictions, start):
    latents, history = start, ()
    for step, noise_pred in enumerate(predictions):
        latents, history = noise_scheduler.advance(latents, noise_pred, step, history)
    return latents


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_one_prediction_moves_the_final_latents_by_its_influence(name):
    noise_scheduler = make_noise_scheduler(name, 7, NoiseScheduleConfig())
    influence = step_influence(noise_scheduler)
    rng = np.random.default_rng(0)
    total = len(noise_scheduler.timesteps)
    predictions, start = rng.standard_normal((total, 3)), rng.standard_normal(3)
    expected = _final(noise_scheduler, predictions, start)
    assert influence.shape == (total,)
    for step in range(total):
        changed = predictions.copy()
        changed[step] += 0.25
        moved = _final(noise_scheduler, changed, start) - expected
        np.testing.assert_allclose(moved, 0.25 * influence[step], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_of_gaussian_data_mends_what_the_influence_says(name, prediction_type):
    config, spread = NoiseScheduleConfig(prediction_type=prediction_type), 0.5
    noise_scheduler = make_noise_scheduler(name, 9, config)

    def final(error_at):
        latents, history = np.full(3, 0.7), ()
        for step, sigma in enumerate(noise_scheduler.sigmas):
            unit_signal = noise_scheduler.model_input(latents, step) * np.sqrt(1 + sigma**2)
            # of data with mean 0: what is to be expected of the noise and of the data
            noise = unit_signal * sigma / (spread**2 + sigma**2)
            clean = unit_signal - sigma * noise
            v = (noise - sigma * clean) / np.sqrt(1 + sigma**2)
            prediction = noise if prediction_type == "epsilon" else v
            prediction = prediction + 0.25 * (step == error_at)
            latents, history = noise_scheduler.advance(latents, prediction, step, history)
        return latents

    total = len(noise_scheduler.timesteps)
    moved = [final(step)[0] - final(None)[0] for step in range(total)]
    found = step_influence(noise_scheduler, spread)
    np.testing.assert_allclose(moved, 0.25 * found, rtol=1e-6, atol=1e-9)


def test_each_error_may_have_a_spread_of_its_own():
    noise_scheduler = make_noise_scheduler("pndm", 8, NoiseScheduleConfig())
    spreads = np.linspace(0.05, 3, 9)
    found = step_influence(noise_scheduler, spreads)
    for step, spread in enumerate(spreads):
        alone = step_influence(noise_scheduler, float(spread))[step]
        assert found[step] == pytest.approx(alone, rel=1e-12)


def test_errors_of_reuse_are_of_coarser_shapes_the_more_noise_there_is():
    noise_scheduler = make_noise_scheduler("ddim", 8, NoiseScheduleConfig())
    spreads = np.hypot(0.3, 0.1 * np.array(noise_scheduler.sigmas[:8]))
    alone = np.abs(np.pad(step_influence(noise_scheduler, spreads), 1))
    expected = (alone[:-2] + 2 * alone[1:-1] + alone[2:]) / 4
    np.testing.assert_allclose(reuse_influence(noise_scheduler), expected)


def test_a_multistep_scheduler_ends_with_changing_signs_which_neighbours_even_out():
    noise_scheduler = make_noise_scheduler("pndm", 50, NoiseScheduleConfig())
    noise, reuse = noise_influence(noise_scheduler), reuse_influence(noise_scheduler)
    assert noise[-4] * noise[-3] < 0 > noise[-3] * noise[-2]
    assert abs(noise[-4:-1].sum()) < 0.5 * np.abs(noise[-4:-1]).sum()
    assert noise.shape == reuse.shape == (51,)
    assert (reuse > 0).all()
