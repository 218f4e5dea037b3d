"""Calibration: runs the full graph over prompts and measures what reuse would cost.

For every anchor step i and later step k = i + gap, it compares the cached features of the two
steps on the same trajectory: their L1 distance (the paper's objective) and the per-channel
correction that maps one onto the other best.
"""

from collections.abc import Callable, Sequence
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
        max_gap: The largest gap measured; cut to T − 1.
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
    sums: list[list[_PairSum]] = [
        [_PairSum() for _ in range(min(max_gap, total - 1 - i))] for i in range(total)
    ]
    kept = set(np.linspace(0, total - 1, sampled_steps).round().astype(int).tolist())
    samples: list[StepSample] = []
    finals: list[NDArray[np.float32]] = []
    for number, (uncond, cond) in enumerate(embeddings):
        noise = np.random.Generator(np.random.PCG64(seed + number)).standard_normal(
            (1, *latents_shape), dtype=np.float32
        )
        latents = torch.from_numpy(noise) * noise_scheduler.init_noise_sigma
        history: tuple[Tensor, ...] = ()
        features: list[NDArray[np.float32]] = []
        guided = guidance_scale != 1.0
        context = torch.cat([uncond, cond]) if guided else cond
        for step, timestep in enumerate(noise_scheduler.timesteps):
            scaled = noise_scheduler.model_input(latents, step)
            batch = scaled.expand(len(context), -1, -1, -1)
            noise_pred, feature = full(batch, torch.tensor([timestep]), context)
            if not bool(torch.isfinite(noise_pred).all() and torch.isfinite(feature).all()):
                raise CalibrationError(
                    f"prompt {number}, step {step}: the denoiser gave a non-finite prediction"
                )
            features.append(feature.numpy())
            for gap in range(1, min(max_gap, step) + 1):
                sums[step - gap][gap - 1].add(features[step - gap], features[step])
            if step in kept:
                gap = min(step, 1 + len(samples) % max_gap) if max_gap else 0
                samples.append(
                    StepSample(
                        step,
                        gap,
                        float(timestep),
                        scaled.numpy(),
                        cond.numpy(),
                        features[step - gap][-1:],
                    )
                )
            if guided:
                noise_pred = noise_pred[:1] + guidance_scale * (noise_pred[1:] - noise_pred[:1])
            latents, history = noise_scheduler.advance(latents, noise_pred, step, history)
            if step >= max_gap:
                features[step - max_gap] = features[step][:0]  # no later step looks so far back
            on_step()
        finals.append(latents.numpy())
    table = _table(sums, max_gap, noise_scheduler, guidance_scale)
    return Calibration(table, tuple(samples), tuple(finals))


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
