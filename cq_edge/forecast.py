"""Forecasts of what a graph would give at a step that does not run it.

Cached features and noise predictions go on changing as they changed last: what is forecast is the
last computed value, and a share of what it differs by from the last before it that was wholly
computed. How large a share depends on which three steps these are; calibration fits it to the float
graphs (docs/forecasts.md, `python -m benchmarks.forecasts`).
"""

from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any
"""NumPy array or torch tensor of floats, any shape."""
Weights: TypeAlias = NDArray[np.float32]
"""(T, B+1, G+1): entry [i, b, g] is the share of the change from step i - b to step i that step
i + g goes on with; 0 where there are no such steps."""
_STEADY = 0.1
"""Of the loop's steps: what fits a calibration run over more overshoots in a loop that reuses,
whose latents lag (docs/forecasts.md), and over twice as many tips some pictures into other
colours."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What goes on from the last computed value and the last before it that was wholly computed: by
    a full step, guided or not.

    A value that was computed in part errs by what it reused. As the newest it is still the best
    there is; but the change from it to the next one is that error as much as a change.

    Attributes:
        points: (step, value) of them, the newest first; at most two.
        in_part: Whether the newest was computed in part.
    """

    points: tuple[tuple[int, Array], ...] = ()
    in_part: bool = False

    def after(self, step: int, value: Array, *, in_part: bool = False) -> Self:
        """Returns the forecast once a later step has computed a value, wholly or in part."""
        before = self.points[self.in_part :][:1]
        return type(self)(((step, value), *before), in_part)

    def at(self, step: int, weights: Weights | None = None) -> Array:
        """Returns the value to expect at a step.

        Args:
            step: Which.
            weights: How far to go on; without them, and where they do not reach, the last value
                is taken again.

        Raises:
            ValueError: Nothing has been computed yet.
        """
        if not self.points:
            raise ValueError("a forecast needs at least one computed value")
        (last, value), *older = self.points
        if weights is None or not older:
            return value
        before, earlier = older[0]
        back, gap = last - before, step - last
        if back >= weights.shape[1] or gap >= weights.shape[2]:
            return value
        return value + float(weights[last, back, gap]) * (value - earlier)


def expected_back(step: int, gap: int) -> int:
    """Returns how many steps before `step` the value before it is taken to have been computed,
    where what is measured of a forecast `gap` steps on does not depend on that: computed steps
    lie evenly, and the next one follows the forecast."""
    return min(gap + 1, step)


def kept_over(steps: NDArray[np.integer], total: int) -> NDArray[np.float32]:
    """Returns how much is kept, 1 to 0, of what fits a feature's change over so many steps best:
    all of it up to a tenth of the loop's steps, or one, and none from twice as many on.

    Args:
        steps: Any shape.
        total: Steps of the loop, T.
    """
    return np.clip(2 - steps / max(1, _STEADY * total), 0, 1).astype(np.float32)
