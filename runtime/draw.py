"""A prompt and a seed become a picture, with the times that it took."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.forecast_share import plan_shares
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.reuse_table import ReuseTable
from runtime.bundle import Bundle
from runtime.denoise import denoise
from runtime.engine import Engine
from runtime.generate import (
    decode_latents,
    encode_prompt,
    guided_by,
    needs_negative,
    noises,
)


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """How a bundle's pictures are made.

    Attributes:
        bundle: Gives graphs, noise scheduler and guidance scale.
        engine: Runs the bundle's graphs.
        steps: Sampler steps.
        schedule: The mode of each step of the loop.
        table: The corrections, which shallow steps need; None runs full steps wholly computed.
        noise_scheduler: Its name; None for the bundle's own.
        shares: (T,) of forecasts in steps that run a graph; None for the table's.
    """

    bundle: Bundle
    engine: Engine
    steps: int
    schedule: CacheSchedule
    table: ReuseTable | None
    noise_scheduler: str | None = None
    shares: NDArray[np.float32] | None = None


def planned(bundle: Bundle, engine: Engine, table: ReuseTable, schedule: CacheSchedule) -> Method:
    """Returns how a plan is drawn: with the shares of forecasts that are best for it.

    Args:
        bundle: Gives graphs and noise schedule.
        engine: Runs the bundle's graphs.
        table: Of the noise scheduler and the steps, with the corrections.
        schedule: Of its steps.

    Raises:
        ScheduleError: The schedule has another length or a step that was not measured.
    """
    name, steps = table.noise_scheduler, table.steps
    noise_scheduler = make_noise_scheduler(name, steps, bundle.manifest.noise_schedule)
    shares = plan_shares(table, noise_scheduler, schedule)
    return Method(bundle, engine, steps, schedule, table, name, shares)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A (H, W, 3) uint8 picture of (1, 4, h, w) latents, the milliseconds of its loop and of
    everything."""

    latents: NDArray[np.float32]
    picture: NDArray[np.uint8]
    loop_ms: float
    total_ms: float


def draw(method: Method, prompt: str, seed: int) -> Drawn:
    """Makes one picture: prompts, denoising loop, decoding."""
    start = perf_counter()
    manifest, engine = method.bundle.manifest, method.engine
    defaults, size = manifest.defaults, manifest.latents
    noise_scheduler = make_noise_scheduler(
        method.noise_scheduler or defaults.noise_scheduler, method.steps, manifest.noise_schedule
    )
    tokenizers, scale = method.bundle.tokenizers(), defaults.guidance_scale
    texts = [prompt] + [""] * needs_negative(manifest, "", scale)
    told = [encode_prompt(engine, tokenizers, text)[0] for text in texts if tokenizers] or [{}]
    guidance = guided_by(manifest, told[0], told[1] if told[1:] else None, scale)
    noise = noises((size.channels, size.height, size.width), seed)
    latents = next(noise) * np.float32(noise_scheduler.init_noise_sigma)
    loop_ms = 0.0
    given = (method.schedule, latents, guidance, method.table, noise, method.shares)
    for record in denoise(engine, noise_scheduler, *given):
        loop_ms, latents = loop_ms + record.elapsed_ms, record.latents
    picture = decode_latents(engine, latents)
    return Drawn(latents, picture, loop_ms, (perf_counter() - start) * 1e3)
