"""stable-diffusion.cpp through its Python package: it owns the loop, the prompts and the noise."""

from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.rivals.task import LoopRun, Task
from runtime.peak_memory import peak_memory_mib

# the nearest it has; DDIM without noise is Euler's method in sigma
_SAMPLERS = {"pndm": "ipndm", "ddim": "euler"}
_PX_PER_LATENT = 8


class StableDiffusionCpp:
    """Weights converted to GGUF before.

    Args:
        dtype: Of the weights, e.g. "q8_0"; convolutions stay float16 in all of them.
        cache: "disabled", or a cache mode for UNets ("ucache", "spectrum") with its defaults.
    """

    libraries = ("stable_diffusion_cpp_python",)

    def __init__(self, dtype: str, cache: str = "disabled") -> None:
        self._dtype, self._cache = dtype, cache
        self.files = f"stable_diffusion_cpp_{dtype}"

    def prepare(self, task: Task, work: Path) -> None:
        """Converts the pipeline's folder.

        Raises:
            RuntimeError: It is not of a size that stable-diffusion.cpp knows.
        """
        from stable_diffusion_cpp import StableDiffusion

        path, model = self._path(work), StableDiffusion()
        source = _with_its_names(task.pipeline, work / "renamed")
        converted = model.convert(str(source), output_path=str(path), output_type=self._dtype)
        if not converted or not path.exists():
            raise RuntimeError("stable-diffusion.cpp could not convert the pipeline")

    def load(self, task: Task, work: Path) -> None:
        """Loads the weights.

        Raises:
            RuntimeError: They are of no model that stable-diffusion.cpp knows.
        """
        from stable_diffusion_cpp import StableDiffusion

        self._task, self._file = task, self._path(work)
        self._model: Any = StableDiffusion(
            model_path=str(self._file), n_threads=task.threads, verbose=True
        )
        if not self._model.model:  # a null pointer, which the package takes for a model
            raise RuntimeError(
                "stable-diffusion.cpp cannot tell what model this is (it knows Stable Diffusion "
                "1.x by text embeddings of width 768)"
            )

    def run(self, picture: int, steps: int) -> LoopRun:
        """Makes a picture; of it, only the loop is timed."""
        side = self._task.unet_config["sample_size"] * _PX_PER_LATENT
        self._clock: list[float] = []
        self._steps = steps
        self._model.generate_image(
            prompt=self._task.prompts[picture],
            width=side,
            height=side,
            cfg_scale=self._task.guidance,
            sample_method=_SAMPLERS[self._task.noise_scheduler],
            sample_steps=steps,
            seed=picture,
            cache_mode=self._cache,
            progress_callback=self._progress,
        )
        steps_ms = tuple(1e3 * (end - start) for start, end in pairwise(self._clock))
        return LoopRun(None, steps_ms, _modes(steps_ms), self._peak_mib)

    def modes(self) -> str | None:
        """Returns that every step runs the whole UNet; its caches decide as they go."""
        return "F" * len(self._task.whole_timesteps) if self._cache == "disabled" else None

    def disk_bytes(self) -> int:
        """Returns the size of the GGUF file, text encoder and decoder included."""
        return self._file.stat().st_size

    def _path(self, work: Path) -> Path:
        return work / f"{self._dtype}.gguf"

    def _progress(self, step: int, steps: int, _mean_s: float) -> None:
        if step == 0:
            self._clock = []
        if steps == self._steps:
            self._clock.append(perf_counter())
            self._peak_mib = peak_memory_mib()


def _modes(steps_ms: tuple[float, ...]) -> str:
    """Returns K for the steps that took less than a fifth of the longest: no network ran."""
    return "".join("FK"[taken < max(steps_ms) / 5] for taken in steps_ms)


def _with_its_names(pipeline: Path, folder: Path) -> Path:
    """Returns a folder of the same pipeline whose text encoder's weights have the names that
    transformers gave them before 5, which are the ones that stable-diffusion.cpp knows."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    for name in ("unet", "vae"):
        (folder / name).symlink_to((pipeline / name).resolve())
    weights = load_file(pipeline / "text_encoder" / "model.safetensors")
    prefix = "text_model."
    renamed = {k if k.startswith(prefix) else prefix + k: v for k, v in weights.items()}
    (folder / "text_encoder").mkdir()
    save_file(renamed, folder / "text_encoder" / "model.safetensors")
    return folder
