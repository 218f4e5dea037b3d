"""Channel corrections against numpy.linalg.lstsq."""

import re

import numpy as np
import pytest

from cq_edge.correction import ChannelCorrection, MomentAccumulator, fit_correction
from cq_edge.errors import CalibrationError


def pairs(rows=200, channels=5, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, channels)) + offset
    noise = 0.1 * rng.standard_normal((rows, channels))
    y = x * rng.uniform(0.5, 2, channels) + rng.standard_normal(channels) + noise
    return x.astype(np.float32), y.astype(np.float32)


def least_squares(x, y):
    gain, bias = [], []
    for a, b in zip(x.T.astype(float), y.T.astype(float), strict=True):
        design = np.stack([a, np.ones_like(a)], axis=1)
        (slope, intercept), *_ = np.linalg.lstsq(design, b, rcond=None)
        gain.append(slope)
        bias.append(intercept)
    return np.array(gain), np.array(bias)


@pytest.mark.parametrize("rows", [2, 3, 50, 1000])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_fit_equals_least_squares(rows, offset):
    x, y = pairs(rows, offset=offset)
    fitted = fit_correction(x, y)
    gain, bias = least_squares(x, y)
    np.testing.assert_allclose(fitted.gain, gain, rtol=2e-5)
    np.testing.assert_allclose(fitted.bias, bias, rtol=2e-5, atol=2e-4)
    assert fitted.gain.dtype == fitted.bias.dtype == np.float32


def test_an_exact_line_is_recovered():
    x, _ = pairs()
    fitted = fit_correction(x, 3 * x.astype(float) - 2)
    np.testing.assert_allclose(fitted.gain, 3, rtol=1e-6)
    np.testing.assert_allclose(fitted.bias, -2, rtol=1e-5)


def test_a_constant_channel_gets_gain_1_and_the_difference_of_means():
    x, y = pairs()
    x[:, 2] = 0.1
    fitted = fit_correction(x, y)
    assert fitted.gain[2] == 1
    assert fitted.bias[2] == pytest.approx(y[:, 2].astype(float).mean() - 0.1, rel=1e-5)
    gain, _ = least_squares(x[:, :2], y[:, :2])
    np.testing.assert_allclose(fitted.gain[:2], gain, rtol=2e-5)


def test_one_row_is_a_constant_channel():
    fitted = fit_correction(np.array([[1.0, 2.0]]), np.array([[4.0, 1.0]]))
    np.testing.assert_array_equal(fitted.gain, [1, 1])
    np.testing.assert_array_equal(fitted.bias, [3, -1])


def test_fitting_a_feature_to_itself_is_the_identity():
    x, _ = pairs()
    fitted = fit_correction(x, x)
    np.testing.assert_array_equal(fitted.gain, 1)
    np.testing.assert_array_equal(fitted.bias, 0)


@pytest.mark.parametrize("cuts", [(1,), (1, 2, 3), (50, 120), (199,)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pieces_fit_as_the_whole(cuts, offset):
    x, y = pairs(offset=offset)
    x[:, 4] = 7
    moments = MomentAccumulator()
    for part_x, part_y in zip(np.split(x, cuts), np.split(y, cuts), strict=True):
        moments.add(part_x, part_y)
    whole, pieces = fit_correction(x, y), moments.fit()
    assert moments.count == 200
    np.testing.assert_allclose(pieces.gain, whole.gain, rtol=1e-6)
    np.testing.assert_allclose(pieces.bias, whole.bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.7, -0.3])
def test_the_moments_of_a_forecast_are_those_of_its_values(weight):
    rng = np.random.default_rng(3)
    before = rng.normal(20, 1, (40, 5))
    x, y = (before + rng.normal(size=before.shape) for _ in range(2))
    moments = [MomentAccumulator() for _ in range(3)]
    for each, pair in zip(moments, ((x, y), (before, y), (before, x)), strict=True):
        each.add(pair[0][:15], pair[1][:15])
        each.add(pair[0][15:], pair[1][15:])
    found = moments[0].going_on(*moments[1:], weight).fit()
    fitted = fit_correction(x + weight * (x - before), y)
    np.testing.assert_allclose(found.gain, fitted.gain, rtol=1e-5)
    np.testing.assert_allclose(found.bias, fitted.bias, rtol=1e-5, atol=1e-4)


def test_large_means_do_not_drown_small_deviations():
    x, _ = pairs()
    x = x.astype(float) + 1e5
    fitted = fit_correction(x, 2 * (x - 1e5) + 1e5)
    np.testing.assert_allclose(fitted.gain, 2, rtol=1e-6)


def test_fitting_leaves_its_arguments_alone():
    x, y = pairs()
    kept = x.copy(), y.copy()
    fit_correction(x, y)
    np.testing.assert_array_equal(x, kept[0])
    np.testing.assert_array_equal(y, kept[1])


def test_apply_scales_and_shifts_each_channel():
    correction = ChannelCorrection(np.float32([2, -1]), np.float32([0, 3]))
    x = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    found = correction.apply(x)
    np.testing.assert_array_equal(found[:, 0], 2 * x[:, 0])
    np.testing.assert_array_equal(found[:, 1], 3 - x[:, 1])
    assert found.dtype == np.float32


def test_the_identity_changes_no_bit():
    x = np.random.default_rng(0).standard_normal((1, 6, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(ChannelCorrection.identity(6).apply(x), x)


def with_nan(array, channel):
    array = array.copy()
    array[3, channel] = np.nan
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda x, y: fit_correction(with_nan(x, 3), y),
            "x is not finite in channel 3: calibrate in float32 and leave out the sample that "
            "overflows",
        ),
        (
            lambda x, y: fit_correction(x, with_nan(y, 1)),
            "y is not finite in channel 1: calibrate in float32 and leave out the sample that "
            "overflows",
        ),
        (
            lambda x, y: fit_correction(x, y[:5]),
            "x has shape (200, 5) and y (5, 5): both must be (N, C), not empty",
        ),
        (
            lambda x, y: fit_correction(x[:0], y[:0]),
            "x has shape (0, 5) and y (0, 5): both must be (N, C), not empty",
        ),
        (
            lambda *_: MomentAccumulator().fit(),
            "a correction needs at least one row of values: none was added",
        ),
        (
            lambda *_: ChannelCorrection(np.ones(3, np.float32), np.ones(2, np.float32)),
            "gain has 3 channels and bias 2: they must have the same",
        ),
        (
            lambda *_: ChannelCorrection(np.ones(3), np.ones(3, np.float32)),
            "gain is float64 of shape (3,): it must be float32 (C,)",
        ),
        (
            lambda *_: ChannelCorrection.identity(3).apply(np.ones((1, 2, 4, 4), np.float32)),
            "a feature of shape (1, 2, 4, 4) does not fit a correction of 3 channels: it must "
            "be (B, 3, H, W)",
        ),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(CalibrationError, match=f"^{re.escape(message)}$"):
        make(*pairs())


def test_a_refused_piece_leaves_the_moments_as_they_were():
    x, y = pairs()
    moments = MomentAccumulator()
    moments.add(x, y)
    with pytest.raises(CalibrationError):
        moments.add(with_nan(x, 0), y)
    message = "x has 2 channels, but 5 were added before: they must be as many"
    with pytest.raises(CalibrationError, match=f"^{message}$"):
        moments.add(x[:, :2], y[:, :2])
    np.testing.assert_array_equal(moments.fit().gain, fit_correction(x, y).gain)
