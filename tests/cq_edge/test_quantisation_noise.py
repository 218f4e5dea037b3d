import numpy as np
import pytest

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.frontier import ReuseErrors
from cq_edge.quantisation_noise import noise_by_mode

OWN = np.array([1.0, 2.0, 0.5, 3.0])
INFLUENCE = np.array([0.5, -0.4, 0.3, -0.2])


def added(modes, guidance_scale=1.0):
    never = np.zeros((4, 4))
    errors = ReuseErrors(never, never, never, noise_by_mode(OWN, INFLUENCE, guidance_scale))
    return errors.parts(CacheSchedule.from_string(modes)).noise


def test_noise_of_full_steps_adds_up_by_power():
    assert added("FFFF") == pytest.approx((OWN * INFLUENCE**2).sum())


def test_noise_that_goes_on_adds_up_by_amplitude_with_its_signs():
    """As drawing it many times shows: one value of noise for all that goes on with it."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((200_000, 4)) * np.sqrt(OWN)
    final = drawn[:, 0] * INFLUENCE[0] + drawn[:, 1] * INFLUENCE[1:3].sum()
    final += drawn[:, 3] * INFLUENCE[3]
    assert added("FFKF") == pytest.approx(np.square(final).mean(), rel=0.02)
    assert added("FFKF") < added("FFFF")


def test_shallow_steps_add_a_fifth_anew():
    anew = (OWN * INFLUENCE**2)[2]
    assert added("FFSF") == pytest.approx(added("FFKF") + 0.2 * anew)


def test_without_the_negative_prompt_noise_is_new_in_one_branch_of_two():
    """Guided noise is s·a - (s - 1)·b of two branches' noise."""
    anew, scale = (OWN * INFLUENCE**2)[2], 3.0
    share = 1 / (scale**2 + (scale - 1) ** 2)
    assert added("FFfF", scale) == pytest.approx(added("FFKF", scale) + share * anew)
    assert added("FFsF", scale) == pytest.approx(added("FFKF", scale) + 0.2 * share * anew)


def test_every_mode_has_what_it_adds():
    assert set(noise_by_mode(OWN, INFLUENCE, 7.5)) == set(Mode)
