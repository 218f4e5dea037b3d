"""Calibration: runs the graphs over prompts and measures what reuse costs.

Every prompt is run twice, with the full graph at every step. The first run compares the cached
features of every anchor step i and later step k = i + gap: their L1 distance (the paper's
objective) and the per-channel correction that maps one onto the other best. The second run also
predicts each step k with the shallow graph from every corrected feature i, and measures by how
much the guided noise prediction is wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cq_edge.correction import MomentAccumulator
from cq_edge.errors import CalibrationError
from cq_edge.influence import step_influence
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.reuse_table import ReuseTable

FullGraph = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ShallowGraph = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Prompt = tuple[Tensor, Tensor]
"""The (uncond, cond) embeddings of a prompt, each (1, 77, D)."""


@dataclass(frozen=True, slots=True, eq=False)
class StepSample:
    """What one prompt's guided branch saw at one step of the calibration run; batch 1.

    `latents` (1, 4, h, w) are scaled for the network, `embeddings` (1, 77, D),
    `anchor_feature` (1, C, h, w) is the cached feature `gap` steps earlier.
    """

    step: int
    gap: int
    timestep: float
    latents: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    anchor_feature: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The measured table, samples to check exported graphs with, and the final latents."""

    table: ReuseTable
    samples: tuple[StepSample, ...]
    final_latents: tuple[NDArray[np.float32], ...]


@torch.no_grad()
def capture(
    full: FullGraph,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    noise_scheduler: NoiseScheduler,
    latents_shape: tuple[int, int, int],
    *,
    guidance_scale: float = 7.5,
    max_gap: int = 10,
    seed: int = 0,
    sampled_steps: int = 4,
    on_step: Callable[[], object] = lambda: None,
) -> Calibration:
    """Runs every prompt through all steps and returns what was measured.

    Args:
        full: `FullUNet`, or anything that is called as it is; what will be exported, so that
            its quantisation is part of what is measured.
        shallow: Its `ShallowUNet`.
        prompts: The embeddings to calibrate with.
        noise_scheduler: Of T steps.
        latents_shape: (4, h, w).
        guidance_scale: 1.0 runs the guided branch alone.
        max_gap: The largest gap measured; cut to T - 1.
        seed: Of the initial noise; prompt n takes seed + n.
        sampled_steps: How many steps of each prompt go into `samples`, spread evenly.
        on_step: Called after each step of each prompt's two runs, for progress bars.

    Raises:
        CalibrationError: If there is no prompt, or a step gives something non-finite.
    """
    if not prompts:
        raise CalibrationError("calibration needs at least one prompt")
    total = len(noise_scheduler.timesteps)
    loop = _Loop(full, noise_scheduler, latents_shape, guidance_scale, seed)
    features = _FeatureRun(total, min(max_gap, total - 1), sampled_steps)
    for number, prompt in enumerate(prompts):
        for visit in loop.run(number, prompt):
            features.take(visit, prompt)
            on_step()
    gain, bias = features.corrections()
    squares = np.zeros((total, features.max_gap + 1))
    for number, prompt in enumerate(prompts):
        anchors: list[_Visit] = []
        for visit in loop.run(number, prompt):
            anchors = [*anchors, visit][-1 - features.max_gap :]
            for gap, anchor in enumerate(reversed(anchors[:-1]), start=1):
                pair = (anchor.step, gap)
                repaired = (torch.from_numpy(gain[pair]), torch.from_numpy(bias[pair]))
                reused = loop.shallow_prediction(shallow, visit, prompt, anchor, repaired)
                squares[pair] += float((reused - visit.noise_pred).square().mean())
            on_step()
    influence = step_influence(noise_scheduler)
    step = np.add.outer(np.arange(total), np.arange(features.max_gap + 1))
    weights = influence[np.minimum(step, total - 1)] ** 2
    errors = np.where(step < total, squares * weights / len(prompts), np.nan)
    table = ReuseTable(
        noise_scheduler=noise_scheduler.name,
        steps=noise_scheduler.steps,
        guidance_scale=guidance_scale,
        timesteps=np.asarray(noise_scheduler.timesteps, np.float32),
        noise_pred=errors,
        feature_l1=features.l1(),
        gain=gain,
        bias=bias,
    )
    return Calibration(table, tuple(features.samples), tuple(features.finals))


