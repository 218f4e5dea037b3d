"""How much an error in one step's noise prediction moves the final latents."""

import math

import numpy as np
from numpy.typing import NDArray

from cq_edge.noise_scheduler import NoiseScheduler

_NOISE_SPREAD, _REUSE_SPREAD, _COARSENESS = 0.04, 0.3, 0.1
"""Standard deviation of the data in the directions that an error takes, of latents that have 1 in
all: fresh noise lies across what pictures look like, errors of reuse along it; those of steps that
see much noise in coarse directions, whose spread is a tenth of that noise. Fitted to runs of
skips at a few places of the demo model's loop (`benchmarks.reuse_influence` draws such)."""
_NEIGHBOURS = (0.25, 0.5, 0.25)
SMALL = 2.0**-30
"""What to scale noise by in a loop that may clip."""


def step_influence(
    noise_scheduler: NoiseScheduler, spread: float | NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Returns (T,) ∂ final latents / ∂ noise prediction of step k, of either sign.

    Args:
        noise_scheduler: Of T steps; its update is linear in latents and predictions, where nothing
            is clipped.
        spread: Standard deviation s of Gaussian data, above 0; or (T,) of each step's error. Their
            denoiser answers latents that are off by d, at noise level sigma and unit signal, with
            noise that is off by d·sigma / (s² + sigma²), and so mends part of it; None leaves that
            out.
    """
    total = len(noise_scheduler.timesteps)
    # a trajectory per column: an error at its own step, so small that nothing is clipped
    predictions = SMALL * np.eye(total)
    latents, history = np.zeros(total), ()
    for step in range(total):
        prediction = predictions[step]
        if spread is not None:
            off = noise_scheduler.model_input(latents, step)
            prediction = prediction + off * _response(noise_scheduler, step, spread)
        latents, history = noise_scheduler.advance(latents, prediction, step, history)
    return latents / SMALL


def _response(
    noise_scheduler: NoiseScheduler, step: int, spread: float | NDArray[np.float64]
) -> float | NDArray[np.float64]:
    """Returns how far a denoiser of Gaussian data moves its prediction with its input."""
    sigma = noise_scheduler.sigmas[step]
    noise = sigma / (spread**2 + sigma**2)
    if noise_scheduler.prediction_type == "epsilon":
        return noise * math.hypot(1, sigma)
    return noise * (1 - spread**2)  # v is noise less sigma times the clean latents, both scaled


def noise_influence(noise_scheduler: NoiseScheduler) -> NDArray[np.float64]:
    """Returns (T,) the influence of noise that is new at every step, of either sign.

    A noise scheduler of many steps weighs its last predictions with changing signs: noise that
    two steps share may cancel.
    """
    return step_influence(noise_scheduler, _NOISE_SPREAD)


def noise_response(noise_scheduler: NoiseScheduler, step: int) -> float:
    """Returns how far a denoiser moves its prediction with noise in its input."""
    return float(_response(noise_scheduler, step, _NOISE_SPREAD))


def reuse_influence(noise_scheduler: NoiseScheduler) -> NDArray[np.float64]:
    """Returns (T,), 0 or more, the influence of an error that goes on from step to step: averaged
    over the neighbours, whose errors are alike."""
    sigmas = np.asarray(noise_scheduler.sigmas[: len(noise_scheduler.timesteps)])
    spread = np.hypot(_REUSE_SPREAD, _COARSENESS * sigmas)
    influence = np.pad(step_influence(noise_scheduler, spread), 1)
    smooth: NDArray[np.float64] = np.abs(np.convolve(influence, _NEIGHBOURS, "valid"))
    return smooth
