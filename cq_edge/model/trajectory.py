"""The denoising loop as calibration runs it: with the full graph at every step, watched."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cq_edge.errors import CalibrationError
from cq_edge.noise_scheduler import NoiseScheduler

FullGraph = Callable[..., tuple[Tensor, Tensor]]
"""Of latents, timestep and context, as `split.FullUNet` is."""
Context = tuple[Tensor, ...]
"""What a denoiser is told beside latents and timestep; see `split`."""
Prompt = tuple[Context, Context]
"""The contexts of the negative prompt and of a prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """One step of one prompt: what the network saw and said, and the latents after it.

    `seen` are the latents before it, scaled for the network. `features` are the branches' cached
    features, each (1, C, h, w), the guided branch last; `difference` is what the branches'
    predictions differ by, 0 where there is one branch.
    """

    step: int
    timestep: Tensor
    seen: Tensor
    noise_pred: Tensor
    difference: Tensor
    features: tuple[Tensor, ...]
    after: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Loop:
    """A full graph, how its predictions become latents, and the seed of the first noise."""

    full: FullGraph
    noise_scheduler: NoiseScheduler
    latents_shape: tuple[int, int, int]
    guidance_scale: float
    seed: int = 0

    def run(self, number: int, prompt: Prompt) -> Iterator[Visit]:
        """Runs prompt `number` through all steps; its noise is of seed + number.

        Raises:
            CalibrationError: A step gives something non-finite.
        """
        noise = _noise((1, *self.latents_shape), self.seed + number)
        latents, history = next(noise) * self.noise_scheduler.init_noise_sigma, ()
        for step in range(len(self.noise_scheduler.timesteps)):
            timestep = torch.tensor([self.noise_scheduler.timesteps[step]])
            seen = self.noise_scheduler.model_input(latents, step)
            # branch by branch, as the exported graphs run: activations are quantised per run
            runs = [self.full(seen, timestep, *context) for context in self.branches(prompt)]
            predictions = [prediction for prediction, _ in runs]
            noise_pred, difference = self.guided(predictions), predictions[-1] - predictions[0]
            features = tuple(feature for _, feature in runs)
            _check_finite(number, step, noise_pred, features)
            latents, history = self.noise_scheduler.advance(latents, noise_pred, step, history)
            if self.noise_scheduler.fresh_noise[step]:
                latents = latents + self.noise_scheduler.fresh_noise[step] * next(noise)
            yield Visit(step, timestep, seen, noise_pred, difference, features, latents)

    def branches(self, prompt: Prompt) -> Sequence[Context]:
        """Returns the contexts that are run."""
        return prompt[1:] if self.guidance_scale == 1.0 else prompt

    def guided(self, predictions: list[Tensor]) -> Tensor:
        """Returns the guided noise prediction of the branches'."""
        if len(predictions) == 1:
            return predictions[0]
        uncond, cond = predictions
        return uncond + self.guidance_scale * (cond - uncond)

    def with_guided(self, of_branches: Sequence[Tensor]) -> list[Tensor]:
        """Returns what there is of each branch, and with guidance their guided combination.

        Guidance multiplies what branches differ by, and with it what is fitted to the branches
        alone leaves of that. So their combination is fitted too.
        """
        found = list(of_branches)
        return [*found, self.guided(found)] if len(found) > 1 else found


def mean_square(x: Tensor) -> float:
    """Returns the mean of the squares."""
    return float(x.square().mean())


def _check_finite(number: int, step: int, noise_pred: Tensor, features: tuple[Tensor, ...]) -> None:
    for feature in features:
        finite = torch.isfinite(feature).all(dim=(0, 2, 3))
        if not finite.all():
            raise CalibrationError(
                f"prompt {number}, step {step}: channel {int(finite.int().argmin())} of the "
                "cached feature is not finite"
            )
    if not torch.isfinite(noise_pred).all():
        raise CalibrationError(
            f"prompt {number}, step {step}: the denoiser gave a non-finite prediction"
        )


def _noise(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
