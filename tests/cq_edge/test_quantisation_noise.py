import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.frontier import ReuseErrors
from cq_edge.quantisation_noise import forecast_share, noise_by_mode

OWN = np.array([1.0, 2.0, 0.5, 3.0])
INFLUENCE = np.array([0.5, -0.4, 0.3, -0.2])


def added(modes, guidance_scale=1.0):
    never = np.zeros((4, 4))
    errors = ReuseErrors(never, never, never, noise_by_mode(OWN, INFLUENCE, guidance_scale))
    return errors.parts(CacheSchedule.from_string(modes)).noise


def test_noise_of_full_steps_adds_up_by_power_but_for_what_neighbours_have_in_common():
    anew = np.sqrt(OWN) * INFLUENCE
    expected = anew @ anew + 2 * 0.26 * 0.73 * (anew[1:] @ anew[:-1])
    assert added("FFFF") == pytest.approx(expected)


def test_noise_that_goes_on_adds_up_by_amplitude_with_its_signs():
    """As drawing it many times shows: one value of noise for all that goes on with it, and the
    next full step with something in common with it."""
    alike = 0.26 * 0.73**3
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal([0, 0], [[1, alike], [alike, 1]], 200_000)
    final = drawn @ (np.sqrt(OWN[[0, 3]]) * [INFLUENCE[:3].sum(), INFLUENCE[3]])
    assert added("FKSF") == pytest.approx(np.square(final).mean(), rel=0.02)
    assert added("FKFF") < added("FFFF")


def test_shallow_steps_add_nothing_anew():
    assert added("FFSF") == added("FFKF")


def test_without_the_negative_prompt_noise_is_new_in_one_branch_of_two():
    """Guided noise is s·a - (s - 1)·b of two branches' noise."""
    anew, scale = (OWN * INFLUENCE**2)[2], 3.0
    share = 1 / (scale**2 + (scale - 1) ** 2)
    assert added("FFfF", scale) == pytest.approx(added("FFKF", scale) + share * anew)
    assert added("FFsF", scale) == added("FFKF", scale)


def test_every_mode_has_what_it_adds():
    assert set(noise_by_mode(OWN, INFLUENCE, 7.5)) == set(Mode)


def test_a_forecast_has_the_share_that_errs_least():
    rng = np.random.default_rng(0)
    noise_pred, forecast = rng.uniform(0.5, 1, (4, 3)), rng.uniform(0.5, 3, 4)
    common = rng.uniform(-0.2, 0.4, 4)
    anchor, gap = np.indices(noise_pred.shape)
    noise_pred[anchor + gap > 3] = np.nan
    found = forecast_share(noise_pred, forecast, common)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[anchor + gap > 2], 0)
    shares = np.linspace(0, 1, 1001)
    for i, g in np.argwhere(anchor + gap <= 2):
        step = i + g + 1
        reused = max(noise_pred[i, g] - noise_pred[step - 1, 0], 0)
        left = (1 - shares) ** 2 * noise_pred[step, 0] + 2 * shares * (1 - shares) * common[step]
        left += shares**2 * (forecast[step] + reused)
        assert found[i, g] == pytest.approx(shares[left.argmin()], abs=1e-3)


def test_a_forecast_that_errs_more_and_alike_has_no_share_and_a_perfect_one_all():
    nothing = forecast_share(np.full((3, 1), 1.0), np.full(3, 4.0), np.full(3, 1.5))
    np.testing.assert_array_equal(nothing, 0)
    everything = forecast_share(np.full((3, 1), 1.0), np.zeros(3), np.zeros(3))
    np.testing.assert_array_equal(everything, [[1], [1], [0]])


def test_where_nothing_errs_a_forecast_has_no_share():
    np.testing.assert_array_equal(forecast_share(np.zeros((4, 2)), np.zeros(4), np.zeros(4)), 0)
