"""By how many points of CLIP score pictures differ from float32's."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.metrics import mean_interval, trimmed_mean

_TRIM = 0.01
"""Of the captions, at either end, what a trimmed difference leaves out: a few that tip into another
picture, whose scores then differ by ten and more points to either side."""


def clip_difference(deltas: NDArray[np.float64]) -> dict[str, Any]:
    """Returns the mean of (N,) differences of paired captions and the mean without the captions at
    either end, which says nothing of those that tip, each with its interval. Of fewer than 100
    captions none would be left out, and there is no trimmed mean.
    """
    trims = int(_TRIM * len(deltas)) > 0
    return {
        "clip_delta": float(deltas.mean()),
        "clip_delta_ci": mean_interval(deltas),
        "clip_delta_trimmed": trimmed_mean(deltas, _TRIM) if trims else None,
        "clip_delta_trimmed_ci": mean_interval(deltas, trim=_TRIM) if trims else None,
    }
