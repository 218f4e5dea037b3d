"""What each half of the correction gains, over the same captions, speed by speed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.metrics import mean_interval

HALVES = ("cache", "quantisation", "both")
"""Of the correction, as keys of a row begin."""
_STEPS = {
    "the paper's": {
        "cache": ("naive", "naive, cache half"),
        "quantisation": ("naive, cache half", "naive, corrected"),
        "both": ("naive", "naive, corrected"),
    },
    "ours": {
        "cache": ("ours, quantisation alone", "ours"),
        "quantisation": ("ours, cache half alone", "ours"),
        "both": ("ours, no correction", "ours"),
    },
}
"""Of each schedule the ways without and with a half: on the paper's in the paper's order, on ours
each beside the other."""


def gains(ways: Mapping[str, tuple[float, NDArray[np.float64]]]) -> list[dict[str, Any]]:
    """Returns what the halves gain on the paper's schedule and on ours.

    Args:
        ways: By name, the speed-up and the (N,) PSNR in dB of the same N captions; a schedule whose
            ways are not all there is left out.

    Returns:
        A row per schedule: `schedule`, `loop_speedup` of the way with both, `captions`, and for
        `cache`, `quantisation` and `both` the mean gain, `<half>_db`, and its `<half>_db_ci`.
    """
    rows = []
    for schedule, steps in _STEPS.items():
        if not all(name in ways for pair in steps.values() for name in pair):
            continue
        speedup, qualities = ways[steps["both"][1]]
        row = {"schedule": schedule, "loop_speedup": speedup, "captions": len(qualities)}
        for half, (without, having) in steps.items():
            gained = ways[having][1] - ways[without][1]
            row |= {f"{half}_db": float(gained.mean()), f"{half}_db_ci": mean_interval(gained)}
        rows.append(row)
    return rows


def gain_cell(row: Mapping[str, Any], half: str) -> str:
    """Returns a half's gain with its interval, to be read."""
    low, high = row[f"{half}_db_ci"]
    return f"{row[f'{half}_db']:+.2f} ({low:+.2f} to {high:+.2f})"
