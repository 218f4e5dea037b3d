import math
import re

import numpy as np
import pytest
from scipy.stats import trim_mean

from cq_edge.errors import UsageError
from cq_edge.metrics import (
    clip_score,
    mean_interval,
    psnr_db,
    spearman_rho,
    sqnr_db,
    ssim,
    trimmed_mean,
)


def picture(seed=0, shape=(24, 20, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_of_a_constant_difference_is_known():
    black = np.zeros((4, 4), np.uint8)
    assert psnr_db(black, black + np.uint8(255)) == 0
    assert psnr_db(black, black + np.uint8(1)) == pytest.approx(20 * math.log10(255))
    assert psnr_db(np.zeros((4, 4)), np.full((4, 4), 0.1)) == pytest.approx(20)


def test_psnr_of_uint8_does_not_wrap():
    low, high = np.full((4, 4), 2, np.uint8), np.full((4, 4), 250, np.uint8)
    assert psnr_db(low, high) == psnr_db(high, low) == pytest.approx(20 * math.log10(255 / 248))


def test_psnr_is_the_same_for_uint8_and_for_float():
    a, b = picture(0), picture(1)
    assert psnr_db(a, b) == pytest.approx(psnr_db(a / 255, b / 255), rel=1e-12)


def test_equal_pictures_have_infinite_psnr_and_an_ssim_of_1():
    assert psnr_db(picture(), picture()) == math.inf
    assert ssim(picture(), picture()) == pytest.approx(1, abs=1e-12)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    a, b = np.full((16, 16), 0.2), np.full((16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_ssim_equals_its_definition_window_by_window():
    a, b = picture(0, (14, 13)) / 255, picture(1, (14, 13)) / 255
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for row in range(14 - 10):
        for column in range(13 - 10):
            x, y = (image[row : row + 11, column : column + 11] for image in (a, b))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            above = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
            values.append(above / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(values), abs=1e-12)


def test_ssim_is_symmetric_and_the_mean_over_channels():
    a, b = picture(0), picture(1)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    by_channel = [ssim(a[..., c], b[..., c]) for c in range(3)]
    assert ssim(a, b) == pytest.approx(np.mean(by_channel), abs=1e-12)


def test_ssim_falls_with_noise_and_is_negative_for_a_negative():
    a = picture(0) / 255
    rng = np.random.default_rng(2)
    noisy = [np.clip(a + s * rng.standard_normal(a.shape), 0, 1) for s in (0.01, 0.1, 0.5)]
    scores = [ssim(a, n) for n in noisy]
    assert scores == sorted(scores, reverse=True)
    assert ssim(a, 1 - a) < 0


def test_sqnr_of_a_known_error():
    reference = np.float32([3, 4])
    assert sqnr_db(reference, reference * np.float32(1.1)) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(reference, np.zeros(2)) == 0


def test_sqnr_is_infinite_if_equal_and_fails_every_floor_if_not_comparable():
    ones = np.ones(3, np.float32)
    assert sqnr_db(ones, ones) == math.inf
    assert sqnr_db(0 * ones, 0 * ones) == math.inf
    assert sqnr_db(0 * ones, ones) == -math.inf
    assert sqnr_db(ones, np.float32([1, np.nan, 1])) == -math.inf
    assert sqnr_db(ones, np.float32([1, np.inf, 1])) == -math.inf


def test_sqnr_of_large_float32_values_does_not_overflow():
    large = np.full(4, 1e30, np.float32)
    assert sqnr_db(large, large * np.float32(0.9)) == pytest.approx(20, abs=1e-4)


def test_clip_score_is_a_hundred_times_the_cosine_of_each_row():
    images = np.float32([[1, 0], [0, 2], [3, 3], [-1, 0]])
    texts = np.float32([[5, 0], [1, 0], [1, 0], [1, 0]])
    found = clip_score(images, texts)
    np.testing.assert_allclose(found, [100, 0, 100 / math.sqrt(2), -100], atol=1e-12)
    assert found.dtype == np.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: psnr_db(np.zeros((4, 4)), np.zeros((4, 5))),
            "shapes are (4, 4) and (4, 5): they must be equal and not empty",
        ),
        (
            lambda: sqnr_db(np.zeros(0), np.zeros(0)),
            "shapes are (0,) and (0,): they must be equal and not empty",
        ),
        (
            lambda: psnr_db(np.zeros(4, np.uint8), np.zeros(4)),
            "pictures of uint8 and float64 cannot be compared: both must be uint8, or both "
            "float within [0, 1]",
        ),
        (
            lambda: ssim(np.zeros((16, 16)), np.full((16, 16), 255.0)),
            "a picture has values from 255 to 255: clip it to [0, 1]",
        ),
        (
            lambda: ssim(np.zeros((3, 16, 16)), np.zeros((3, 16, 16))),
            "a picture of shape (3, 16, 16) has no SSIM: it must be (H, W) or (H, W, C) with 11 "
            "pixels or more each way",
        ),
        (
            lambda: sqnr_db(np.array([np.nan]), np.zeros(1)),
            "the reference holds NaN or infinity: nothing can be compared with it",
        ),
        (
            lambda: clip_score(np.ones(3), np.ones(3)),
            "embeddings have shape (3,): it must be (N, D)",
        ),
        (
            lambda: clip_score(np.float64([[1, 1], [0, 0]]), np.ones((2, 2))),
            "embedding 1 has length 0.0: no direction",
        ),
    ],
)
def test_says_what_cannot_be_compared(make, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        make()


def test_the_interval_of_a_mean_is_the_normal_one_where_there_are_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert mean_interval(np.zeros(5)) == (0.0, 0.0)


def test_a_trimmed_mean_leaves_a_share_of_either_end_out():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(3, 2, 395), [300.0, 400.0, -50.0, 70.0, 60.0]])
    for trim in (0.0, 0.004, 0.01, 0.25):
        assert trimmed_mean(values, trim) == pytest.approx(trim_mean(values, trim))
    assert trimmed_mean(np.array([1.0, 5.0]), 0.4) == 3.0  # fewer than one of either end
    low, high = mean_interval(values, trim=0.05)
    assert low < trimmed_mean(values, 0.05) < high
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    wide = mean_interval(values)
    assert wide[1] - wide[0] > 5 * (high - low)


def test_no_values_have_no_interval():
    for values in (np.zeros(0), np.array([1.0, np.nan]), np.zeros((2, 2))):
        with pytest.raises(UsageError, match="have no interval"):
            mean_interval(values)


def test_rank_correlation_sees_order_alone():
    x = np.array([0.1, 5.0, 0.3, 2.0])
    assert spearman_rho(x, np.exp(x)) == pytest.approx(1)
    assert spearman_rho(x, -x) == pytest.approx(-1)
    # d² sum 2 over four ranks: 1 - 6 · 2 / (4 · 15)
    assert spearman_rho(x, np.array([1.0, 4.0, 3.0, 2.0])) == pytest.approx(0.8)
    # ties share their mean rank: [1, 2.5, 2.5, 4] against [1, 2, 3, 4]
    tied = spearman_rho(np.array([0.0, 1.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0, 3.0]))
    assert tied == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    with pytest.raises(UsageError, match="no rank correlation"):
        spearman_rho(np.ones(3), np.arange(3.0))
