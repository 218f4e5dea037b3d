"""The denoising loop: a generator over steps; the caller owns progress, memory, cancelling."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.correction import ShallowCorrection
from cq_edge.errors import ScheduleError
from cq_edge.forecast import Forecast, Weights
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.reuse_table import ReuseTable
from runtime.engine import Engine

FloatArray = NDArray[np.float32]
Context = Mapping[str, FloatArray]
"""What the UNet is told beside latents and timestep, by the names of its graphs' inputs."""
_APART = 0.02
"""How far latents are moved for a graph that runs several times: enough for quantised layers to
round most of what they do otherwise, and so little that the mean of runs moved to either side is
what the graph gives in the middle (docs/quantisation_errors.md has what is left of their error)."""


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """What to draw, what to draw away from, and how strongly.

    Attributes:
        prompt: `embeddings` (1, 77, D) float32 and what else the graphs take.
        negative: The same of the negative prompt; None only where `scale` is 1, which needs none.
        scale: noise_pred = negative's + scale · (prompt's - negative's); finite. At 1 the
            network runs once a step, without the negative prompt.
    """

    prompt: Context
    negative: Context | None
    scale: float

    def __post_init__(self) -> None:
        """Refuses a guidance that cannot be computed."""
        if not math.isfinite(self.scale):
            raise ScheduleError(f"guidance scale is {self.scale}: it must be a finite number")
        if self.scale != 1 and self.negative is None:
            raise ScheduleError(
                f"guidance scale {self.scale:g} needs the embeddings of a negative prompt "
                "(of the empty one, if there is none); only scale 1 goes without"
            )

    @property
    def branches(self) -> tuple[Context, ...]:
        """What to run in turn: negative first, then prompt; or prompt alone."""
        if self.scale == 1 or self.negative is None:
            return (self.prompt,)
        return (self.negative, self.prompt)


@dataclass(frozen=True, slots=True, eq=False)
class StepRecord:
    """One step that is done.

    Attributes:
        step: 0-based index in the loop.
        timestep: What the network was told.
        mode: Which graph ran, if any.
        latents: (1, 4, h, w) float32 after the step.
        elapsed_ms: Wall time of the step: graphs and arithmetic, not what the caller did.
    """

    step: int
    timestep: float
    mode: Mode
    latents: FloatArray
    elapsed_ms: float


def denoise(
    engine: Engine,
    noise_scheduler: NoiseScheduler,
    cache_schedule: CacheSchedule,
    latents: FloatArray,
    guidance: Guidance,
    reuse_table: ReuseTable | None = None,
    noise: Iterator[FloatArray] | None = None,
    shares: FloatArray | None = None,
) -> Iterator[StepRecord]:
    """Checks that its arguments fit each other, then runs one step each time it is asked.

    A full step runs `denoise` and keeps its cached feature; run several times, it takes the mean of
    latents moved apart; a shallow step runs `denoise_shallow` on the forecast of that feature,
    corrected; a skip step runs no graph and takes the forecast of the guided noise prediction; an
    unguided step runs its graph for the prompt alone and takes the forecast of what the negative
    prompt changes. A step that runs a graph may take a share of its noise prediction from the
    forecast, too.

    Args:
        engine: Runs `denoise` and `denoise_shallow`.
        noise_scheduler: Gives the T timesteps and the update.
        cache_schedule: The mode of each of the T steps.
        latents: (1, 4, h, w) float32: noise times `noise_scheduler.init_noise_sigma`.
        guidance: The prompts' embeddings and the scale.
        reuse_table: Holds the corrections of the shallow steps, which need it, and how far
            forecasts follow their line.
        noise: Standard normal noise of the latents' shape, as often as it is asked for; only
            noise schedulers with `fresh_noise` ask.
        shares: (T,), 0 to 1: how much of each step's noise prediction is the forecast's; 0 at the
            first. Without them the table's, of full steps that follow a computed one; without
            a table none.

    Returns:
        An iterator of T records. Stopping early is allowed and leaves nothing behind.

    Raises:
        ScheduleError: The schedule's length is not T, its shallow steps have no corrections,
            there is no noise where it is needed, or shares are not (T,), 0 to 1, the first 0.
    """
    _check_fit(noise_scheduler, cache_schedule, reuse_table, shares)
    if any(noise_scheduler.fresh_noise) and noise is None:
        raise ScheduleError(f"{noise_scheduler.name} adds noise after its steps: give it some")
    corrections = _corrections(cache_schedule, reuse_table)
    if shares is None:
        shares = np.zeros(len(cache_schedule), np.float32)
        if reuse_table is not None:
            shares = reuse_table.shares_in(cache_schedule)
    denoiser = _Denoiser(engine, guidance, np.asarray(shares, np.float32), reuse_table)
    fresh = iter(()) if noise is None else noise
    return _steps(denoiser, noise_scheduler, cache_schedule, latents, corrections, fresh)


