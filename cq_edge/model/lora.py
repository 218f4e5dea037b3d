"""LoRA weights added to a pipeline's own, before anything is quantised."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from cq_edge.errors import ModelError
from cq_edge.model.pickled import refuse_pickle
from cq_edge.model.single_file import read_header

# the first of the two matrices of a layer, as diffusers, peft and kohya's scripts name it
_FIRST_MATRIX = re.compile(r"(lora_down|lora_A|lora\.down|lora_linear_layer\.down)\.")
_ADAPTER = "cq_edge"


@dataclass(frozen=True, slots=True)
class Lora:
    """A `.safetensors` file of LoRA weights, and the factor that they are added with."""

    path: Path
    weight: float = 1.0


def fuse_loras(pipeline: DiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Adds each LoRA to the weights of the pipeline's UNet and text encoders, in turn.

    diffusers and peft read the files (of diffusers', peft's and kohya's kinds) and add them.

    Raises:
        ModelError: A file holds no LoRA, weights that are not finite or of other shapes, or
            layers that the pipeline has not.
    """
    for lora in loras:
        _fuse(pipeline, lora)


def _fuse(pipeline: DiffusionPipeline, lora: Lora) -> None:
    weights = _read(lora.path)
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(f"{lora.path} cannot be added: a {type(pipeline).__name__} takes no LoRA")
    wanted = sum(bool(_FIRST_MATRIX.search(key)) for key in weights)
    try:
        pipeline.load_lora_weights(weights, adapter_name=_ADAPTER)
        found = sum(map(_adapted, _networks(pipeline)))
        if found == wanted:
            pipeline.fuse_lora(
                lora_scale=lora.weight, adapter_names=[_ADAPTER], components=_fusible(pipeline)
            )
    except (ValueError, RuntimeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(
            f"{lora.path} does not fit this model: {_last_line(error)}; a LoRA fits the kind of "
            "model that it was trained on"
        ) from error
    if found != wanted:
        raise ModelError(
            f"{lora.path} does not fit this model: {wanted - found} of its {wanted} layers are "
            "none of the model's; a LoRA fits the kind of model that it was trained on"
        )
    pipeline.unload_lora_weights()


def _read(path: Path) -> dict[str, Tensor]:
    refuse_pickle(path)
    if not path.is_file():
        raise ModelError(f"{path} is no file: give LoRA weights as one .safetensors file")
    header = read_header(path)
    if not any(_FIRST_MATRIX.search(key) for key in header.shapes):
        first = next(iter(header.shapes), "none")
        raise ModelError(
            f"{path} holds no LoRA weights (its first are {first}): kinds such as LoKr and LoHa "
            "cannot be added"
        )
    weights = load_file(path)
    for key, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ModelError(f"{path} is damaged: its {key} is not finite")
    return weights


def _networks(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _adapted(network: nn.Module) -> int:
    """Returns how many layers of a network have the LoRA."""
    return sum(_ADAPTER in getattr(layer, "lora_A", ()) for layer in network.modules())


def _fusible(pipeline: DiffusionPipeline) -> list[str]:
    """Returns the names of the components that have LoRA layers."""
    parts = pipeline.components.items()
    return [n for n, part in parts if isinstance(part, nn.Module) and _adapted(part)]


def _last_line(error: Exception) -> str:
    """Returns the line that says what is wrong: torch puts it last."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1].strip().rstrip(".")
