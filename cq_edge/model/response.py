"""Measures how much an error at one step is still worth in the final latents.

The noise scheduler alone would carry every error to the end. The denoiser sees what an error has
done to the latents and mends much of it, early errors most; one of PNDM's last steps can grow
(it weighs a new prediction more than twice).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cq_edge.forecast import Forecast
from cq_edge.influence import step_influence
from cq_edge.model.trajectory import Loop, Prompt, Visit, mean_square

_LAST_STEPS, _STRIDE = 5, 8  # of the steps that are tried: all of the last, then every so many
_LEAST = 1e-12
_MEASURED_SHARE = 0.25
"""The weight of what was measured against the noise scheduler's own, in logarithms: chosen by trial
on the demo model, where small shares did best and neither 0 nor 0.5 did."""


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What a loop makes of prompts, and of errors.

    Attributes:
        influence: (T,) what a mean squared error at each step adds to the final latents' error.
        finals: Of each prompt the final latents, every step full.
    """

    influence: NDArray[np.float64]
    finals: tuple[Tensor, ...]

    def distance(self, other: "Response") -> float:
        """Returns the mean squared difference of the final latents of the same prompts."""
        pairs = list(zip(self.finals, other.finals, strict=True))
        return sum(mean_square(mine - theirs) for mine, theirs in pairs) / len(pairs)


@torch.no_grad()
def measure_response(
    loop: Loop, prompts: Sequence[Prompt], on_step: Callable[[], object] = lambda: None
) -> Response:
    """Returns how the final latents respond to an error at each step.

    Tries a forecast in place of the prediction at some steps, one at a time, and goes on with the
    full graph. One error alone is mended better than many in a row, between which the denoiser
    does not run, and a few prompts do not show that an early error now and then tips a picture
    into another. What is returned is therefore a weighted geometric mean of what was measured
    and of what the noise scheduler alone would make of it.

    Args:
        loop: With a float denoiser: dynamic quantisation would drown small errors in its noise.
        prompts: One or more.
        on_step: Called after every step that is run, for progress bars.
    """
    alone = step_influence(loop.noise_scheduler) ** 2
    tried = tried_steps(len(alone))
    measured, finals = np.zeros(len(tried)), []
    for number, prompt in enumerate(prompts):
        visits = []
        for visit in loop.run(number, prompt):
            visits.append(visit)
            on_step()
        finals.append(visits[-1].after)
        for index, step in enumerate(tried):
            measured[index] += _response(loop, number, prompt, visits, step, on_step)
    kept = measured / len(prompts) / np.maximum(alone[tried], _LEAST)
    logs = np.interp(np.arange(len(alone)), tried, np.log(np.maximum(kept, _LEAST)))
    influence: NDArray[np.float64] = alone * np.exp(_MEASURED_SHARE * logs)
    return Response(influence, tuple(finals))


def tried_steps(step_count: int) -> list[int]:
    """Returns the steps at which errors are tried, rising: all of the last ones, fewer before."""
    last = range(max(1, step_count - _LAST_STEPS), step_count)
    before = range(last.start - _STRIDE, 0, -_STRIDE)
    return sorted({min(1, step_count - 1), *before, *last})


def _response(
    loop: Loop,
    number: int,
    prompt: Prompt,
    visits: Sequence[Visit],
    step: int,
    on_step: Callable[[], object],
) -> float:
    """Returns the final latents' mean squared error over that of a step's prediction."""
    visit, sigmas = visits[step], loop.noise_scheduler.sigmas
    line = Forecast()
    for earlier in visits[max(0, step - 3) : step]:
        line = line.after(sigmas[earlier.step], earlier.noise_pred)
    wrong = visit.noise_pred if step == 0 else line.at(sigmas[step])
    latents, history = loop.noise_scheduler.advance(visit.before, wrong, step, visit.history)
    for later in loop.resume(number, prompt, step + 1, latents, history):
        latents = later.after
        on_step()
    made = mean_square(wrong - visit.noise_pred)
    return mean_square(latents - visits[-1].after) / max(made, _LEAST)
