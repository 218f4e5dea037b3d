"""A tensor as indices into a small table of values, which Core ML calls a palette."""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 40
_BINS = 4


def palette(
    values: NDArray[np.generic], bits: int
) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
    """Returns the table of 2^bits values, rising, that leaves about the least squared error, and
    the flat index of the nearest one for each value.

    Args:
        values: Any shape; taken as float16, of which there are few enough to count.
        bits: 1 to 8.

    Source: Lloyd 1982, started where Panter and Dite 1951 put the levels: as dense as the cube
    root of the values' own density.
    """
    flat = values.astype(np.float16).reshape(-1)
    distinct, position, counts = np.unique(flat, return_inverse=True, return_counts=True)
    points = distinct.astype(np.float64)
    # sums over distinct values up to each one, so that a cell's mean is two look-ups
    number = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    total = np.concatenate([[0], np.cumsum(counts * points)])
    levels = _first_levels(points, counts, 1 << bits)
    for _ in range(_ROUNDS):
        edges = _edges(points, levels)
        held = np.diff(number[edges])
        sums = np.diff(total[edges])
        levels = np.where(held > 0, sums / np.maximum(held, 1), levels)
    levels = np.sort(levels).astype(np.float16)
    nearest = np.repeat(np.arange(1 << bits), np.diff(_edges(points, levels.astype(np.float64))))
    return levels.astype(values.dtype), nearest[position.reshape(-1)].astype(np.uint8)


def _first_levels(
    points: NDArray[np.float64], counts: NDArray[np.intp], count: int
) -> NDArray[np.float64]:
    """Returns levels as dense as the cube root of the values' density."""
    bins = round(_BINS * float(np.cbrt(counts.sum())))  # Rice's rule, finer
    histogram, borders = np.histogram(points, bins=bins, weights=counts)
    share = np.concatenate([[0], np.cumsum(np.cbrt(histogram))])
    wanted = (np.arange(count) + 0.5) / count * share[-1]
    levels: NDArray[np.float64] = np.interp(wanted, share, borders)
    return levels


def _edges(points: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.intp]:
    """Returns where each level's cell of the sorted points begins, and the end."""
    middle = (levels[1:] + levels[:-1]) / 2
    inner = np.searchsorted(points, middle)
    return np.concatenate([[0], inner, [len(points)]])
