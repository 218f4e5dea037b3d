"""Calibration: runs the graphs over prompts and measures what reuse costs.

Every prompt is run five times, with the full graph at every step. The first run is of the float
graphs in their own loop: how far forecasts of features and predictions go on is fitted to it. In
the second, of the graphs that ship, the cached features of every anchor step i and later step
k = i + gap are compared: their L1 distance (the paper's objective), and the cache correction, which
maps what is forecast of the feature onto step k's best, over many steps in part; and it tells how
much of the full graph's noise is steady. The third fits the quantisation correction of the layers
that consume the corrected feature. The fourth predicts each step k with the shallow graph from
every feature i, and measures how far the guided noise prediction is from the float denoiser's; a
half of the correction that hardly helps is dropped. The fifth, of the float graphs again, measures
what reuse alone errs by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cq_edge.correction import MomentAccumulator
from cq_edge.errors import CalibrationError
from cq_edge.forecast import Weights, expected_back, kept_over
from cq_edge.influence import noise_influence, reuse_influence
from cq_edge.model.float_run import float_run
from cq_edge.model.reuse_alone import reuse_alone
from cq_edge.model.reuse_trial import (
    Consumers,
    Corrections,
    Graphs,
    ShallowGraph,
    fit_pairs,
    fit_quantisation,
    reuse_squares,
)
from cq_edge.model.trajectory import Loop, Prompt, Visit
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.reuse_table import ReuseTable

RUNS = 5
"""How often each prompt is run."""
_WORTH_CORRECTING = 0.95
"""A correction that leaves more than this share of the error is dropped: it was fitted to the very
prompts that it is tried on, and does a little worse on others."""
MAX_SKIP = 4
"""The most steps in a row without a graph that are measured."""
MAX_UNGUIDED = 3
"""The most steps in a row without the negative prompt that are measured."""


@dataclass(frozen=True, slots=True, eq=False)
class StepSample:
    """What one prompt's guided branch saw at one step of the calibration run; batch 1.

    `latents` (1, 4, h, w) are scaled for the network, `context` is what it was told beside them
    and the timestep, `anchor_feature` (1, C, h, w) is the cached feature `gap` steps earlier.
    """

    step: int
    gap: int
    timestep: float
    latents: NDArray[np.float32]
    context: tuple[NDArray[np.float32], ...]
    anchor_feature: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The measured table, samples to check exported graphs with, the final latents of the graphs
    that ship and of the float ones, every step full, and how much of the noise of those that ship
    is steady (`steady_share`)."""

    table: ReuseTable
    samples: tuple[StepSample, ...]
    final_latents: tuple[NDArray[np.float32], ...]
    exact_latents: tuple[NDArray[np.float32], ...]
    steady_noise: float


