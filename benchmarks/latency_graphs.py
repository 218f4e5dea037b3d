"""Small graphs of many shapes, exported as `cq-edge build` does, to measure and predict.

UNets of random weights (time does not depend on them) over widths, latents, kinds of blocks and
data types, each as full and shallow graph; beside them text encoders, decoders and single
operators.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.latency_operators import GRAPH as OPERATOR
from benchmarks.latency_operators import operator_module, operator_settings, operator_spec
from benchmarks.latency_setting import DATA_TYPES, LATENTS, WIDTHS, Setting
from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.optimize import OptimizeConfig, optimize
from cq_edge.model.rewrite import rewrite_for_xnnpack
from exporters.graph_spec import GraphSpec, graph_specs
from exporters.to_executorch import example_inputs, export_executorch

_EMBEDDING_WIDTH = 128


def settings() -> tuple[Setting, ...]:
    """Returns what is measured: every width at half of the latents and every latents at half of
    the widths, a checkerboard; either kind is there at every width and at every latents. Of the
    full graphs, which take a minute or two to export, only some."""
    kinds = ("attention", "convolution")

    def is_wanted(setting: Setting) -> bool:
        quick = setting.kind == "convolution" or setting.widths == WIDTHS[4]
        return setting.graph == "denoise_shallow" or (quick and setting.latents <= 24)

    unets = [
        Setting(graph, kinds[(row + column) // 2 % 2], widths, side, dtype)
        for graph in ("denoise_shallow", "denoise")
        for row, widths in enumerate(WIDTHS)
        for column, side in enumerate(LATENTS)
        for dtype in DATA_TYPES
        if (row + column) % 2 == 0
    ]
    texts = [Setting("encode", "text", (w,), layers) for w, layers in ((64, 4), (256, 2))]
    decoders = [
        Setting("decode", "picture", widths, side)
        for widths, side in (
            ((16, 32), 8),
            ((16, 32, 32), 16),
            ((32, 48, 64, 64), 16),
            ((64, 96), 24),
        )
    ]
    return (*operator_settings(), *filter(is_wanted, unets), *texts, *decoders)


def export(setting: Setting, folder: Path) -> Path:
    """Returns the setting's `.pte` in a folder, made there unless it is there already."""
    path = folder / f"{setting.name}.pte"
    if not path.exists():
        torch.manual_seed(0)
        module, spec = _module(setting).eval(), spec_of(setting)
        export_executorch({setting.graph: (module, example_inputs(spec))}, path)
    return path


def spec_of(setting: Setting) -> GraphSpec:
    """Returns what the setting's graph takes and returns."""
    if setting.graph == OPERATOR:
        return operator_spec(setting)
    is_text, first = setting.graph == "encode", setting.widths[0]
    side = 1 if is_text else setting.latents
    scale = 2 ** (len(setting.widths) - 1)
    embedding = first if is_text else _EMBEDDING_WIDTH
    specs = graph_specs((4, side, side), (side * scale,) * 2, embedding, first, 2 * first)
    return specs[setting.graph]


def _module(setting: Setting) -> nn.Module:
    if setting.graph == OPERATOR:
        return operator_module(setting)
    if setting.graph == "encode":
        return rewrite_for_xnnpack(_text_encoder(setting))
    if setting.graph == "decode":
        return rewrite_for_xnnpack(_decoder(setting))
    pipeline = load_pipeline()
    pipeline.unet = _random_unet(setting, pipeline)
    quantization = "int8" if setting.dtype == "int8" else "none"
    config = OptimizeConfig(prompts=("",), quantization=quantization)
    return optimize(pipeline, config).edge[setting.graph]


def _random_unet(setting: Setting, pipeline: StableDiffusionPipeline) -> UNet2DConditionModel:
    crosses = "CrossAttn" if setting.kind == "attention" else ""
    down, up = (f"{crosses}DownBlock2D", "DownBlock2D"), ("UpBlock2D", f"{crosses}UpBlock2D")
    return UNet2DConditionModel(
        sample_size=setting.latents,
        block_out_channels=setting.widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        cross_attention_dim=pipeline.text_encoder.config.hidden_size,
        attention_head_dim=[width // (32 if width % 32 == 0 else 24) for width in setting.widths],
        norm_num_groups=16,
    ).eval()


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
