"""The whole method on one page: a pipeline becomes the graphs and tables of a bundle."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from cq_edge.errors import UsageError
from cq_edge.model.capture import Calibration, capture
from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.prompts import embed_prompts
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
    """The float modules, what becomes files, and what calibration measured.

    `reference` and `edge` hold the same four graphs by name: the pipeline's own float
    modules, and the rewritten, quantised ones that are exported.
    """

    reference: dict[str, nn.Module]
    edge: dict[str, nn.Module]
    calibration: Calibration
    noise_schedule: NoiseScheduleConfig


def optimize(
    pipeline: StableDiffusionPipeline,
    config: OptimizeConfig,
    on_step: Callable[[], object] = lambda: None,
) -> Optimized:
    """Splits, calibrates, rewrites and quantises a pipeline.

    Args:
        pipeline: As `load_pipeline` returns it; left as it was.
        config: What to calibrate for and how to quantise.
        on_step: Called after every denoiser step of the calibration, for progress bars.

    Raises:
        ModelError: If the UNet cannot be split.
        CalibrationError: If the denoiser gives a non-finite prediction.
        ScheduleError: If the noise scheduler or its number of steps is not possible.
    """
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    full, shallow = split_unet(pipeline.unet, config.shallow_layers)
    side = pipeline.unet.config.sample_size
    calibration = capture(
        full,
        embed_prompts(pipeline, config.prompts),
        make_noise_scheduler(config.noise_scheduler, config.steps, noise_schedule),
        (pipeline.unet.config.in_channels, side, side),
        guidance_scale=config.guidance_scale,
        max_gap=config.max_gap,
        on_step=on_step,
    )
    encode, decode = EncodeGraph(pipeline.text_encoder), DecodeGraph(pipeline.vae)
    reference: dict[str, nn.Module] = {
        "encode": encode,
        "denoise": full,
        "denoise_shallow": shallow,
        "decode": decode,
    }
    edge_full, edge_shallow = edge_unet(full, shallow, config.quantization)
    edge: dict[str, nn.Module] = {
        "encode": encode,
        "denoise": edge_full,
        "denoise_shallow": edge_shallow,
        "decode": rewrite_for_xnnpack(decode),
    }
    return Optimized(reference, edge, calibration, noise_schedule)


@torch.no_grad()
def edge_unet(full: FullUNet, shallow: ShallowUNet, quantization: str) -> tuple[nn.Module, ...]:
    """Returns rewritten and quantised copies of the two modules, still sharing their parts."""
    both = rewrite_for_xnnpack(nn.ModuleList([full, shallow]))
    if quantization == "int8":
        both = quantize_for_xnnpack(both)
    return tuple(both)
