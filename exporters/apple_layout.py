"""The graphs as Apple's Swift `StableDiffusionPipeline` wants them.

Source: ml-stable-diffusion's swift/StableDiffusion/pipeline: TextEncoder.swift takes ids as
float32 and reads `last_hidden_state`; Unet.swift runs both branches as a batch of two, with
embeddings (B, D, 1, L), and reads the model's only output; Decoder.swift divides latents by
0.18215 whatever the autoencoder's own factor is, and takes pictures from -1 to 1.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cq_edge.manifest import TensorSpec
from exporters.graph_spec import GraphSpec
from exporters.parity import Arrays

_LATENT_FACTOR = 0.18215
_BRANCHES = 2


def apple_modules(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the modules of `encode`, `denoise` and `decode` in Apple's form."""
    return {
        "encode": _TextEncoder(modules["encode"]).eval(),
        "denoise": _Unet(modules["denoise"]).eval(),
        "decode": _Decoder(modules["decode"]).eval(),
    }


def apple_specs(specs: Mapping[str, GraphSpec]) -> dict[str, GraphSpec]:
    """Returns their contracts."""
    latents, _, embeddings = specs["denoise"].inputs
    _, tokens, width = embeddings.shape
    shape = (_BRANCHES, *latents.shape[1:])
    predicted, image = specs["denoise"].outputs[0], specs["decode"].outputs[0]
    return {
        "encode": GraphSpec(
            "encode",
            (TensorSpec("input_ids", (1, tokens), "float32"),),
            (TensorSpec("last_hidden_state", embeddings.shape, "float32"),),
        ),
        "denoise": GraphSpec(
            "denoise",
            (
                TensorSpec("sample", shape, "float32"),
                TensorSpec("timestep", (_BRANCHES,), "float32"),
                TensorSpec("encoder_hidden_states", (_BRANCHES, width, 1, tokens), "float32"),
            ),
            (TensorSpec(predicted.name, shape, "float32"),),
        ),
        "decode": GraphSpec(
            "decode",
            (TensorSpec("z", latents.shape, "float32"),),
            (TensorSpec(image.name, image.shape, "float32"),),
        ),
    }


def apple_inputs(graph: str, arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """Returns a graph's inputs in Apple's form, both branches alike."""
    if graph == "encode":
        return {"input_ids": arrays["input_ids"].astype(np.float32)}
    latents = arrays["latents"].astype(np.float32)
    if graph == "decode":
        return {"z": latents / np.float32(_LATENT_FACTOR)}
    embeddings = arrays["embeddings"].astype(np.float32).transpose(0, 2, 1)[:, :, None]
    return {
        "sample": latents.repeat(_BRANCHES, 0),
        "timestep": arrays["timestep"].astype(np.float32).repeat(_BRANCHES),
        "encoder_hidden_states": embeddings.repeat(_BRANCHES, 0),
    }


class _TextEncoder(nn.Module):
    def __init__(self, encode: nn.Module) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns (1, L, D) embeddings of (1, L) ids that are float32."""
        embeddings: Tensor = self.encode(input_ids.to(torch.int32))
        return embeddings


class _Unet(nn.Module):
    def __init__(self, full: nn.Module) -> None:
        super().__init__()
        self.full = full

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Returns the (2, 4, h, w) noise prediction of both branches."""
        embeddings = encoder_hidden_states.squeeze(2).transpose(1, 2)
        noise_pred: Tensor = self.full(sample, timestep, embeddings)[0]
        return noise_pred


class _Decoder(nn.Module):
    def __init__(self, decode: nn.Module) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, z: Tensor) -> Tensor:
        """Returns the (1, 3, H, W) picture, -1 to 1, of latents over 0.18215."""
        picture: Tensor = self.decode(z * _LATENT_FACTOR) * 2 - 1
        return picture
