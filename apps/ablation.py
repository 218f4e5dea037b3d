"""What each half of the correction gains, over the same captions, speed by speed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.metrics import mean_interval

GAINS = {"cache": "cache half", "quantisation": "quantisation half", "both": "both halves"}
"""By how a row's keys begin, what it tells the gain of."""
ORDER = (
    "the paper's: the cache half alone, the quantisation half after it; ours: each half beside the "
    "other"
)
_PAIRS = {
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
"""Of each schedule the ways without and with what is gained by, as `ORDER` says."""
PARTIAL = frozenset(without for pairs in _PAIRS.values() for without, _ in pairs.values())
"""The ways of these that lack a half of the correction, or both: drawn for the ablation alone."""


def gains(ways: Mapping[str, tuple[float, NDArray[np.float64]]]) -> list[dict[str, Any]]:
    """Returns what the halves gain on the paper's schedule and on ours.

    Args:
        ways: By name, the speed-up and the (N,) PSNR in dB of the same N captions; a schedule whose
            ways are not all there is left out.

    Returns:
        A row per schedule: `schedule`, `loop_speedup` of the way with both halves, `captions`, and
        of each of `GAINS` the mean, `<gain>_db`, and its interval, `<gain>_db_ci`.
    """
    rows = []
    for schedule, pairs in _PAIRS.items():
        if not all(name in ways for pair in pairs.values() for name in pair):
            continue
        speedup, qualities = ways[pairs["both"][1]]
        row = {"schedule": schedule, "loop_speedup": speedup, "captions": len(qualities)}
        for gain, (without, having) in pairs.items():
            gained = ways[having][1] - ways[without][1]
            row |= {f"{gain}_db": float(gained.mean()), f"{gain}_db_ci": mean_interval(gained)}
        rows.append(row)
    return rows


def gain_cell(row: Mapping[str, Any], gain: str) -> str:
    """Returns one of a row's `GAINS` with its interval, to be read."""
    low, high = row[f"{gain}_db_ci"]
    return f"{row[f'{gain}_db']:+.2f} ({low:+.2f} to {high:+.2f})"
