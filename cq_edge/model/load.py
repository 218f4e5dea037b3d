"""A Stable-Diffusion-type pipeline, from a diffusers folder, a hub id or the demo model."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from cq_edge.errors import ModelError

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
_COMPONENTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


def load_pipeline(source: str | Path | None = None) -> StableDiffusionPipeline:
    """Returns the pipeline in float32 on the CPU, in evaluation mode.

    Args:
        source: A folder in diffusers layout or a hub id; None is the built-in demo model.

    Raises:
        ModelError: If there is no pipeline, it is of another kind, or a component is missing.
    """
    source = DEMO_MODEL if source is None else source
    if Path(source).exists():
        _check_folder(Path(source))
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(source),
            torch_dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{source} could not be loaded: {_first_line(error)}") from error
    for name in ("text_encoder", "unet", "vae"):
        getattr(pipeline, name).eval().requires_grad_(requires_grad=False)
    return pipeline


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that "
            "StableDiffusionPipeline.save_pretrained wrote"
        )
    try:
        declared = json.loads(index.read_text(encoding="utf-8"))
        kind = declared.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{index} is not the JSON object diffusers writes: {error}") from error
    if kind != "StableDiffusionPipeline":
        raise ModelError(
            f"{folder} holds a {kind}; cq-edge builds from a StableDiffusionPipeline so far"
        )
    for name in _COMPONENTS:
        if not (folder / name).is_dir():
            raise ModelError(f"{folder} has no {name}: a pipeline needs {', '.join(_COMPONENTS)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
