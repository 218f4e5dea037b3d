"""How much an error in one step's noise prediction moves the final latents."""

import numpy as np
from numpy.typing import NDArray

from cq_edge.noise_scheduler import NoiseScheduler

_SMALL = 2.0**-30
_SPREAD = 0.5
"""Standard deviation of latents around what a prompt leaves open; scaled latents have 1 in all."""


def step_influence(noise_scheduler: NoiseScheduler) -> NDArray[np.float64]:
    """Returns (T,) |∂ final latents / ∂ noise prediction of step k|.

    Exact for the noise scheduler alone, whose update is linear in latents and predictions (where
    nothing is clipped); what the denoiser makes of latents that are a little off is left out.
    """
    total = len(noise_scheduler.timesteps)
    # a trajectory per column: an error at its own step, so small that nothing is clipped
    predictions = _SMALL * np.eye(total)
    latents, history = np.zeros(total), ()
    for step in range(total):
        latents, history = noise_scheduler.advance(latents, predictions[step], step, history)
    return np.abs(latents) / _SMALL


def mended_influence(noise_scheduler: NoiseScheduler) -> NDArray[np.float64]:
    """Returns (T,) the influence that is left once the denoiser has mended what it can.

    Where data are Gaussian of spread s, latents at noise level sigma keep s / sqrt(s² + sigma²) of
    a small displacement to the end (the probability flow, Song et al. 2021).
    """
    sigmas = np.array(noise_scheduler.sigmas)
    kept = _SPREAD / np.hypot(_SPREAD, sigmas)
    mended: NDArray[np.float64] = step_influence(noise_scheduler) * kept
    return mended
