"""Calibration: runs the full graph over prompts and measures what reuse would cost.

For every anchor step i and later step k = i + gap, it compares the cached features of the two
steps on the same trajectory: their L1 distance (the paper's objective) and the per-channel
correction that maps one onto the other best.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cq_edge.correction import MomentAccumulator
from cq_edge.errors import CalibrationError
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.reuse_table import ReuseTable

FullGraph = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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
    embeddings: Sequence[tuple[Tensor, Tensor]],
    noise_scheduler: NoiseScheduler,
    latents_shape: tuple[int, int, int],
    *,
    guidance_scale: float = 7.5,
    max_gap: int = 10,
    seed: int = 0,
    sampled_steps: int = 4,
    on_step: Callable[[], object] = lambda: None,
) -> Calibration:
    """Runs every prompt through all steps with `full` and returns what was measured.

    Args:
        full: `FullUNet`, or anything that is called as it is.
        embeddings: For each prompt the (uncond, cond) embeddings, each (1, 77, D).
        noise_scheduler: Of T steps.
        latents_shape: (4, h, w).
        guidance_scale: 1.0 runs the guided branch alone.
        max_gap: The largest gap measured; cut to T - 1.
        seed: Of the initial noise; prompt n takes seed + n.
        sampled_steps: How many steps of each prompt go into `samples`, spread evenly.
        on_step: Called after each step of each prompt, for progress bars.

    Raises:
        CalibrationError: If there is no prompt, or a step gives a non-finite prediction.
    """
    if not embeddings:
        raise CalibrationError("calibration needs at least one prompt")
    total = len(noise_scheduler.timesteps)
    max_gap = min(max_gap, total - 1)
    sums = [[_PairSum() for _ in range(min(max_gap, total - 1 - i))] for i in range(total)]
    kept = set(np.linspace(0, total - 1, sampled_steps).round().astype(int).tolist())
    samples: list[StepSample] = []
    finals: list[NDArray[np.float32]] = []
    for number, (uncond, cond) in enumerate(embeddings):
        context = cond if guidance_scale == 1.0 else torch.cat([uncond, cond])
        noise = _noise((1, *latents_shape), seed + number) * noise_scheduler.init_noise_sigma
        features: list[NDArray[np.float32]] = []
        for visit in _trajectory(full, context, noise_scheduler, noise, guidance_scale, number):
            step = visit.step
            features.append(visit.feature)
            for gap in range(1, min(max_gap, step) + 1):
                sums[step - gap][gap - 1].add(features[step - gap], features[step])
            if step in kept:
                gap = min(step, 1 + len(samples) % max(1, max_gap))
                samples.append(visit.sample(gap, cond, features[step - gap]))
            if step >= max_gap:
                features[step - max_gap] = visit.feature[:0]  # no later step looks so far back
            on_step()
        finals.append(visit.after.numpy())
    table = _table(sums, max_gap, noise_scheduler, guidance_scale)
    return Calibration(table, tuple(samples), tuple(finals))


@dataclass(frozen=True, slots=True, eq=False)
class _Visit:
    """One step of one prompt: what the network saw, its feature, and the latents after it."""

    step: int
    timestep: float
    seen: Tensor
    feature: NDArray[np.float32]
    after: Tensor

    def sample(self, gap: int, cond: Tensor, anchor: NDArray[np.float32]) -> StepSample:
        """Returns the guided branch's record, with the feature of `gap` steps earlier."""
        return StepSample(
            self.step, gap, self.timestep, self.seen.numpy(), cond.numpy(), anchor[-1:]
        )


def _trajectory(
    full: FullGraph,
    context: Tensor,
    noise_scheduler: NoiseScheduler,
    latents: Tensor,
    guidance_scale: float,
    number: int,
) -> Iterator[_Visit]:
    """Runs one prompt through all steps; `context` holds the branches, guided last."""
    history: tuple[Tensor, ...] = ()
    for step, timestep in enumerate(noise_scheduler.timesteps):
        seen = noise_scheduler.model_input(latents, step)
        noise_pred, feature = full(
            seen.expand(len(context), -1, -1, -1), torch.tensor([timestep]), context
        )
        if not bool(torch.isfinite(noise_pred).all() and torch.isfinite(feature).all()):
            raise CalibrationError(
                f"prompt {number}, step {step}: the denoiser gave a non-finite prediction"
            )
        if len(context) == 2:
            noise_pred = noise_pred[:1] + guidance_scale * (noise_pred[1:] - noise_pred[:1])
        latents, history = noise_scheduler.advance(latents, noise_pred, step, history)
        yield _Visit(step, float(timestep), seen, feature.numpy(), latents)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


class _PairSum:
    """Everything measured of one (anchor, step) pair over all prompts."""

    def __init__(self) -> None:
        self._moments = MomentAccumulator()
        self._l1 = 0.0
        self._count = 0

    def add(self, anchor: NDArray[np.float32], later: NDArray[np.float32]) -> None:
        channels = anchor.shape[1]
        x, y = (np.moveaxis(f, 1, -1).reshape(-1, channels) for f in (anchor, later))
        self._moments.add(x, y)
        self._l1 += float(np.abs(y - x).mean(dtype=np.float64))
        self._count += 1

    def l1(self) -> float:
        return self._l1 / self._count

    def correction(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        fitted = self._moments.fit()
        return fitted.gain, fitted.bias


def _table(
    sums: list[list[_PairSum]], max_gap: int, noise_scheduler: NoiseScheduler, guidance_scale: float
) -> ReuseTable:
    total = len(sums)
    channels = len(sums[0][0].correction()[0]) if sums[0] else 1
    errors = np.full((total, max_gap + 1), np.nan)
    errors[:, 0] = 0.0
    gain = np.ones((total, max_gap + 1, channels), np.float32)
    bias = np.zeros_like(gain)
    for anchor, row in enumerate(sums):
        for gap, pair in enumerate(row, start=1):
            errors[anchor, gap] = pair.l1()
            gain[anchor, gap], bias[anchor, gap] = pair.correction()
    return ReuseTable(
        noise_scheduler=noise_scheduler.name,
        steps=noise_scheduler.steps,
        guidance_scale=guidance_scale,
        objective="feature_l1",
        timesteps=np.asarray(noise_scheduler.timesteps, np.float32),
        errors=errors,
        gain=gain,
        bias=bias,
    )
