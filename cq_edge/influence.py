"""How much an error in one step's noise prediction moves the final latents."""

import numpy as np
from numpy.typing import NDArray

from cq_edge.noise_scheduler import NoiseScheduler

_NOISE_SPREAD, _REUSE_SPREAD = 0.05, 1.0
"""Standard deviation of the data in the directions that an error takes, of latents that have 1 in
all: fresh noise lies across what pictures look like, errors of reuse along it."""
_NEIGHBOURS = (0.25, 0.5, 0.25)


def step_influence(
    noise_scheduler: NoiseScheduler, spread: float | None = None
) -> NDArray[np.float64]:
    """Returns (T,) ∂ final latents / ∂ noise prediction of step k, of either sign.

    Args:
        noise_scheduler: Of T steps; its update is linear in latents and predictions.
        spread: Standard deviation s of Gaussian data, above 0. Their denoiser answers latents
            that are off by d, at noise level sigma and unit signal, with a prediction that is off
            by d·sigma / (s² + sigma²), and so mends part of it; None leaves that out.
    """
    total = len(noise_scheduler.timesteps)
    predictions = np.eye(total)  # a trajectory per column: 1 at its own step, 0 elsewhere
    latents, history = np.zeros(total), ()
    for step, sigma in enumerate(noise_scheduler.sigmas):
        prediction = predictions[step]
        if spread is not None:
            off = noise_scheduler.model_input(latents, step) * np.hypot(1, sigma)
            prediction = prediction + off * sigma / (spread**2 + sigma**2)
        latents, history = noise_scheduler.advance(latents, prediction, step, history)
    return latents


def noise_influence(noise_scheduler: NoiseScheduler) -> NDArray[np.float64]:
    """Returns (T,) the influence of noise that is new at every step, of either sign.

    A noise scheduler of many steps weighs its last predictions with changing signs: noise that
    two steps share may cancel.
    """
    return step_influence(noise_scheduler, _NOISE_SPREAD)


def reuse_influence(noise_scheduler: NoiseScheduler) -> NDArray[np.float64]:
    """Returns (T,), 0 or more, the influence of an error that goes on from step to step: averaged
    over the neighbours, whose errors are alike."""
    influence = np.pad(step_influence(noise_scheduler, _REUSE_SPREAD), 1)
    smooth: NDArray[np.float64] = np.abs(np.convolve(influence, _NEIGHBOURS, "valid"))
    return smooth
