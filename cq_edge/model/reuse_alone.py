"""What reuse alone errs by, without quantisation: the float graphs, in their own loop.

What the graphs that ship err by where they reuse is mostly noise at late steps: of the layers at
the steps that a forecast is made from, and of latents that noise has moved, which a forecast does
not answer to. `plan_error` follows that noise through a plan's own steps: it must not count twice.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cq_edge.forecast import Weights
from cq_edge.model.forecast_fit import ForecastRun
from cq_edge.model.reuse_trial import Corrections, ShallowGraph, reusing, visits
from cq_edge.model.trajectory import Loop, Prompt, mean_square


class ReuseAlone(NamedTuple):
    """Mean squared errors of the guided noise prediction, 0 in column 0 and beyond the last step:
    (T, G+1) of shallow, (T, R+1) of skip and (T, U+1) of unguided steps; and the final latents of
    each prompt, every step full, (1, 4, h, w)."""

    shallow: NDArray[np.float64]
    skip: NDArray[np.float64]
    unguided: NDArray[np.float64]
    final_latents: tuple[NDArray[np.float32], ...]


def reuse_alone(
    loop: Loop,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    weights: tuple[Weights, Weights, Weights],
    halves: tuple[Corrections, Corrections],
    on_step: Callable[[], object],
) -> ReuseAlone:
    """Returns what forecasts and corrections leave, and where the float loop ends.

    Args:
        loop: Of the float full graph.
        shallow: The float shallow graph.
        prompts: One or more.
        weights: How far features, noise predictions and what the negative prompt changes are
            forecast to go on, as they ship.
        halves: The cache correction that ships, and of the other half, which float layers do not
            need, the identity.
        on_step: Called after every step that is run, for progress bars.
    """
    feature, skip, unguided = weights
    total, columns = halves[0].gain.shape[:2]
    squares = np.zeros((total, columns))
    predictions, differences = (ForecastRun(total, w.shape[2] - 1) for w in (skip, unguided))
    finals = []
    for number, visit, earlier in visits(loop, prompts, columns - 1, on_step):
        truth, added = visit.noise_pred, (loop.guidance_scale - 1) * visit.difference
        for run, value in ((predictions, truth.numpy()), (differences, added.numpy())):
            run.take(visit.step, value, value)
        tried = reusing(loop, shallow, prompts[number], visit, earlier, feature, halves)
        for anchor, reused in tried:
            squares[anchor, visit.step - anchor] += mean_square(reused - truth)
        if visit.step == total - 1:
            finals.append(visit.after.numpy())
    left = predictions.products.left(skip), differences.products.left(unguided)
    for computed in (squares, *left):
        computed[:, 0] = 0  # but for rounding
        computed /= len(prompts)
    return ReuseAlone(squares, *left, tuple(finals))
