import numpy as np
import pytest

from benchmarks.quantisation_errors import _left


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
