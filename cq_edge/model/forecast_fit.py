"""Fits how far forecasts go on, by least squares over a calibration run."""

import numpy as np
from numpy.typing import NDArray

from cq_edge.forecast import Weights, expected_back


class ForecastRun:
    """Takes in a calibration run's values step by step, sums up the products of every two steps'
    values, entry by entry and over prompts, and fits to those."""

    def __init__(self, total: int, furthest: int) -> None:
        """Takes the number of steps, and the most steps that a forecast is to reach."""
        self._furthest = furthest
        # at [k, d] of step k's value with that of step k - d, divided by the count of entries
        self._products = np.zeros((total, 2 * furthest + 2))
        self._recent: list[NDArray[np.floating]] = []  # of this step and before, the newest first

    def take(self, step: int, value: NDArray[np.floating]) -> None:
        """Takes in the next step of a prompt's run."""
        exactly = value.astype(np.float64).ravel()
        earlier = self._recent if step else []
        self._recent = [value.ravel(), *earlier][: self._products.shape[1]]
        for back, other in enumerate(self._recent):
            self._products[step, back] += exactly @ other / value.size

    def weights(self) -> Weights:
        """Returns (T, R+2, R+1) the weights of least squared error up to the furthest step, R."""
        total = len(self._products)
        fitted = np.zeros((total, self._furthest + 2, self._furthest + 1), np.float32)
        for step, back, gap in np.ndindex(fitted.shape):
            if 0 < back <= step and 0 < gap < total - step:
                product, expected = self._moved(step, back, gap)
                fitted[step, back, gap] = product / expected if expected > 0 else 0
        return fitted

    def left(self, weights: Weights) -> NDArray[np.float64]:
        """Returns (T, R+1) the squared errors that forecasts leave where computed steps lie
        evenly, means over the entries and summed over the prompts; column 0 and entries beyond the
        last step are 0."""
        total = len(self._products)
        errors = np.zeros((total, weights.shape[2]))
        for step, gap in np.ndindex(errors.shape):
            if not 0 < gap < total - step:
                continue
            later = self._products[step + gap]
            errors[step, gap] = later[0] - 2 * later[gap] + self._products[step, 0]
            back = expected_back(step, gap)
            if back:
                weight = float(weights[step, back, gap])
                product, expected = self._moved(step, back, gap)
                errors[step, gap] += weight * (weight * expected - 2 * product)
        return np.maximum(errors, 0)

    def _moved(self, step: int, back: int, gap: int) -> tuple[float, float]:
        """Returns the products of the last change with what changes next, and with itself."""
        later, values, before = self._products[step + gap], self._products[step], step - back
        product = later[gap] - later[gap + back] - values[0] + values[back]
        return product, values[0] - 2 * values[back] + self._products[before, 0]
