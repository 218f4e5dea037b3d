"""How far one way of making pictures is ahead of all others along the frontier, speed by speed."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cq_edge.metrics import mean_interval

Curve: TypeAlias = Sequence[tuple[float, NDArray[np.float64]]]
"""Points of (speed-up, (N,) quality of the same N captions), in any order."""


def margins(ours: Curve, others: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Returns by how much `ours` is ahead of the best other way at every speed of a point that
    `ours` reaches. Curves are taken as a plot draws them, straight between their points, so that
    nowhere is `ours` less ahead of one of them than at one of those speeds. Below its slowest point
    a curve is as good as there.

    Args:
        ours: One point or more.
        others: By name, each one point or more.

    Returns:
        A row per speed, slowest first: `loop_speedup`, `next`, the other way's name, the mean
        `difference` of paired captions and its `difference_ci`.
    """
    reached = max(speed for speed, _ in ours)
    speeds = {speed for curve in (ours, *others.values()) for speed, _ in curve}
    rows = []
    for speed in sorted(s for s in speeds if s <= reached):
        there = {
            name: _at(speed, curve) for name, curve in others.items() if _reaches(curve, speed)
        }
        if not there:
            continue
        name = max(there, key=lambda name: there[name].mean())
        ahead = _at(speed, ours) - there[name]
        rows.append(
            {
                "loop_speedup": speed,
                "next": name,
                "difference": float(ahead.mean()),
                "difference_ci": mean_interval(ahead),
            }
        )
    return rows


def _reaches(curve: Curve, speed: float) -> bool:
    return speed <= max(s for s, _ in curve)


def _at(speed: float, curve: Curve) -> NDArray[np.float64]:
    """Returns (N,) the quality of a curve at a speed that it reaches; of points of one speed the
    best counts."""
    best = dict(sorted(curve, key=lambda point: (point[0], point[1].mean())))
    speeds, qualities = zip(*best.items(), strict=True)
    by_caption = np.stack(qualities, axis=1)
    return np.array([np.interp(speed, speeds, quality) for quality in by_caption])
