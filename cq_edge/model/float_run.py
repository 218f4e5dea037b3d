"""How far features and predictions go on, fitted to the float graphs in their own loop.

Fitted to graphs that ship, whose layers round, forecasts would go on less the more of a change is
noise. That is best for the step itself; but what lags behind adds up where steps reuse, and noise
does not. How much of it a forecast carries on is known where plans are made (`plan_error`) and
where shares of forecasts are chosen (`forecast_share`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cq_edge.forecast import Weights, kept_over
from cq_edge.model.forecast_fit import ForecastRun
from cq_edge.model.trajectory import Loop, Prompt


class FloatRun(NamedTuple):
    """What the float loop gives: how far features, guided noise predictions and what the negative
    prompt changes of them go on; the mean squared errors that forecasts of the last two leave,
    (T, R+1) of skip and (T, U+1) of unguided steps; and the final latents of each prompt, every
    step full, (1, 4, h, w)."""

    feature_weight: Weights
    skip_weight: Weights
    unguided_weight: Weights
    skip: NDArray[np.float64]
    unguided: NDArray[np.float64]
    final_latents: tuple[NDArray[np.float32], ...]


def float_run(
    loop: Loop,
    prompts: Sequence[Prompt],
    furthest: tuple[int, int, int],
    on_step: Callable[[], object],
) -> FloatRun:
    """Runs every prompt with the full graph at every step, and fits.

    Args:
        loop: Of the float full graph.
        prompts: One or more.
        furthest: How many steps forecasts of features, predictions and what the negative prompt
            changes are to reach.
        on_step: Called after every step, for progress bars.

    Raises:
        CalibrationError: A step gives something non-finite.
    """
    total = len(loop.noise_scheduler.timesteps)
    features, predictions, differences = (ForecastRun(total, most) for most in furthest)
    finals = []
    for number, prompt in enumerate(prompts):
        for visit in loop.run(number, prompt):
            feature = torch.cat(loop.with_guided(visit.features))
            added = (loop.guidance_scale - 1) * visit.difference
            features.take(visit.step, feature.numpy())
            predictions.take(visit.step, visit.noise_pred.numpy())
            differences.take(visit.step, added.numpy())
            on_step()
        finals.append(visit.after.numpy())
    skip, unguided = predictions.weights(), differences.weights()
    return FloatRun(
        _held_back(features.weights()),
        skip,
        unguided,
        predictions.left(skip) / len(prompts),
        differences.left(unguided) / len(prompts),
        tuple(finals),
    )


def _held_back(weights: Weights) -> Weights:
    """Returns weights of features that go on less over many steps, and no further than a line: at
    the loop's last steps, where features change ever faster, what fits best goes twice as far, and
    multiplies the noise of the layers that ship by as much."""
    back, gap = np.ogrid[: weights.shape[1], : weights.shape[2]]
    line = gap / np.maximum(back, 1)
    return np.minimum(weights, line.astype(np.float32)) * kept_over(back, len(weights))
