"""A pipeline from a single-file checkpoint: Stable Diffusion's original layout, in safetensors.

diffusers converts the weights. What the layers are stands in no checkpoint: the configurations
come with the project (`cq_edge/checkpoint_configs`), so that nothing is fetched.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from cq_edge.errors import ModelError

CHECKPOINT_CONFIGS = Path(__file__).parents[1] / "checkpoint_configs"
_UNET = "model.diffusion_model."
_ENCODER_CONV = f"{_UNET}input_blocks.0.0.weight"
_V_PREDICTION_KEY = "v_pred"  # an empty tensor of this name marks SDXL checkpoints so trained
# where each model's first cross-attention keys lie, and the width of the embeddings they take
_SD_KEYS = f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_SDXL_KEYS = f"{_UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_WIDTHS = {(_SD_KEYS, 768): "sd1", (_SD_KEYS, 1024): "sd2", (_SDXL_KEYS, 2048): "sdxl"}
_LDM_SIZES = {"epsilon": 64, "v_prediction": 96}  # of Stable Diffusion 2.x, in latent cells


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says before its weights: shapes by name, and its metadata."""

    shapes: Mapping[str, Sequence[int]]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Returns the header of a safetensors file; reads no weights.

    Raises:
        ModelError: There is no such file, or it is none of safetensors'.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            return Header(shapes, file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def load_single_file(
    path: Path, config: Path | None = None, prediction_type: str | None = None
) -> DiffusionPipeline:
    """Returns the pipeline that a checkpoint holds, float32.

    Args:
        path: A `.safetensors` file with UNet, text encoder and VAE.
        config: A folder in diffusers layout whose configurations the checkpoint follows, its
            weights aside; None for those of the published models.
        prediction_type: "epsilon" or "v_prediction"; None for what the file says of itself, and
            if it says nothing, for the published model's.

    Raises:
        ModelError: It holds something else, or less, or weights of other shapes.
    """
    header = read_header(path)
    folder = CHECKPOINT_CONFIGS / _kind(path, header) if config is None else config
    declared = prediction_type or _declared_prediction_type(header)
    kind = _read_json(folder / "model_index.json").get("_class_name")
    classes = {"StableDiffusionXLPipeline": StableDiffusionXLPipeline}
    given = _tokenizers(folder) if config is None else {}
    try:
        pipeline = classes.get(str(kind), StableDiffusionPipeline).from_single_file(
            str(path),
            config=str(folder),
            local_files_only=True,
            torch_dtype=torch.float32,
            **given,
        )
    except NotImplementedError as error:  # what had no weight was to be copied
        raise ModelError(
            f"{path} lacks weights that {folder.name} has: if it follows other configurations, "
            "give them with --config"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} does not hold the weights of {folder.name}: {error}") from error
    if declared is not None:
        pipeline.scheduler.register_to_config(prediction_type=declared)
    if config is None and folder.name == "sd2":
        size = _LDM_SIZES[pipeline.scheduler.config.prediction_type]
        pipeline.unet.register_to_config(sample_size=size)
    return pipeline


def _kind(path: Path, header: Header) -> str:
    """Returns the folder of configurations that a checkpoint's shapes call for."""
    shapes = header.shapes
    if _ENCODER_CONV not in shapes:
        raise ModelError(f"{path} is no Stable Diffusion checkpoint: {_what_else(header)}")
    channels = shapes[_ENCODER_CONV][1]
    if channels != 4:
        raise ModelError(
            f"{path} takes {channels} channels where a text-to-image UNet takes 4: it is made for "
            "inpainting or another conditioning, which cq-edge does not build"
        )
    for (key, width), kind in _WIDTHS.items():
        if key in shapes and shapes[key][-1] == width:
            return kind
    raise ModelError(
        f"{path} is neither Stable Diffusion 1.x, nor 2.x, nor SDXL by the width of its "
        "cross-attention: give a folder in diffusers layout with its configurations (--config)"
    )


def _what_else(header: Header) -> str:
    """Returns a guess at what the file holds instead, and what to do with it."""
    keys = list(header.shapes)
    if any("lora" in key for key in keys):
        return "it holds LoRA weights; give the model they belong to, and this file with --lora"
    if any(key.startswith(("decoder.", "first_stage_model.")) for key in keys):
        return "it holds a VAE; give the model, and this file with --vae"
    if any(key.startswith(("down_blocks.", "up_blocks.")) for key in keys):
        return "it holds a UNet in diffusers' layout; give the whole pipeline's folder"
    first = keys[0] if keys else "none"
    return f"it has no {_UNET}… weights (its first is {first})"


def _declared_prediction_type(header: Header) -> str | None:
    """Returns the prediction type that a file names, by a marker or by ModelSpec's metadata."""
    if _V_PREDICTION_KEY in header.shapes:
        return "v_prediction"
    named = header.metadata.get("modelspec.prediction_type", "")
    return {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(named)


def _tokenizers(folder: Path) -> dict[str, CLIPTokenizer]:
    """Returns CLIP's tokenizers as the pipeline of a folder of ours takes them.

    OpenCLIP's text encoders are padded with "!", the vocabulary's first token.
    """
    if folder.name == "sdxl":
        return {"tokenizer": _clip_tokenizer(), "tokenizer_2": _clip_tokenizer(pad_token="!")}
    return {"tokenizer": _clip_tokenizer(**({"pad_token": "!"} if folder.name == "sd2" else {}))}


def _clip_tokenizer(**changes: str) -> CLIPTokenizer:
    """Returns CLIP's tokenizer from its merges.

    Source: CLIP's simple_tokenizer.py: the vocabulary is every byte's symbol, the same at a word's
    end, what each merge makes, and the two tokens that frame a prompt.
    """
    lines = (CHECKPOINT_CONFIGS / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines]
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **changes)


def _byte_symbols() -> list[str]:
    """Returns the 256 characters that stand for bytes: printable ones for themselves first."""
    spans = ((0x21, 0x7E), (0xA1, 0xAC), (0xAE, 0xFF))
    printable = [chr(code) for first, last in spans for code in range(first, last + 1)]
    return [*printable, *(chr(256 + number) for number in range(256 - len(printable)))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not the JSON object that diffusers writes")
    return content
