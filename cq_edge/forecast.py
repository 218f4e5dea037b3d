"""Forecasts of what the denoiser would say at a step that does not run it.

With latents scaled to unit signal, the noise prediction is their derivative by sigma, which is
smooth: two computed values and a straight line through them do better than the last value alone,
and on 50 steps better than a parabola (`python -m benchmarks.forecasts`).
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

    def at(self, sigma: float) -> Array:
        """Returns the value to expect at `sigma`: the only one there is, if there is only one.

        Raises:
            ValueError: Nothing has been computed yet.
        """
        if not self.points:
            raise ValueError("a forecast needs at least one computed value")
        (newest, value), *older = self.points
        if not older:
            return value
        other, earlier = older[0]
        return value + ((sigma - newest) / (newest - other)) * (value - earlier)
