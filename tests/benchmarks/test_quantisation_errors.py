import numpy as np
import pytest

from benchmarks.quantisation_errors import _alike, _left


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