@dataclass(frozen=True, slots=True, eq=False)
class _Visit:
    """One step of one prompt: what the network saw and said, and the latents after it.

    `features` are the branches' cached features, each (1, C, h, w), the guided branch last.
    """

    step: int
    timestep: Tensor
    seen: Tensor
    noise_pred: Tensor
    features: tuple[Tensor, ...]
    after: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Loop:
    """The denoising loop with the full graph at every step."""

    full: FullGraph
    noise_scheduler: NoiseScheduler
    latents_shape: tuple[int, int, int]
    guidance_scale: float
    seed: int

    def run(self, number: int, prompt: Prompt) -> Iterator[_Visit]:
        """Runs prompt `number` through all steps."""
        latents = _noise((1, *self.latents_shape), self.seed + number)
        latents = latents * self.noise_scheduler.init_noise_sigma
        history: tuple[Tensor, ...] = ()
        for step, time in enumerate(self.noise_scheduler.timesteps):
            seen, timestep = self.noise_scheduler.model_input(latents, step), torch.tensor([time])
            # branch by branch, as the exported graphs run: activations are quantised per run
            runs = [self.full(seen, timestep, context) for context in self._branches(prompt)]
            noise_pred = self._guided([prediction for prediction, _ in runs])
            features = tuple(feature for _, feature in runs)
            _check_finite(number, step, noise_pred, features)
            latents, history = self.noise_scheduler.advance(latents, noise_pred, step, history)
            yield _Visit(step, timestep, seen, noise_pred, features, latents)

    def shallow_prediction(
        self,
        shallow: ShallowGraph,
        visit: _Visit,
        prompt: Prompt,
        anchor: _Visit,
        correction: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Returns the guided noise prediction at a visit that reuses an anchor's features."""
        branches = zip(self._branches(prompt), anchor.features, strict=True)
        return self._guided(
            [
                shallow(visit.seen, visit.timestep, context, feature, *correction)
                for context, feature in branches
            ]
        )

    def _branches(self, prompt: Prompt) -> Sequence[Tensor]:
        return prompt[1:] if self.guidance_scale == 1.0 else prompt

    def _guided(self, predictions: list[Tensor]) -> Tensor:
        if len(predictions) == 1:
            return predictions[0]
        uncond, cond = predictions
        return uncond + self.guidance_scale * (cond - uncond)


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


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


class _FeatureRun:
    """What the first run measures: of every (anchor, step) pair, and samples on the way."""

    def __init__(self, total: int, max_gap: int, sampled_steps: int) -> None:
        self.max_gap = max_gap
        self.samples: list[StepSample] = []
        self.finals: list[NDArray[np.float32]] = []
        self._total = total
        self._pairs = [
            [_PairSum() for _ in range(min(max_gap, total - 1 - i))] for i in range(total)
        ]
        self._kept = set(np.linspace(0, total - 1, sampled_steps).round().astype(int).tolist())
        self._recent: list[NDArray[np.float32]] = []  # of the last max_gap + 1 steps

    def take(self, visit: _Visit, prompt: Prompt) -> None:
        """Takes in the next step of a prompt's run."""
        if visit.step == 0:
            self._recent = []
        feature = torch.cat(visit.features).numpy()
        self._recent = [*self._recent, feature][-1 - self.max_gap :]
        for gap, anchor in enumerate(reversed(self._recent[:-1]), start=1):
            self._pairs[visit.step - gap][gap - 1].add(anchor, feature)
        if visit.step in self._kept:
            self._sample(visit, prompt)
        if visit.step == self._total - 1:
            self.finals.append(visit.after.numpy())

    def corrections(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns gain and bias, each (T, G+1, C); NaN beyond the last step."""
        channels = self._recent[0].shape[1]
        gain, bias = np.full((2, self._total, self.max_gap + 1, channels), np.nan, np.float32)
        gain[:, 0], bias[:, 0] = 1, 0
        for anchor, row in enumerate(self._pairs):
            for gap, pair in enumerate(row, start=1):
                fitted = pair.moments.fit()
                gain[anchor, gap], bias[anchor, gap] = fitted.gain, fitted.bias
        return gain, bias

    def l1(self) -> NDArray[np.float64]:
        """Returns (T, G+1) mean absolute differences; NaN beyond the last step."""
        errors = np.full((self._total, self.max_gap + 1), np.nan)
        errors[:, 0] = 0
        for anchor, row in enumerate(self._pairs):
            for gap, pair in enumerate(row, start=1):
                errors[anchor, gap] = pair.l1 / pair.count
        return errors

    def _sample(self, visit: _Visit, prompt: Prompt) -> None:
        gap = min(visit.step, 1 + len(self.samples) % max(1, self.max_gap))
        self.samples.append(
            StepSample(
                visit.step,
                gap,
                float(visit.timestep),
                visit.seen.numpy(),
                prompt[1].numpy(),
                self._recent[-1 - gap][-1:],
            )
        )


class _PairSum:
    """The sums over all prompts of one (anchor, step) pair."""

    def __init__(self) -> None:
        self.moments = MomentAccumulator()
        self.l1 = 0.0
        self.count = 0

    def add(self, anchor: NDArray[np.float32], later: NDArray[np.float32]) -> None:
        channels = anchor.shape[1]
        x, y = (np.moveaxis(f, 1, -1).reshape(-1, channels) for f in (anchor, later))
        self.moments.add(x, y)
        self.l1 += float(np.abs(y - x).mean(dtype=np.float64))
        self.count += 1