@torch.no_grad()
def capture(
    shipped: Graphs,
    exact: Graphs,
    consumers: Consumers,
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
    """Runs every prompt through all steps and returns what was measured; the table's base error
    and shares of forecasts are left at 0.

    Args:
        shipped: `FullUNet` and `ShallowUNet`, or anything that is called as they are; what will
            be exported, so that its quantisation is part of what is measured.
        exact: The float ones: what forecasts are fitted to, all errors are measured against, and
            reuse alone with.
        consumers: The layers that the cached feature goes into.
        prompts: The embeddings to calibrate with.
        noise_scheduler: Of T steps.
        latents_shape: (4, h, w).
        guidance_scale: 1.0 runs the guided branch alone.
        max_gap: The largest gap measured; cut to T - 1.
        seed: Of the initial noise; prompt n takes seed + n.
        sampled_steps: How many steps of each prompt go into `samples`, spread evenly.
        on_step: Called after each step of each prompt's runs, for progress bars.

    Raises:
        CalibrationError: If there is no prompt, or a step gives something non-finite.
    """
    if not prompts:
        raise CalibrationError("calibration needs at least one prompt")
    total = len(noise_scheduler.timesteps)
    max_gap = min(max_gap, total - 1)
    loop = Loop(shipped.full, noise_scheduler, latents_shape, guidance_scale, seed)
    exact_loop = replace(loop, full=exact.full)
    # without guidance there is no negative prompt to leave out
    unguided = 0 if guidance_scale == 1 else min(MAX_UNGUIDED, total - 1)
    furthest = max_gap, min(MAX_SKIP, total - 1), unguided
    fitted = float_run(exact_loop, prompts, furthest, on_step)
    features = _FeatureRun(total, max_gap, sampled_steps, loop.with_guided)
    truths: dict[tuple[int, int], Tensor] = {}
    noise = np.zeros((total, total))
    for number, prompt in enumerate(prompts):
        off = []
        for visit in loop.run(number, prompt):
            contexts = loop.branches(prompt)
            truth = loop.guided([exact.full(visit.seen, visit.timestep, *c)[0] for c in contexts])
            truths[number, visit.step] = truth
            off.append((visit.noise_pred - truth).numpy().ravel())
            features.take(visit, prompt)
            on_step()
        errors = np.stack(off)
        noise += errors @ errors.T
    feature = fitted.feature_weight
    cache = features.corrections(feature)
    quantisation = fit_quantisation(loop, consumers, prompts, feature, cache, on_step)
    error, cache, quantisation = _worth_having(
        loop, shipped.shallow, prompts, truths, feature, cache, quantisation, on_step
    )
    halves = cache, quantisation.identity()
    alone = reuse_alone(exact_loop, exact.shallow, prompts, feature, halves, on_step)
    noise_pred = _means(error, len(prompts))
    table = ReuseTable(
        noise_scheduler=noise_scheduler.name,
        steps=noise_scheduler.steps,
        guidance_scale=guidance_scale,
        base_error=0.0,
        timesteps=np.asarray(noise_scheduler.timesteps, np.float32),
        noise_influence=noise_influence(noise_scheduler),
        reuse_influence=reuse_influence(noise_scheduler),
        noise_pred=noise_pred,
        feature_l1=features.l1(),
        shallow=alone,
        skip=fitted.skip,
        unguided=fitted.unguided,
        feature_weight=feature,
        skip_weight=fitted.skip_weight,
        unguided_weight=fitted.unguided_weight,
        forecast_share=np.zeros(noise_pred.shape, np.float32),
        gain=cache.gain,
        bias=cache.bias,
        output_gain=quantisation.gain,
        output_bias=quantisation.bias,
    )
    finals = tuple(features.finals), fitted.final_latents
    return Calibration(table, tuple(features.samples), *finals, steady_share(noise))


def steady_share(products: NDArray[np.floating]) -> float:
    """Returns how much of what quantised full steps err by is the same in steps that lie a quarter
    of the loop apart: the mean correlation of such steps, 0 to 1.

    Args:
        products: (T, T), symmetric: of what every two steps err by, summed over its entries.
    """
    apart, power = max(1, len(products) // 4), np.diagonal(products)
    scale = np.sqrt(power[:-apart] * power[apart:])
    common = np.diagonal(products, apart)
    alike = np.divide(common, scale, out=np.zeros(len(common)), where=scale > 0)
    return float(alike.mean().clip(0, 1)) if len(alike) else 0.0


def _worth_having(
    loop: Loop,
    shallow: ShallowGraph,
    prompts: Sequence[Prompt],
    truths: Mapping[tuple[int, int], Tensor],
    weights: Weights,
    cache: Corrections,
    quantisation: Corrections,
    on_step: Callable[[], object],
) -> tuple[NDArray[np.float64], Corrections, Corrections]:
    """Returns the (T, G+1) errors that reuse leaves, summed over the prompts, and the halves of
    the correction without those that hardly help."""
    no_cache, nothing = cache.identity(), quantisation.identity()
    tried = ((no_cache, nothing), (cache, nothing), (cache, quantisation))
    plain, repaired, both = reuse_squares(loop, shallow, prompts, truths, weights, tried, on_step)
    bare = _hardly_less(repaired, plain)
    error = np.where(bare, plain, repaired)
    halfway = _hardly_less(both, error)
    left = np.where(halfway, error, both)
    return left, cache.identity_where(bare & halfway), quantisation.identity_where(halfway)


def _hardly_less(found: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Returns (T, G+1) whether a correction mends too little of what reuse adds to the error that
    the full graph has at the same step."""
    step = np.minimum(np.add.outer(*map(np.arange, before.shape)), len(before) - 1)
    added = np.abs(before - before[step, 0])
    hardly: NDArray[np.bool_] = found > before - (1 - _WORTH_CORRECTING) * added
    return hardly


def _means(squares: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Returns (T, G+1) sums over so many prompts as means; NaN beyond the last step."""
    step = np.add.outer(*map(np.arange, squares.shape))
    return np.where(step < len(squares), squares / count, np.nan)


class _FeatureRun:
    """What the second run measures: of every (anchor, step) pair, and samples on the way."""

    def __init__(
        self,
        total: int,
        max_gap: int,
        sampled_steps: int,
        with_guided: Callable[[Sequence[Tensor]], list[Tensor]],
    ) -> None:
        self.max_gap = max_gap
        self.samples: list[StepSample] = []
        self.finals: list[NDArray[np.float32]] = []
        self._total = total
        self._with_guided = with_guided
        # [k][d] is of steps k - d and k
        self._pairs = [
            [_PairSum() for _ in range(min(k, 2 * max_gap + 1) + 1)] for k in range(total)
        ]
        self._kept = set(np.linspace(0, total - 1, sampled_steps).round().astype(int).tolist())
        # of this step and those before, the newest first, each with the guided one
        self._recent: list[NDArray[np.float32]] = []

    def take(self, visit: Visit, prompt: Prompt) -> None:
        """Takes in the next step of a prompt's run."""
        if visit.step == 0:
            self._recent = []
        feature = torch.cat(self._with_guided(visit.features)).numpy()
        self._recent = [feature, *self._recent][: 2 * self.max_gap + 2]
        for pair, earlier in zip(self._pairs[visit.step], self._recent, strict=True):
            pair.add(earlier, feature)
        if visit.step in self._kept:
            self._sample(visit, prompt)
        if visit.step == self._total - 1:
            self.finals.append(visit.after.numpy())

    def corrections(self, weights: Weights) -> Corrections:
        """Returns the cache corrections of C channels, of features that are forecast: of what fits
        best, what is kept over their gap."""
        moments = [
            [self._forecast(i, gap, weights) for gap in self._gaps(i)] for i in range(self._total)
        ]
        fitted = fit_pairs(moments, self.max_gap, self._recent[0].shape[1])
        return fitted.kept(kept_over(np.arange(self.max_gap + 1), self._total))

    def l1(self) -> NDArray[np.float64]:
        """Returns (T, G+1) mean absolute differences; NaN beyond the last step."""
        errors = np.full((self._total, self.max_gap + 1), np.nan)
        errors[:, 0] = 0
        for anchor in range(self._total):
            for gap in self._gaps(anchor):
                pair = self._pairs[anchor + gap][gap]
                errors[anchor, gap] = pair.l1 / pair.count
        return errors

    def _gaps(self, anchor: int) -> range:
        """Returns the gaps that there are after an anchor."""
        return range(1, min(self.max_gap, self._total - 1 - anchor) + 1)

    def _forecast(self, anchor: int, gap: int, weights: Weights) -> MomentAccumulator:
        """Returns the moments of the forecast feature with that of the step."""
        later, back = self._pairs[anchor + gap], expected_back(anchor, gap)
        weight = float(weights[anchor, back, gap])
        before, between = later[gap + back].moments, self._pairs[anchor][back].moments
        return later[gap].moments.going_on(before, between, weight)

    def _sample(self, visit: Visit, prompt: Prompt) -> None:
        gap = min(visit.step, 1 + len(self.samples) % max(1, self.max_gap))
        self.samples.append(
            StepSample(
                visit.step,
                gap,
                float(visit.timestep),
                visit.seen.numpy(),
                tuple(told.numpy() for told in prompt[1]),
                self._recent[gap][:2][-1:],
            )
        )


class _PairSum:
    """The sums over all prompts of one (anchor, step) pair."""

    def __init__(self) -> None:
        self.moments = MomentAccumulator()
        self.l1 = 0.0
        self.count = 0

    def add(self, anchor: NDArray[np.float32], later: NDArray[np.float32]) -> None:
        """Takes in (1 or 3, C, h, w) features; the guided one, if any, is the third."""
        channels = anchor.shape[1]
        x, y = (np.moveaxis(f, 1, -1).reshape(-1, channels) for f in (anchor, later))
        self.moments.add(x, y)
        self.l1 += float(np.abs(later[:2] - anchor[:2]).mean(dtype=np.float64))
        self.count += 1
