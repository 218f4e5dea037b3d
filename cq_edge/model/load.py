"""A pipeline from wherever it lies: a diffusers folder, a hub id, one file, or the demo model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from cq_edge.errors import ModelError
from cq_edge.model.lora import Lora, fuse_loras
from cq_edge.model.narrow_weights import widen_while_running
from cq_edge.model.pickled import refuse_pickle, refuse_pickled_component
from cq_edge.model.single_file import load_single_file
from cq_edge.model.vae import replace_vae
from cq_edge.noise_scheduler import PREDICTION_TYPES

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
_TEXT_TO_IMAGE = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
_KINDS: Mapping[str, Sequence[str]] = {  # the components that each kind of pipeline needs
    "StableDiffusionPipeline": _TEXT_TO_IMAGE,
    "StableDiffusionXLPipeline": ("tokenizer_2", "text_encoder_2", *_TEXT_TO_IMAGE),
    "LatentConsistencyModelPipeline": _TEXT_TO_IMAGE,
    "DDPMPipeline": ("unet", "scheduler"),
    "DDIMPipeline": ("unet", "scheduler"),
    "LDMPipeline": ("vqvae", "unet", "scheduler"),
}


def load_pipeline(
    source: str | Path | None = None,
    *,
    config: Path | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    loras: Sequence[Lora] = (),
    narrow: bool = False,
) -> DiffusionPipeline:
    """Returns the pipeline in float32 on the CPU, in evaluation mode.

    Args:
        source: A folder in diffusers layout, a hub id, or a single-file checkpoint
            (`.safetensors`); None is the built-in demo model.
        config: For a single file: a folder in diffusers layout with its configurations; None for
            those of the published models.
        prediction_type: What the UNet gives, "epsilon" or "v_prediction"; None for what the
            pipeline says.
        vae: What replaces its VAE, as `replace_vae` takes it.
        loras: Added to its weights, in turn.
        narrow: Whether the UNet of a folder in half precision stays so and mapped, each layer
            widening its weights while it runs; not together with LoRAs.

    Raises:
        ModelError: If there is no pipeline, it is of another kind, or a part does not fit it.
    """
    source = DEMO_MODEL if source is None else source
    path = Path(source)
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ModelError(f"{path} is no file: there is no checkpoint")
        pipeline = load_single_file(path, config, prediction_type)
    elif config is not None:
        raise ModelError(f"--config is for a single .safetensors file: {source} has its own")
    else:
        pipeline = _from_diffusers(source, narrow=narrow and not loras)
    if prediction_type is not None:
        _set_prediction_type(pipeline, prediction_type)
    fuse_loras(pipeline, loras)
    if vae is not None:
        replace_vae(pipeline, vae)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(requires_grad=False)
    return pipeline


def _from_diffusers(source: str | Path, *, narrow: bool) -> DiffusionPipeline:
    folder = Path(source)
    index = _read_index(folder) if folder.exists() else _hub_index(source)
    kind = str(index.get("_class_name"))
    if kind not in _KINDS:
        raise ModelError(f"{source} holds a {kind}; cq-edge builds from {', '.join(_KINDS)}")
    if folder.exists():
        _check_components(folder, _KINDS[kind])
    unchecked = {"safety_checker": None, "requires_safety_checker": False}
    stored = _stored_dtype(folder / "unet") if narrow else torch.float32
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(source),
            torch_dtype={"default": torch.float32, "unet": stored},
            use_safetensors=True,
            **(unchecked if "safety_checker" in index else {}),
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{source} could not be loaded: {_first_line(error)}") from error
    widen_while_running(pipeline.unet)
    return pipeline


def _stored_dtype(folder: Path) -> torch.dtype:
    """Returns the half-precision dtype that all weights in a folder have; float32 otherwise."""
    found = set()
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return torch.float32  # loading says what is wrong
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    return halves.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _hub_index(source: str | Path) -> dict[str, Any]:
    """Returns a hub repository's model_index.json, from the local cache or the hub."""
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(str(source))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} could not be loaded: {_first_line(error)}") from error
    return index


def _read_index(folder: Path) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} is no diffusers pipeline: it has no model_index.json; give the folder that "
            "a pipeline's save_pretrained wrote, or a single .safetensors file"
        )
    try:
        declared = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{index} is not the JSON object diffusers writes: {error}") from error
    if not isinstance(declared, dict):
        raise ModelError(f"{index} is not the JSON object diffusers writes")
    return declared


def _check_components(folder: Path, needed: Sequence[str]) -> None:
    for name in needed:
        if not (folder / name).is_dir():
            raise ModelError(f"{folder} has no {name}: a pipeline needs {', '.join(needed)}")
        refuse_pickled_component(folder / name)


def _set_prediction_type(pipeline: DiffusionPipeline, prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ModelError(
            f"prediction type {prediction_type!r} is unknown: use {' or '.join(PREDICTION_TYPES)}"
        )
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
