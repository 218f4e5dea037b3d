"""What the noise of quantised layers adds up to in the final latents, mode by mode of a plan.

Every full step rounds anew, and what it rounds off is much like noise: a fifth of it is like that
of the step before (`python -m benchmarks.quantisation_errors`), and less of those before that. A
step that reuses or forecasts goes on with the noise of the last full step; what a shallow step adds
of its own is left out (`plan_error` has it). So noise adds up by amplitude within a segment, with
the signs of the steps' influence, and by power over segments, but for what a segment's first step
has in common with the segment before. Where full steps take a share of forecasts, that is another
sum: `averaged_noise`.

A step that is full several times has the mean of its runs' noise. They are as alike as steps at no
distance would be (`python -m benchmarks.quantisation_errors`); what they do not have in common is
averaged, and what moving latents apart does beside that is not.
"""

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import REPEATED, Mode

ALIKE, FADING = 0.26, 0.73
"""The noise of full steps that lie d apart has the correlation ALIKE · FADING**d, as measured on
the demo model."""
MOVED = 1e-5
"""What the mean of runs on latents moved apart errs by beside noise, as a mean square: of the demo
model's late steps (the last errs by more, but little of what it does by noise). Where nothing is
rounded it is all that running again does."""


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
    shared = 2 * ALIKE * FADING**back * both
    return {
        Mode.FULL: anew + shared,
        **{mode: of_its_own + shared for mode, of_its_own in _repeated(anew, influence).items()},
        Mode.SHALLOW: goes_on,
        Mode.SKIP: goes_on,
        Mode.FULL_UNGUIDED: goes_on + one_branch(guidance_scale) * anew,
        Mode.SHALLOW_UNGUIDED: goes_on,
    }


def averaged_noise(
    own: NDArray[np.float64],
    influence: NDArray[np.float64],
    forecast_share: NDArray[np.floating],
) -> dict[Mode, NDArray[np.float64]]:
    """Returns, as `noise_by_mode` does, what steps add where full steps in a row average their
    noise away, which leaves little to cancel: all that a step has counts as new, and of a full step
    after a full one, both guided, as much as is not forecast.

    Args:
        own: (T,) mean squared errors of full steps.
        influence: (T,) of either sign: `noise_influence`.
        forecast_share: (T,) of each step, that of the next one, where both are full.
    """
    total = len(own)
    anew = np.broadcast_to((own * influence**2)[:, None], (total, total))
    full = anew.copy()
    if total > 1:
        full[1:, 1] *= (1 - forecast_share[:-1]) ** 2
    return dict.fromkeys(Mode, anew) | {Mode.FULL: full} | _repeated(full, influence)


def _repeated(
    once: NDArray[np.float64], influence: NDArray[np.float64]
) -> dict[Mode, NDArray[np.float64]]:
    """Returns what steps that are full several times add, were it (T, T) `once` of a single run."""
    moved = MOVED * influence[:, None] ** 2
    return {mode: left_of_runs(mode.runs) * once + moved for mode in REPEATED}


def left_of_runs(runs: int) -> float:
    """Returns the power of the noise that so many runs' mean has, of that of one run."""
    return ALIKE + (1 - ALIKE) / runs


def one_branch(guidance_scale: float) -> float:
    """Returns the power of one branch's noise, of that of the guided prediction."""
    return 1 / (guidance_scale**2 + (guidance_scale - 1) ** 2)