def _steps(
    denoiser: "_Denoiser",
    noise_scheduler: NoiseScheduler,
    cache_schedule: CacheSchedule,
    latents: FloatArray,
    corrections: dict[int, ShallowCorrection],
    noise: Iterator[FloatArray],
) -> Iterator[StepRecord]:
    history: tuple[Any, ...] = ()
    for step, mode in enumerate(cache_schedule.modes):
        start = perf_counter()
        timestep = noise_scheduler.timesteps[step : step + 1]
        if mode is Mode.SKIP:
            noise_pred = denoiser.forecast(step)
        else:
            inputs = {"latents": noise_scheduler.model_input(latents, step), "timestep": timestep}
            noise_pred = denoiser.run(mode, step, inputs, corrections.get(step))
        latents, history = noise_scheduler.advance(latents, noise_pred, step, history)
        if noise_scheduler.fresh_noise[step]:
            latents = latents + np.float32(noise_scheduler.fresh_noise[step]) * next(noise)
        elapsed_ms = (perf_counter() - start) * 1e3
        yield StepRecord(step, float(timestep[0]), mode, latents, elapsed_ms)


class _Denoiser:
    """Guided noise predictions, computed or forecast from those computed before.

    Keeps the cached features of the last two full steps of each branch, the prompt's last.
    """

    def __init__(
        self,
        engine: Engine,
        guidance: Guidance,
        shares: FloatArray,
        reuse_table: ReuseTable | None,
    ) -> None:
        self._engine = engine
        self._guidance = guidance
        self._weights: dict[str, Weights] = {}
        self._shares = shares
        if reuse_table is not None:
            self._weights = {
                "feature": reuse_table.feature_weight,
                "skip": reuse_table.skip_weight,
                "unguided": reuse_table.unguided_weight,
            }
        self._features = [Forecast() for _ in guidance.branches]
        self._predictions = Forecast()
        self._differences = Forecast()  # of the prompt's prediction from the negative's

    def forecast(self, step: int) -> FloatArray:
        """Returns what the guided noise prediction should be at a step that runs no graph."""
        noise_pred: FloatArray = self._predictions.at(step, self._weights.get("skip"))
        return noise_pred

    def run(
        self,
        mode: Mode,
        step: int,
        inputs: dict[str, FloatArray],
        correction: ShallowCorrection | None,
    ) -> FloatArray:
        """Returns the guided noise prediction of a step that runs a graph.

        Args:
            mode: Full or shallow, guided or not.
            step: Of the loop.
            inputs: `latents` and `timestep`.
            correction: Of the cached feature; None at a full step.
        """
        branches = self._guidance.branches[-1:] if mode.is_unguided else self._guidance.branches
        if correction is None:
            predictions = self._full(step, inputs, branches, mode.runs)
        else:
            predictions = self._shallow(step, inputs, branches, correction)
        noise_pred = self._guided(predictions, mode, step)
        if share := self._shares[step]:
            noise_pred = noise_pred + share * (self.forecast(step) - noise_pred)
        self._predictions = self._predictions.after(step, noise_pred, in_part=mode.is_shallow)
        return noise_pred

    def _full(
        self, step: int, inputs: dict[str, FloatArray], branches: tuple[Context, ...], runs: int
    ) -> list[FloatArray]:
        predictions = []
        latents = [*moved_apart(inputs["latents"], step, runs)]
        for branch, context in enumerate(branches, start=-len(branches)):
            given = {**inputs, **context}
            found = [self._engine.run("denoise", {**given, "latents": each}) for each in latents]
            predictions.append(_mean([outputs["noise_pred"] for outputs in found]))
            feature = _mean([outputs["cached_feature"] for outputs in found])
            self._features[branch] = self._features[branch].after(step, feature)
        return predictions

    def _shallow(
        self,
        step: int,
        inputs: dict[str, FloatArray],
        branches: tuple[Context, ...],
        correction: ShallowCorrection,
    ) -> list[FloatArray]:
        predictions = []
        shared = {**inputs, **correction.inputs()}
        features = self._features[-len(branches) :]
        for context, feature in zip(branches, features, strict=True):
            expected = feature.at(step, self._weights.get("feature"))
            given = {**shared, **context, "cached_feature": expected}
            predictions.append(self._engine.run("denoise_shallow", given)["noise_pred"])
        return predictions

    def _guided(self, predictions: list[FloatArray], mode: Mode, step: int) -> FloatArray:
        """Returns negative's + scale · (prompt's - negative's), the difference forecast if the
        negative's was not computed."""
        scale = np.float32(self._guidance.scale)
        if scale == 1:
            return predictions[-1]
        if len(predictions) == 1:
            added: FloatArray = self._differences.at(step, self._weights.get("unguided"))
            return predictions[0] + (scale - 1) * added
        negative, prompt = predictions
        difference = prompt - negative
        self._differences = self._differences.after(step, difference, in_part=mode.is_shallow)
        return negative + scale * difference


