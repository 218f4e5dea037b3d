"""diffusers' own pipeline in eager mode or compiled, and with DeepCache."""

from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.rivals.task import LoopRun, Task

_NOISE_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {}),
    # Stable Diffusion's own value, which a configuration that PNDM saved does not hold
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}


class Diffusers:
    """`StableDiffusionPipeline` on torch.

    Args:
        dtype: Of torch: "float32" or "bfloat16".
        compiled: Whether the UNet goes through `torch.compile`, with its weights frozen as
            inductor's notes for CPUs advise.
    """

    libraries: tuple[str, ...] = ("diffusers", "torch")

    def __init__(self, dtype: str = "float32", compiled: bool = False) -> None:
        self._dtype, self._compiled = dtype, compiled
        self.files = f"diffusers_{dtype}_compiled" if compiled else "diffusers"

    def prepare(self, task: Task, work: Path) -> None:
        """Fills the compiler's cache."""
        if self._compiled:
            self.load(task, work)
            self.run(0, 1)

    def load(self, task: Task, work: Path) -> None:
        """Loads the UNet in channels-last layout; embeddings and latents come from the task."""
        import diffusers
        import torch

        self._task = task
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "feature_extractor"))
        self._pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(
            str(task.pipeline),
            torch_dtype=getattr(torch, self._dtype),
            safety_checker=None,
            requires_safety_checker=False,
            **parts,
        )
        kind, settings = _NOISE_SCHEDULERS[task.noise_scheduler]
        scheduler = getattr(diffusers, kind)
        self._pipe.scheduler = scheduler.from_config(self._pipe.scheduler.config, **settings)
        self._pipe.unet.eval().to(memory_format=torch.channels_last)
        self._watch()
        if self._compiled:
            self._compile(work)

    def run(self, picture: int, steps: int) -> LoopRun:
        """Calls the pipeline, and interrupts it where the loop is to be cut short."""
        import torch

        task, dtype = self._task, getattr(torch, self._dtype)
        negative, prompt = (torch.from_numpy(e).to(dtype) for e in task.branches(picture))
        self._modes: list[str] = []
        self._last_step = steps - 1
        with torch.no_grad():
            latents = self._pipe(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                latents=torch.from_numpy(task.latents(picture)).to(dtype),
                num_inference_steps=task.steps,
                guidance_scale=task.guidance,
                output_type="latent",
                callback_on_step_end=self._step_ended,
            ).images
        steps_ms = tuple(1e3 * (end - start) for start, end in pairwise(self._clock))
        found = np.asarray(latents.float().numpy(), np.float32)
        return LoopRun(found, steps_ms, "".join(self._modes))

    def modes(self) -> str:
        """Returns that every step runs the whole UNet."""
        return "F" * len(self._task.whole_timesteps)

    def disk_bytes(self) -> int:
        """Returns the size of the UNet's file as it ships."""
        return sum(p.stat().st_size for p in (self._task.pipeline / "unet").glob("*.safetensors"))

    def _watch(self) -> None:
        """Notes when the loop starts: where the pipeline makes its progress bar."""
        progress_bar = self._pipe.progress_bar
        self._pipe.set_progress_bar_config(disable=True)

        def start(*args: Any, **settings: Any) -> Any:
            self._clock = [perf_counter()]
            return progress_bar(*args, **settings)

        self._pipe.progress_bar = start

    def _step_ended(self, pipe: Any, step: int, _timestep: Any, kept: Any) -> Any:
        self._clock.append(perf_counter())
        self._modes.append(self._mode())
        if step == self._last_step:
            pipe._interrupt = True
        return kept

    def _mode(self) -> str:
        return "F"

    def _compile(self, work: Path) -> None:
        import os

        import torch
        import torch._inductor.config as inductor

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
        inductor.freezing = True
        self._pipe.unet = torch.compile(self._pipe.unet)


class DeepCache(Diffusers):
    """The same in eager mode with DeepCache's own extension.

    Args:
        interval: A full step every so many; the branch is 0, its default.
    """

    libraries = ("DeepCache", *Diffusers.libraries)

    def __init__(self, interval: int) -> None:
        super().__init__()
        self._interval = interval

    def load(self, task: Task, work: Path) -> None:
        """Loads the pipeline and hooks the cache into it."""
        from DeepCache import DeepCacheSDHelper

        super().load(task, work)
        middle = self._pipe.unet.mid_block
        run_middle = middle.forward
        self._whole = False

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._whole = True
            return run_middle(*args, **kwargs)

        middle.forward = watched
        helper = DeepCacheSDHelper(pipe=self._pipe)
        helper.set_params(cache_interval=self._interval, cache_branch_id=0)
        helper.enable()

    def modes(self) -> str:
        """Returns DeepCache's modes: it counts a step by where its timestep first stands."""
        timesteps = self._task.whole_timesteps
        return "".join("FS"[timesteps.index(t) % self._interval != 0] for t in timesteps)

    def _mode(self) -> str:
        ran, self._whole = self._whole, False
        return "F" if ran else "S"
