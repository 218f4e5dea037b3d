"""The whole method on one page: a pipeline becomes the graphs and tables of a bundle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from cq_edge.errors import UsageError
from cq_edge.model.capture import Calibration, FullGraph, ShallowGraph, capture
from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.prompts import embed_prompts, token_ids
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import FullUNet, ShallowUNet, split_unet
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

QUANTIZATIONS = ("int8", "none")


@dataclass(frozen=True, slots=True)
class OptimizeConfig:
    """What to calibrate for and how to quantise.

    `prompts` calibrate; `max_gap` is the largest gap measured, in steps; `quantization` is
    "int8" (int8 weights, dynamic int8 activations) or "none" (float32).
    """

    prompts: tuple[str, ...]
    noise_scheduler: str = "pndm"
    steps: int = 50
    guidance_scale: float = 7.5
    max_gap: int = 10
    shallow_layers: int = 1
    quantization: str = "int8"

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise UsageError(
                f"quantization is {self.quantization!r}: choose {' or '.join(QUANTIZATIONS)}"
            )
        if self.max_gap < 1:
            raise UsageError(f"max_gap is {self.max_gap}: a shallow step needs 1 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Optimized:
    """The float modules, and what becomes files.

    `reference` and `edge` hold the same four graphs by name: the pipeline's own float
    modules, and the rewritten, quantised ones that are exported. `feature_channels` is the C of
    the cached feature.
    """

    reference: dict[str, nn.Module]
    edge: dict[str, nn.Module]
    noise_schedule: NoiseScheduleConfig
    feature_channels: int


def optimize(pipeline: StableDiffusionPipeline, config: OptimizeConfig) -> Optimized:
    """Splits, rewrites and quantises a pipeline; `calibrate` follows once it is exported.

    Args:
        pipeline: As `load_pipeline` returns it; left as it was.
        config: How to split and quantise.

    Raises:
        ModelError: If the UNet cannot be split.
    """
    full, shallow = split_unet(pipeline.unet, config.shallow_layers)
    edge_full, edge_shallow = edge_unet(full, shallow, config.quantization)
    decode = DecodeGraph(pipeline.vae)
    reference: dict[str, nn.Module] = {
        "encode": _FirstOutput(pipeline.text_encoder),
        "denoise": full,
        "denoise_shallow": shallow,
        "decode": decode,
    }
    edge: dict[str, nn.Module] = {
        "encode": rewrite_for_xnnpack(EncodeGraph(pipeline.text_encoder)),
        "denoise": edge_full,
        "denoise_shallow": edge_shallow,
        "decode": rewrite_for_xnnpack(decode),
    }
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    return Optimized(reference, edge, noise_schedule, shallow.feature_channels)


def calibrate(
    pipeline: StableDiffusionPipeline,
    config: OptimizeConfig,
    full: FullGraph,
    shallow: ShallowGraph,
    on_step: Callable[[], object] = lambda: None,
) -> Calibration:
    """Runs the prompts through the graphs that ship and measures what reuse costs.

    Args:
        pipeline: Gives the prompts' embeddings and the noise schedule.
        config: What to calibrate for.
        full: The full graph; exported ones are faster than eager modules, and the real thing.
        shallow: The shallow graph.
        on_step: Called after every step of the two runs per prompt, for progress bars.

    Raises:
        CalibrationError: If a graph gives something non-finite.
        ScheduleError: If the noise scheduler or its number of steps is not possible.
    """
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    side = pipeline.unet.config.sample_size
    return capture(
        full,
        shallow,
        embed_prompts(pipeline, config.prompts),
        make_noise_scheduler(config.noise_scheduler, config.steps, noise_schedule),
        (pipeline.unet.config.in_channels, side, side),
        guidance_scale=config.guidance_scale,
        max_gap=config.max_gap,
        on_step=on_step,
    )


def parity_inputs(
    pipeline: StableDiffusionPipeline, config: OptimizeConfig, calibration: Calibration
) -> dict[str, list[dict[str, NDArray[Any]]]]:
    """Returns for each graph the inputs to check its export with, all from calibration."""
    full, shallow = [], []
    for sample in calibration.samples:
        inputs = {
            "latents": sample.latents,
            "timestep": np.array([sample.timestep], np.float32),
            "embeddings": sample.embeddings,
        }
        correction = calibration.table.correction(sample.step - sample.gap, sample.step)
        reused = {"cached_feature": sample.anchor_feature}
        full.append(inputs)
        shallow.append({**inputs, **reused, "gain": correction.gain, "bias": correction.bias})
    return {
        "encode": [{"input_ids": token_ids(pipeline, text).numpy()} for text in config.prompts],
        "denoise": full,
        "denoise_shallow": shallow,
        "decode": [{"latents": latents} for latents in calibration.final_latents],
    }


class _FirstOutput(nn.Module):
    """A module that returns a record, reduced to the record's first tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        first: Tensor = self.module(*inputs)[0]
        return first


@torch.no_grad()
def edge_unet(full: FullUNet, shallow: ShallowUNet, quantization: str) -> tuple[nn.Module, ...]:
    """Returns rewritten and quantised copies of the two modules, still sharing their parts."""
    both = rewrite_for_xnnpack(nn.ModuleList([full, shallow]))
    if quantization == "int8":
        both = quantize_for_xnnpack(both)
    return tuple(both)
