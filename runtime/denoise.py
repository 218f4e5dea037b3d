"""The denoising loop: a generator over steps; the caller owns progress, memory, cancelling."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.correction import ChannelCorrection
from cq_edge.errors import ScheduleError
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.reuse_table import ReuseTable
from runtime.engine import Engine

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """What to draw, what to draw away from, and how strongly.

    Attributes:
        prompt: (1, 77, D) float32 embeddings.
        negative: (1, 77, D) float32 embeddings; None only where `scale` is 1, which needs none.
        scale: noise_pred = negative's + scale · (prompt's - negative's); finite. At 1 the
            network runs once a step, without the negative prompt.
    """

    prompt: FloatArray
    negative: FloatArray | None
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
    def branches(self) -> tuple[FloatArray, ...]:
        """The embeddings to run in turn: negative first, then prompt; or prompt alone."""
        if self.scale == 1 or self.negative is None:
            return (self.prompt,)
        return (self.negative, self.prompt)

    def combine(self, predictions: list[FloatArray]) -> FloatArray:
        """Returns the guided noise prediction of the branches' predictions."""
        if len(predictions) == 1:
            return predictions[0]
        negative, prompt = predictions
        return negative + np.float32(self.scale) * (prompt - negative)


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
) -> Iterator[StepRecord]:
    """Checks that its arguments fit each other, then runs one step each time it is asked.

    A full step runs `denoise` and keeps its cached feature; a shallow step runs
    `denoise_shallow` on the last full step's feature, corrected; a skip step takes the last
    step's guided noise prediction again and runs no graph.

    Args:
        engine: Runs `denoise` and `denoise_shallow`.
        noise_scheduler: Gives the T timesteps and the update.
        cache_schedule: The mode of each of the T steps.
        latents: (1, 4, h, w) float32: noise times `noise_scheduler.init_noise_sigma`.
        guidance: The prompts' embeddings and the scale.
        reuse_table: Holds the corrections of the shallow steps; needed only where there are any.

    Returns:
        An iterator of T records. Stopping early is allowed and leaves nothing behind.

    Raises:
        ScheduleError: The schedule's length is not T, or its shallow steps have no corrections.
    """
    _check_fit(noise_scheduler, cache_schedule, reuse_table)
    corrections = _corrections(cache_schedule, reuse_table)
    return _steps(engine, noise_scheduler, cache_schedule, latents, guidance, corrections)


def _steps(
    engine: Engine,
    noise_scheduler: NoiseScheduler,
    cache_schedule: CacheSchedule,
    latents: FloatArray,
    guidance: Guidance,
    corrections: dict[int, ChannelCorrection],
) -> Iterator[StepRecord]:
    history: tuple[Any, ...] = ()
    features: list[FloatArray] = []  # of the last full step, one per branch
    noise_pred = latents  # step 0 is full and overwrites it
    for step, mode in enumerate(cache_schedule.modes):
        start = perf_counter()
        timestep = noise_scheduler.timesteps[step : step + 1]
        model_input = noise_scheduler.model_input(latents, step)
        if mode is Mode.FULL:
            noise_pred, features = _full(engine, model_input, timestep, guidance)
        elif mode is Mode.SHALLOW:
            noise_pred = _shallow(
                engine, model_input, timestep, guidance, features, corrections[step]
            )
        latents, history = noise_scheduler.advance(latents, noise_pred, step, history)
        elapsed_ms = (perf_counter() - start) * 1e3
        yield StepRecord(step, float(timestep[0]), mode, latents, elapsed_ms)


def _full(
    engine: Engine, latents: FloatArray, timestep: FloatArray, guidance: Guidance
) -> tuple[FloatArray, list[FloatArray]]:
    predictions, features = [], []
    for embeddings in guidance.branches:
        inputs = {"latents": latents, "timestep": timestep, "embeddings": embeddings}
        outputs = engine.run("denoise", inputs)
        predictions.append(outputs["noise_pred"])
        features.append(outputs["cached_feature"])
    return guidance.combine(predictions), features


def _shallow(
    engine: Engine,
    latents: FloatArray,
    timestep: FloatArray,
    guidance: Guidance,
    features: list[FloatArray],
    correction: ChannelCorrection,
) -> FloatArray:
    predictions = []
    for embeddings, feature in zip(guidance.branches, features, strict=True):
        inputs = {
            "latents": latents,
            "timestep": timestep,
            "embeddings": embeddings,
            "cached_feature": feature,
            "gain": correction.gain,
            "bias": correction.bias,
        }
        predictions.append(engine.run("denoise_shallow", inputs)["noise_pred"])
    return guidance.combine(predictions)


def _check_fit(
    noise_scheduler: NoiseScheduler, cache_schedule: CacheSchedule, reuse_table: ReuseTable | None
) -> None:
    expected, found = len(noise_scheduler.timesteps), len(cache_schedule.modes)
    asked = f"{noise_scheduler.name} at {noise_scheduler.steps} steps"
    if found != expected:
        raise ScheduleError(
            f"the cache schedule has {found} steps, but {asked} evaluates the denoiser "
            f"{expected} times: give {expected} modes"
        )
    if reuse_table is None:
        return
    if not np.array_equal(reuse_table.timesteps, noise_scheduler.timesteps):
        raise ScheduleError(
            f"the reuse table was measured on {reuse_table.noise_scheduler} at "
            f"{reuse_table.steps} steps: its corrections do not fit {asked}"
        )


def _corrections(
    cache_schedule: CacheSchedule, reuse_table: ReuseTable | None
) -> dict[int, ChannelCorrection]:
    """Returns the correction of each shallow step."""
    corrections = {}
    for step, (anchor, mode) in enumerate(
        zip(cache_schedule.anchors, cache_schedule.modes, strict=True)
    ):
        if mode is not Mode.SHALLOW:
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
