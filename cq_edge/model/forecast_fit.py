"""Fits how far forecasts go on, by least squares over a calibration run."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cq_edge.forecast import Weights, expected_back


@dataclass(frozen=True, slots=True, eq=False)
class InnerProducts:
    """Sums over prompts, of T steps, of the products of two steps' values, entry by entry.

    Attributes:
        values: (T, D+1): of step k's value with that of step k - d, at [k, d]; all may be divided
            by one number, such as the count of entries.
    """

    values: NDArray[np.float64]

    def weights(self, furthest: int) -> Weights:
        """Returns (T, R+2, R+1) the weights of least squared error up to `furthest`, R."""
        total = len(self.values)
        fitted = np.zeros((total, furthest + 2, furthest + 1), np.float32)
        for step, back, gap in np.ndindex(fitted.shape):
            if 0 < back <= step and 0 < gap < total - step:
                product, expected = self._moved(step, back, gap)
                fitted[step, back, gap] = product / expected if expected > 0 else 0
        return fitted

    def left(self, weights: Weights) -> NDArray[np.float64]:
        """Returns (T, R+1) the squared errors that forecasts leave where computed steps lie
        evenly, in the products' unit; column 0 and entries beyond the last step are 0."""
        total = len(self.values)
        errors = np.zeros((total, weights.shape[2]))
        for step, gap in np.ndindex(errors.shape):
            if not 0 < gap < total - step:
                continue
            later = self.values[step + gap]
            errors[step, gap] = later[0] - 2 * later[gap] + self.values[step, 0]
            back = expected_back(step, gap)
            if back:
                weight = float(weights[step, back, gap])
                product, expected = self._moved(step, back, gap)
                errors[step, gap] += weight * (weight * expected - 2 * product)
        return np.maximum(errors, 0)

    def _moved(self, step: int, back: int, gap: int) -> tuple[float, float]:
        """Returns the products of the last change with what changes next, and with itself."""
        later, values, before = self.values[step + gap], self.values[step], step - back
        product = later[gap] - later[gap + back] - values[0] + values[back]
        return product, values[0] - 2 * values[back] + self.values[before, 0]


class ForecastRun:
    """Takes in a calibration run's values step by step, and sums up their products."""

    def __init__(self, total: int, furthest: int) -> None:
        """Takes the number of steps, and the most steps that a forecast is to reach."""
        self._furthest = furthest
        self._values = np.zeros((total, 2 * furthest + 2))
        self._recent: list[NDArray[np.floating]] = []  # of this step and before, the newest first

    def take(self, step: int, value: NDArray[np.floating]) -> None:
        """Takes in the next step of a prompt's run."""
        exactly = value.astype(np.float64).ravel()
        earlier = self._recent if step else []
        self._recent = [value.ravel(), *earlier][: self._values.shape[1]]
        for back, other in enumerate(self._recent):
            self._values[step, back] += exactly @ other / value.size

    @property
    def products(self) -> InnerProducts:
        """What was summed up."""
        return InnerProducts(self._values)

    def weights(self) -> Weights:
        """Returns (T, R+2, R+1), fitted to all that was taken in."""
        return self.products.weights(self._furthest)