def moved_apart(latents: FloatArray, step: int, runs: int) -> Iterator[FloatArray]:
    """Yields what each run of a graph is given: the latents themselves if there is one, otherwise
    pairs that are moved to either side, value by value by signs that depend on the step alone.

    Args:
        latents: Any shape, float32, as the graph takes them.
        step: Of the loop.
        runs: 1 or an even number; more begin with those of fewer.
    """
    if runs == 1:
        yield latents
        return
    signs = np.random.default_rng(step)
    for _ in range(runs // 2):
        by = np.float32(_APART) * signs.choice(np.array([-1, 1], np.float32), latents.shape)
        yield latents + by
        yield latents - by


def _mean(found: list[FloatArray]) -> FloatArray:
    mean: FloatArray = found[0] if len(found) == 1 else np.mean(found, axis=0)
    return mean


def _check_fit(
    noise_scheduler: NoiseScheduler,
    cache_schedule: CacheSchedule,
    reuse_table: ReuseTable | None,
    shares: FloatArray | None,
) -> None:
    expected, found = len(noise_scheduler.timesteps), len(cache_schedule.modes)
    asked = f"{noise_scheduler.name} at {noise_scheduler.steps} steps"
    if found != expected:
        raise ScheduleError(
            f"the cache schedule has {found} steps, but {asked} evaluates the denoiser "
            f"{expected} times: give {expected} modes"
        )
    if reuse_table is not None:
        reuse_table.require_for(noise_scheduler)
    if shares is None:
        return
    if shares.shape != (expected,) or shares[0] or not ((shares >= 0) & (shares <= 1)).all():
        raise ScheduleError(
            f"the shares of forecasts, of shape {shares.shape}, must be ({expected},), 0 to 1, the "
            "first 0"
        )


def _corrections(
    cache_schedule: CacheSchedule, reuse_table: ReuseTable | None
) -> dict[int, ShallowCorrection]:
    """Returns the correction of each shallow step."""
    corrections = {}
    for step, (anchor, mode) in enumerate(
        zip(cache_schedule.anchors, cache_schedule.modes, strict=True)
    ):
        if not mode.is_shallow:
            continue
        if reuse_table is None:
            raise ScheduleError(
                f"step {step} is shallow and needs a correction, but no reuse table was given: "
                "give the bundle's, or a schedule without shallow steps"
            )
        if step - anchor > reuse_table.max_gap:
            raise ScheduleError(
                f"step {step} reuses step {anchor}, a gap of {step - anchor}, but the reuse "
                f"table goes up to {reuse_table.max_gap}: make a step between them full, or "
                "calibrate with a larger max_gap"
            )
        corrections[step] = reuse_table.correction(anchor, step)
    return corrections
