import numpy as np
import pytest

from cq_edge.influence import step_influence
from cq_edge.noise_scheduler import NAMES, NoiseScheduleConfig, make_noise_scheduler


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
        moved = np.abs(_final(noise_scheduler, changed, start) - expected)
        np.testing.assert_allclose(moved, 0.25 * influence[step], rtol=1e-9, atol=1e-12)
