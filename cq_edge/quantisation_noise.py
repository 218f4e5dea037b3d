"""What the noise of quantised layers adds up to in the final latents, mode by mode of a plan.

Every full step rounds anew, and what it rounds off is much like noise: a fifth of it is like that
of the step before (`python -m benchmarks.quantisation_errors`), and less of those before that. A
step that reuses or forecasts goes on with the noise of the last full step; what a shallow step adds
of its own is left out (`plan_error` has it). So noise adds up by amplitude within a segment, with
the signs of the steps' influence, and by power over segments, but for what a segment's first step
has in common with the segment before.
"""

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import Mode

ALIKE, FADING = 0.26, 0.73
"""The noise of full steps that lie d apart has the correlation ALIKE · FADING**d, as measured on
the demo model."""


def noise_by_mode(
    own: NDArray[np.float64], influence: NDArray[np.float64], guidance_scale: float
) -> dict[Mode, NDArray[np.float64]]:
    """Returns for each mode (T, T) what step k adds to the mean squared error of the final latents
    where the last guided full step was d steps before, at [k, d]; below 0 where it cancels.

    Args:
        own: (T,) mean squared errors of full steps.
        influence: (T,) of either sign: `noise_influence`.
        guidance_scale: Multiplies the noise of both branches; a step without the negative prompt
            has new noise of the other branch alone.
    """
    total = len(own)
    back = np.arange(total)
    source = np.maximum(np.subtract.outer(back, back), 0)
    reach = np.concatenate([[0.0], np.cumsum(influence)])
    before = reach[:total, None] - reach[source]
    goes_on = own[source] * ((before + influence[:, None]) ** 2 - before**2)
    anew = np.broadcast_to((own * influence**2)[:, None], (total, total))
    both = np.sqrt(own[:, None] * own[source]) * influence[:, None] * before
    return {
        Mode.FULL: anew + 2 * ALIKE * FADING**back * both,
        Mode.SHALLOW: goes_on,
        Mode.SKIP: goes_on,
        Mode.FULL_UNGUIDED: goes_on + one_branch(guidance_scale) * anew,
        Mode.SHALLOW_UNGUIDED: goes_on,
    }


def forecast_share(
    noise_pred: NDArray[np.float64],
    forecast: NDArray[np.float64],
    common: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Returns (T, G+1) float32, 0 to 1, as `ReuseTable.forecast_share`: the share of least squared
    error. What a full step's graph errs by is noise that is new, or much of it; what its forecast
    errs by is the noise of the steps before, what has changed since, and what reuse adds to the
    last of them.

    Args:
        noise_pred: (T, G+1) mean squared errors of steps i + g that reuse step i.
        forecast: (T,) those of each step's forecast, from the two full steps before.
        common: (T,) the mean product of a full step's error with that of its forecast.
    """
    share = np.zeros(noise_pred.shape, np.float32)
    for anchor, gap in np.ndindex(noise_pred.shape):
        step = anchor + gap + 1
        if step < len(noise_pred):
            reused = max(noise_pred[anchor, gap] - noise_pred[step - 1, 0], 0)
            mended = noise_pred[step, 0] - common[step]
            apart = mended + forecast[step] + reused - common[step]
            share[anchor, gap] = np.clip(mended / apart, 0, 1) if apart > 0 else 0
    return share


def one_branch(guidance_scale: float) -> float:
    """Returns the power of one branch's noise, of that of the guided prediction."""
    return 1 / (guidance_scale**2 + (guidance_scale - 1) ** 2)
