"""Small graphs of many shapes, exported as `cq-edge build` does, to measure and predict.

UNets of random weights (time does not depend on them) over widths, latents, kinds of blocks and
data types, each as full and shallow graph; text encoders and decoders beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.optimize import OptimizeConfig, optimize
from cq_edge.model.rewrite import rewrite_for_xnnpack
from exporters.graph_spec import GraphSpec, graph_specs
from exporters.to_executorch import example_inputs, export_executorch

WIDTHS = (
    (32, 64, 96),
    (48, 96, 144),
    (64, 128, 160),
    (96, 160, 192),
    (128, 192, 256),
    (160, 256, 320),
)
LATENTS = (8, 16, 24, 32, 48, 64)
DATA_TYPES = ("float32", "int8")
_LARGEST = 160 * 160 * 40 * 40  # width² · latents²: what runs in a fraction of a second
_EMBEDDING_WIDTH = 128


@dataclass(frozen=True, slots=True)
class Setting:
    """One exported file.

    Attributes:
        kind: "attention" (a UNet with transformers at all levels but the lowest), "convolution"
            (in the middle alone), "encode" (a text encoder) or "decode" (a decoder).
        widths: Channels of each level.
        latents: Height and width of the latents; layers of a text encoder.
        dtype: Of the weights: "float32" or "int8".
    """

    kind: str
    widths: tuple[int, ...]
    latents: int
    dtype: str = "float32"

    @property
    def is_unet(self) -> bool:
        """Whether it holds a full and a shallow graph."""
        return self.kind in ("attention", "convolution")

    @property
    def graphs(self) -> tuple[str, ...]:
        """The methods of its file."""
        return ("denoise", "denoise_shallow") if self.is_unet else (self.kind,)

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        return f"{self.kind}-{'.'.join(map(str, self.widths))}-{self.latents}-{self.dtype}"


def settings() -> tuple[Setting, ...]:
    """Returns what is measured: every width at every latents that is not too slow; the kinds take
    turns, so that each is there at every width and at every latents."""
    kinds = ("attention", "convolution")
    unets = [
        Setting(kinds[(row + column) % 2], widths, side, dtype)
        for row, widths in enumerate(WIDTHS)
        for column, side in enumerate(LATENTS)
        for dtype in DATA_TYPES
        if widths[0] ** 2 * side**2 <= _LARGEST
    ]
    texts = [Setting("encode", (w,), layers) for w, layers in ((64, 4), (128, 3), (256, 2))]
    decoders = [
        Setting("decode", widths, side)
        for widths, side in (
            ((16, 32), 8),
            ((16, 32, 32), 16),
            ((32, 64, 64), 16),
            ((32, 48, 64, 64), 16),
            ((24, 48), 32),
            ((64, 96), 24),
        )
    ]
    return (*unets, *texts, *decoders)


def export(setting: Setting, folder: Path) -> Path:
    """Returns the setting's `.pte` in a folder, made there unless it is there already."""
    path = folder / f"{setting.name}.pte"
    if not path.exists():
        torch.manual_seed(0)
        modules, specs = _unet(setting) if setting.is_unet else _other(setting)
        traced = {n: (modules[n].eval(), example_inputs(specs[n])) for n in setting.graphs}
        export_executorch(traced, path)
    return path


def specs_of(setting: Setting) -> Mapping[str, GraphSpec]:
    """Returns what the setting's graphs take and return."""
    side = setting.latents if setting.kind != "encode" else 1
    scale = 2 ** (len(setting.widths) - 1)
    width = _EMBEDDING_WIDTH if setting.kind != "encode" else setting.widths[0]
    image, feature = (side * scale,) * 2, setting.widths[0]
    return graph_specs((4, side, side), image, width, _feature_channels(setting), 2 * feature)


def _feature_channels(setting: Setting) -> int:
    """Of what enters the last layer of the last up block: of the layer before it."""
    return setting.widths[0]


def _unet(setting: Setting) -> tuple[Mapping[str, nn.Module], Mapping[str, GraphSpec]]:
    pipeline = load_pipeline()
    pipeline.unet = _random_unet(setting, pipeline)
    quantization = "int8" if setting.dtype == "int8" else "none"
    optimized = optimize(pipeline, OptimizeConfig(prompts=("",), quantization=quantization))
    return optimized.edge, specs_of(setting)


def _random_unet(setting: Setting, pipeline: StableDiffusionPipeline) -> UNet2DConditionModel:
    crosses = setting.kind == "attention"
    down = ("CrossAttnDownBlock2D" if crosses else "DownBlock2D",) * 2 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D" if crosses else "UpBlock2D",) * 2
    return UNet2DConditionModel(
        sample_size=setting.latents,
        block_out_channels=setting.widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=2,
        cross_attention_dim=pipeline.text_encoder.config.hidden_size,
        attention_head_dim=[width // (32 if width % 32 == 0 else 24) for width in setting.widths],
        norm_num_groups=16,
    ).eval()


def _other(setting: Setting) -> tuple[Mapping[str, nn.Module], Mapping[str, GraphSpec]]:
    module = _text_encoder(setting) if setting.kind == "encode" else _decoder(setting)
    return {setting.kind: rewrite_for_xnnpack(module.eval())}, specs_of(setting)


def _text_encoder(setting: Setting) -> nn.Module:
    (width,) = setting.widths
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=setting.latents,
        num_attention_heads=width // 32,
        max_position_embeddings=77,
        bos_token_id=998,
        eos_token_id=999,
    )
    return EncodeGraph(CLIPTextModel(config).eval())


def _decoder(setting: Setting) -> nn.Module:
    levels = len(setting.widths)
    return DecodeGraph(
        AutoencoderKL(
            block_out_channels=setting.widths,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            mid_block_add_attention=setting.latents <= 16,
        ).eval()
    )
