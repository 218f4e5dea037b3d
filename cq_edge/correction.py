"""The per-channel correction y ≈ gain · x + bias of a reused feature: fit and apply.

Source: decoupled error correction of CacheQuant, arXiv 2503.01323. We differ in that variance and
covariance share one convention (its code divides one by N and the other by N - 1) and in that a
constant channel has a defined answer (its code gives NaN).
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import CalibrationError

_CONSTANT = 1e-12
"""A channel whose variance is below this share of its mean square holds rounding noise only."""


@dataclass(frozen=True, slots=True, eq=False)
class ChannelCorrection:
    """What to multiply each channel of a reused feature by, and what to add.

    Attributes:
        gain: (C,) float32, finite.
        bias: (C,) float32, finite.
    """

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuses arrays that do not belong together."""
        for name, array in (("gain", self.gain), ("bias", self.bias)):
            if array.ndim != 1 or array.dtype != np.float32:
                raise CalibrationError(
                    f"{name} is {array.dtype} of shape {array.shape}: it must be float32 (C,)"
                )
            _require_finite(array[None], name)
        if self.gain.shape != self.bias.shape:
            raise CalibrationError(
                f"gain has {len(self.gain)} channels and bias {len(self.bias)}: "
                "they must have the same"
            )

    @classmethod
    def identity(cls, channels: int) -> Self:
        """Returns the correction that changes nothing: gain 1, bias 0."""
        return cls(np.ones(channels, np.float32), np.zeros(channels, np.float32))

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns gain · x + bias, channel by channel.

        Args:
            x: (B, C, H, W) float32.

        Raises:
            CalibrationError: x has another number of channels.
        """
        if x.ndim != 4 or x.shape[1] != len(self.gain):
            raise CalibrationError(
                f"a feature of shape {x.shape} does not fit a correction of {len(self.gain)} "
                f"channels: it must be (B, {len(self.gain)}, H, W)"
            )
        return self.gain[:, None, None] * x + self.bias[:, None, None]


@dataclass(frozen=True, slots=True, eq=False)
class ShallowCorrection:
    """Both halves of the correction of one shallow step.

    Attributes:
        cache: Of the cached feature, C channels.
        quantisation: Of the outputs of the layers that consume it, 2·C' channels: the first
            convolution's, then the shortcut's.
    """

    cache: ChannelCorrection
    quantisation: ChannelCorrection

    def inputs(self) -> dict[str, NDArray[np.float32]]:
        """Returns the inputs of the shallow graph that carry it, by name."""
        return {
            "gain": self.cache.gain,
            "bias": self.cache.bias,
            "output_gain": self.quantisation.gain,
            "output_bias": self.quantisation.bias,
        }


def fit_correction(x: NDArray[np.floating], y: NDArray[np.floating]) -> ChannelCorrection:
    """Returns the correction of least squared error from x to y, worked out in float64.

    A channel in which x is constant (or N is 1) gets gain 1 and the difference of the means.

    Args:
        x: (N, C) reused values; a row is one pixel of one sample; N at least 1.
        y: (N, C) the values that they should have been.

    Raises:
        CalibrationError: Shapes differ or are empty, or a channel holds NaN or infinity.
    """
    moments = MomentAccumulator()
    moments.add(x, y)
    return moments.fit()


class MomentAccumulator:
    """Means, variances and covariances of values that arrive in pieces.

    `fit` equals `fit_correction` on everything added, to rounding. Stable where means are large
    against deviations: moments are central and pieces are merged by their means.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm", 1979.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean_x = self._mean_y = np.zeros(0)
        self._var_x = self._cov = np.zeros(0)  # sums of (co)deviations, not yet divided

    @property
    def count(self) -> int:
        """Rows added so far."""
        return self._count

    def add(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> None:
        """Takes in (N, C) reused values x and the values y that they should have been.

        Raises:
            CalibrationError: Shapes differ, are empty or have another number of channels than
                before, or a channel holds NaN or infinity; what was added before stays.
        """
        if x.ndim != 2 or x.shape != y.shape or 0 in x.shape:
            raise CalibrationError(
                f"x has shape {x.shape} and y {y.shape}: both must be (N, C), not empty"
            )
        if self._count and x.shape[1] != len(self._mean_x):
            raise CalibrationError(
                f"x has {x.shape[1]} channels, but {len(self._mean_x)} were added before: "
                "they must be as many"
            )
        _require_finite(x, "x")
        _require_finite(y, "y")
        x, y = x.astype(np.float64), y.astype(np.float64)
        rows, mean_x, mean_y = len(x), x.mean(axis=0), y.mean(axis=0)
        deviation_x, deviation_y = x - mean_x, y - mean_y
        var_x = np.einsum("nc,nc->c", deviation_x, deviation_x)
        cov = np.einsum("nc,nc->c", deviation_x, deviation_y)
        if self._count:
            shift_x, shift_y = mean_x - self._mean_x, mean_y - self._mean_y
            total = self._count + rows
            weight = self._count * rows / total
            var_x += self._var_x + shift_x**2 * weight
            cov += self._cov + shift_x * shift_y * weight
            mean_x = self._mean_x + shift_x * (rows / total)
            mean_y = self._mean_y + shift_y * (rows / total)
        self._count += rows
        self._mean_x, self._mean_y, self._var_x, self._cov = mean_x, mean_y, var_x, cov

    def going_on(self, before: Self, between: Self, weight: float) -> "MomentAccumulator":
        """Returns the moments of x + weight·(x - w) with y, of a value w before x.

        Args:
            before: Of the same rows, what holds (w, y).
            between: What holds (w, x).
            weight: How much of the change from w to x goes on.
        """
        found, kept = MomentAccumulator(), 1 + weight
        found._count, found._mean_y = self._count, self._mean_y
        found._mean_x = kept * self._mean_x - weight * before._mean_x
        found._cov = kept * self._cov - weight * before._cov
        variance = kept**2 * self._var_x + weight**2 * before._var_x
        found._var_x = np.maximum(variance - 2 * kept * weight * between._cov, 0)
        return found

    def fit(self) -> ChannelCorrection:
        """Returns the correction of least squared error over everything added.

        Raises:
            CalibrationError: Nothing was added, or the correction does not fit in float32.
        """
        if not self._count:
            raise CalibrationError("a correction needs at least one row of values: none was added")
        constant = self._var_x <= _CONSTANT * self._count * self._mean_x**2
        gain = np.where(constant, 1.0, self._cov / np.where(constant, 1.0, self._var_x))
        bias = self._mean_y - gain * self._mean_x
        with np.errstate(over="ignore"):  # becomes inf, which ChannelCorrection refuses by name
            return ChannelCorrection(gain.astype(np.float32), bias.astype(np.float32))


def _require_finite(values: NDArray[np.floating], name: str) -> None:
    """Refuses (N, C) values with NaN or infinity; names the first such channel."""
    finite = np.isfinite(values).all(axis=0)
    if not finite.all():
        raise CalibrationError(
            f"{name} is not finite in channel {int(finite.argmin())}: "
            "calibrate in float32 and leave out the sample that overflows"
        )
