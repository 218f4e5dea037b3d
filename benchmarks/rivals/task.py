"""What every contender is given: the same UNet, noise, embeddings, steps and guidance."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cq_edge.noise_scheduler import NoiseScheduleConfig, NoiseScheduler, make_noise_scheduler
from runtime.generate import initial_latents

FloatArray = NDArray[np.float32]
Denoiser = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
"""(2, 4, h, w) latents, a (1,) timestep, (2, 77, D) embeddings: (2, 4, h, w) noise prediction."""


@dataclass(frozen=True)
class Task:
    """Pictures to make, picture i from seed i.

    Attributes:
        pipeline: The diffusers folder whose UNet runs.
        float32: The bundle of it that is not quantised; None where there is none.
        bundle: The bundle of it that is.
        plan: Of the bundle's planned row, as `--plan` of `cq-edge generate` takes it.
        float32_plan: Of the float32 bundle's, likewise.
        prompts: One a picture.
        calibration_prompts: Of the pictures after those, for contenders that calibrate activations.
        calibration_steps: How many steps of those pictures' loops to calibrate by.
        noise_scheduler: Its name, "pndm" or "ddim".
        steps: Sampler steps of the loop.
        whole_steps: Of the loop that is meant, where a shorter one stands for it.
        guidance: Both branches run at every step.
        threads: Of each contender.
        embeddings: The .npz of `prompts` (N + M, 77, D), those for calibration last, and `negative`
            (1, 77, D), both float32.
    """

    pipeline: Path
    float32: Path | None
    bundle: Path | None
    plan: str
    float32_plan: str
    prompts: tuple[str, ...]
    calibration_prompts: tuple[str, ...]
    calibration_steps: int
    noise_scheduler: str
    steps: int
    whole_steps: int
    guidance: float
    threads: int
    embeddings: Path

    @classmethod
    def read(cls, path: Path) -> Self:
        """Returns what `write` wrote."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in ("pipeline", "float32", "bundle", "embeddings"):
            content[key] = None if content[key] is None else Path(content[key])
        for key in ("prompts", "calibration_prompts"):
            content[key] = tuple(content[key])
        return cls(**content)

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self), default=str, indent=2), encoding="utf-8")

    @property
    def calibration_pictures(self) -> range:
        """The numbers of the pictures to calibrate by."""
        return range(len(self.prompts), len(self.prompts) + len(self.calibration_prompts))

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's configuration as diffusers writes it."""
        path = self.pipeline / "unet" / "config.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def make_noise_scheduler(self, steps: int | None = None) -> NoiseScheduler:
        """Returns the noise scheduler of the loop, or of one of other steps."""
        path = self.pipeline / "scheduler" / "scheduler_config.json"
        config = NoiseScheduleConfig.from_diffusers(json.loads(path.read_text(encoding="utf-8")))
        return make_noise_scheduler(self.noise_scheduler, steps or self.steps, config)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """What the UNet is told at each step of the loop; with PNDM they are one more."""
        return tuple(self.make_noise_scheduler().timesteps.tolist())

    @cached_property
    def whole_timesteps(self) -> tuple[float, ...]:
        """The same of the loop that is meant."""
        return tuple(self.make_noise_scheduler(self.whole_steps).timesteps.tolist())

    def latents(self, picture: int) -> FloatArray:
        """Returns a picture's (1, 4, h, w) noise."""
        side, channels = self.unet_config["sample_size"], self.unet_config["in_channels"]
        return initial_latents((channels, side, side), picture, 1.0)

    def branches(self, picture: int) -> tuple[FloatArray, FloatArray]:
        """Returns the (1, 77, D) embeddings of the empty prompt and of a picture's."""
        with np.load(self.embeddings) as arrays:
            return arrays["negative"], arrays["prompts"][picture : picture + 1]


@dataclass(frozen=True, slots=True, eq=False)
class LoopRun:
    """A denoising loop that has run.

    Attributes:
        latents: (1, 4, h, w) after the last step that ran; None where they cannot be had.
        steps_ms: Wall time of each step, guidance and noise scheduler included.
        modes: What each step ran, letters as in `CacheSchedule`: F the whole UNet (D twice, Q four
            times), S its outer layers, K nothing, small letters without the empty prompt.
        peak_mib: The most memory the process had held when the loop ended, for contenders that go
            on to make the picture; None: what it has held by now.
    """

    latents: FloatArray | None
    steps_ms: tuple[float, ...]
    modes: str
    peak_mib: float | None = None


class Contender(Protocol):
    """A way of running the loop, constructed without importing its library."""

    libraries: tuple[str, ...]
    """The distributions whose versions the table gives."""

    files: str
    """Names the folder of what `prepare` writes; contenders of one name share it."""

    def prepare(self, task: Task, work: Path) -> None:
        """Writes what `load` needs into an empty folder, in a process of its own."""

    def load(self, task: Task, work: Path) -> None:
        """Gets ready to run."""

    def run(self, picture: int, steps: int) -> LoopRun:
        """Runs the first steps of a picture's loop, or all."""

    def modes(self) -> str | None:
        """Returns what the steps of the loop that is meant run; None if only running tells."""

    def disk_bytes(self) -> int:
        """Returns the size of the files that the loop reads."""


def guided_loop(task: Task, picture: int, steps: int, denoiser: Denoiser) -> LoopRun:
    """Runs the first steps of a picture's loop, for a denoiser that takes both branches as one
    batch, as pipelines do."""
    scheduler, latents = task.make_noise_scheduler(), task.latents(picture)
    embeddings = np.concatenate(task.branches(picture))
    history: tuple[Any, ...] = ()
    steps_ms = []
    for step in range(steps):
        start = perf_counter()
        pair = np.concatenate([scheduler.model_input(latents, step)] * 2)
        noise = denoiser(pair, scheduler.timesteps[step : step + 1], embeddings)
        guided = noise[:1] + np.float32(task.guidance) * (noise[1:] - noise[:1])
        latents, history = scheduler.advance(latents, guided, step, history)
        steps_ms.append((perf_counter() - start) * 1e3)
    return LoopRun(latents, tuple(steps_ms), "F" * steps)
