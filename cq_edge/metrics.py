"""How alike two pictures, signals or embeddings are; float64 inside, whatever comes in."""

import math

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import UsageError

_SSIM_TAPS = 11
_SSIM_SIGMA = 1.5


def psnr_db(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Returns the peak signal-to-noise ratio of two pictures in dB; infinity if equal.

    Args:
        a: Any shape; uint8 (peak 255), or float within [0, 1] (peak 1).
        b: Like a, in shape and kind.

    Raises:
        UsageError: Shapes or kinds differ, or a value lies outside the range.
    """
    x, y = _unit_range(a, b)
    mean_square = float(np.mean((x - y) ** 2))
    return -10 * math.log10(mean_square) if mean_square else math.inf


def finite_psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Returns the PSNR in dB of two uint8 pictures of one shape: equal ones, not infinite, count as
    one level off in a single value.

    Raises:
        UsageError: Shapes differ.
    """
    return min(psnr_db(a, b), 10 * math.log10(255.0**2 * a.size))


def ssim(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Returns the structural similarity of two pictures: 1 if equal, about 0 if unrelated.

    Gaussian windows of 11 by 11 pixels, sigma 1.5, that lie within the picture; the mean over them
    and over channels.

    Args:
        a: (H, W) or (H, W, C), 11 pixels or more each way; uint8, or float within [0, 1].
        b: Like a, in shape and kind.

    Raises:
        UsageError: As for `psnr_db`, or a picture is too small or has another layout.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004, K1 = 0.01 and
    K2 = 0.03. We differ in that colour channels are averaged and nothing is downsampled.
    """
    x, y = _unit_range(a, b)
    if x.ndim not in (2, 3) or min(x.shape[:2]) < _SSIM_TAPS:
        raise UsageError(
            f"a picture of shape {x.shape} has no SSIM: it must be (H, W) or (H, W, C) with "
            f"{_SSIM_TAPS} pixels or more each way"
        )
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))


def sqnr_db(reference: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    """Returns 10·log10(Σ reference² / Σ (reference - other)²), dB.

    Infinity if they are equal; minus infinity if `other` holds NaN or infinity, or differs from
    a reference of zeros: so a comparison with a floor fails whenever it should.

    Args:
        reference: Any shape, real, finite.
        other: The same shape, real.

    Raises:
        UsageError: Shapes differ, are empty, or the reference is not finite.
    """
    _require_same_shape(reference, other)
    x, y = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if not np.isfinite(x).all():
        raise UsageError("the reference holds NaN or infinity: nothing can be compared with it")
    if not np.isfinite(y).all():
        return -math.inf
    signal, noise = float(np.sum(x * x)), float(np.sum((x - y) ** 2))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def clip_score(
    image_embeddings: NDArray[np.floating], text_embeddings: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Returns 100 · cosine of each picture's embedding with its text's: (N,), -100 to 100.

    Args:
        image_embeddings: (N, D), no row of zeros.
        text_embeddings: (N, D), no row of zeros.

    Raises:
        UsageError: Shapes differ or are not (N, D), or a row has no direction.

    Source: Hessel et al., arXiv 2104.08718, scaled by 100 as is usual for Stable Diffusion. We
    differ in that negative values are kept.
    """
    _require_same_shape(image_embeddings, text_embeddings)
    if image_embeddings.ndim != 2:
        raise UsageError(f"embeddings have shape {image_embeddings.shape}: it must be (N, D)")
    pairs = _unit_rows(image_embeddings) * _unit_rows(text_embeddings)
    return np.asarray(100 * pairs.sum(axis=1), np.float64)


def trimmed_mean(values: NDArray[np.floating], trim: float) -> float:
    """Returns the mean of the values that are left when a share of them, 0 or more and below 0.5,
    is left out at either end. What a few pairs do that differ altogether is not in it.

    Args:
        values: (N,), 1 or more.
        trim: The share of each end, rounded down to whole values.
    """
    if not trim:
        return float(values.mean())
    left_out = int(trim * len(values))
    return float(np.sort(values)[left_out : len(values) - left_out].mean())


def mean_interval(
    values: NDArray[np.floating], confidence: float = 0.95, trim: float = 0.0
) -> tuple[float, float]:
    """Returns the confidence interval of the mean of N paired differences, by the bootstrap.

    Args:
        values: (N,), finite; one difference a pair.
        confidence: Of the interval, between 0 and 1.
        trim: As for `trimmed_mean`, whose interval it then is.

    Raises:
        UsageError: There is no value, or one is not finite.

    Source: the percentile bootstrap of Efron and Tibshirani, 1993; 10,000 resamples, seed 0.
    """
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise UsageError(f"values of shape {values.shape} have no interval: give (N,) finite ones")
    rng = np.random.default_rng(0)
    drawn = (rng.choice(values, len(values)) for _ in range(10_000))
    means = np.array([trimmed_mean(resample, trim) for resample in drawn])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def spearman_rho(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Returns Spearman's rank correlation of two series, -1 to 1; ties get their mean rank.

    Args:
        a: (N,), two different values at least.
        b: Likewise.

    Raises:
        UsageError: Shapes differ, or a series has no order.
    """
    _require_same_shape(a, b)
    ranks = []
    for series in (a, b):
        _, place, counts = np.unique(series, return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise UsageError("a series of equal values has no rank correlation")
        ends = np.cumsum(counts)
        ranks.append((ends - (counts - 1) / 2)[place])
    return float(np.corrcoef(ranks)[0, 1])


def _unit_rows(embeddings: NDArray[np.floating]) -> NDArray[np.float64]:
    rows = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    odd = ~(np.isfinite(lengths) & (lengths > 0))
    if odd.any():
        raise UsageError(
            f"embedding {int(odd.argmax())} has length {lengths[odd][0]}: no direction"
        )
    return np.asarray(rows / lengths, np.float64)


def _unit_range(
    a: NDArray[np.generic], b: NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns both pictures as float64 within [0, 1]."""
    _require_same_shape(a, b)
    if a.dtype == np.uint8 and b.dtype == np.uint8:
        return a.astype(np.float64) / 255, b.astype(np.float64) / 255
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        raise UsageError(
            f"pictures of {a.dtype} and {b.dtype} cannot be compared: both must be uint8, or both "
            "float within [0, 1]"
        )
    for picture in (a, b):
        low, high = float(picture.min()), float(picture.max())
        if not (low >= 0 and high <= 1):
            raise UsageError(f"a picture has values from {low:g} to {high:g}: clip it to [0, 1]")
    return a.astype(np.float64), b.astype(np.float64)


def _require_same_shape(a: NDArray[np.generic], b: NDArray[np.generic]) -> None:
    if a.shape != b.shape or a.size == 0:
        raise UsageError(f"shapes are {a.shape} and {b.shape}: they must be equal and not empty")


def _blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns Gaussian means over windows that lie within: (H-10, W-10) or (H-10, W-10, C)."""
    offsets = np.arange(_SSIM_TAPS) - _SSIM_TAPS // 2
    taps = np.exp(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    taps /= taps.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(image, _SSIM_TAPS, axis=axis)
        image = np.asarray(windows @ taps, np.float64)
    return image
