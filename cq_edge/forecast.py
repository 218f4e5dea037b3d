"""Forecasts of what the denoiser would say at a step that does not run it.

With latents scaled to unit signal, the noise prediction is their derivative by sigma, which is
smooth until the last steps, and a straight line through the last two computed values follows it.
But the noise of a quantised denoiser is new in every run, and a line multiplies it. So calibration
fits how far to follow the line, between not at all (the last value again) and all the way
(docs/forecasts.md, `python -m benchmarks.forecasts`).
"""

from dataclasses import dataclass
from typing import Any, Self, TypeAlias

Array: TypeAlias = Any
"""NumPy array or torch tensor of floats, any shape."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The straight line over sigma through the last two computed values.

    Attributes:
        points: (sigma, value) of them, the newest first; at most two, of different sigmas.
    """

    points: tuple[tuple[float, Array], ...] = ()

    def after(self, sigma: float, value: Array) -> Self:
        """Returns the line once a value has been computed at `sigma`.

        A sigma that comes twice, as PNDM's second does, counts with its later value.
        """
        older = [point for point in self.points if point[0] != sigma]
        return type(self)(((sigma, value), *older[:1]))

    def at(self, sigma: float, slope: float = 1.0) -> Array:
        """Returns the value to expect at `sigma`: the only one there is, if there is only one.

        Args:
            sigma: Where.
            slope: The share of the line's slope to follow; 0 takes the last value again.

        Raises:
            ValueError: Nothing has been computed yet.
        """
        if not self.points:
            raise ValueError("a forecast needs at least one computed value")
        (newest, value), *older = self.points
        if not older:
            return value
        other, earlier = older[0]
        return value + (slope * (sigma - newest) / (newest - other)) * (value - earlier)
