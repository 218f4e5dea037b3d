"""The whole method on one page: a pipeline becomes the graphs and tables of a bundle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

from cq_edge.errors import UsageError
from cq_edge.forecast_share import forecast_share
from cq_edge.manifest import TOKEN_INPUTS
from cq_edge.model.capture import RUNS, Calibration, capture
from cq_edge.model.eight_bit_unet import eight_bit_unet
from cq_edge.model.four_bits import FourBits
from cq_edge.model.graphs import decode_graph
from cq_edge.model.mixed_precision import choose_four_bits
from cq_edge.model.plan_trial import scaled_to_trial, typical_distance
from cq_edge.model.prompts import embed_prompts, guidance_kind, token_ids
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.reuse_trial import Consumers, Graphs, ShallowGraph
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import FullUNet, ShallowUNet, context_shapes, split_unet
from cq_edge.model.text import text_graph, text_reference
from cq_edge.model.trajectory import FullGraph, Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

QUANTIZATIONS = ("int8", "none")
_COMPARED_PROMPTS = 4  # what noise schedulers and steps are compared on
# layers are tried at four bits in runs of the first number of steps, and rounded for the inputs of
# runs of the others: steps that layers see again and again would be fitted too well
_FOUR_BIT_STEPS = (5, 6, 7, 8, 9, 11, 12, 13, 14)


@dataclass(frozen=True, slots=True)
class OptimizeConfig:
    """What to calibrate for and how to quantise.

    `prompts` calibrate; `max_gap` is the largest gap measured, in steps; `quantization` is
    "int8" (int8 weights, dynamic int8 activations) or "none" (float32); `compression` asks for
    UNet weights so many times smaller than float32, by four bits in some Linear layers; `also`
    are noise schedulers with sampler steps to calibrate for beside the first.
    """

    prompts: tuple[str, ...]
    noise_scheduler: str = "pndm"
    steps: int = 50
    guidance_scale: float = 7.5
    max_gap: int = 10
    shallow_layers: int = 1
    quantization: str = "int8"
    compression: float | None = None
    also: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise UsageError(
                f"quantization is {self.quantization!r}: choose {' or '.join(QUANTIZATIONS)}"
            )
        if self.max_gap < 1:
            raise UsageError(f"max_gap is {self.max_gap}: a shallow step needs 1 or more")
        if self.compression is not None and self.quantization == "none":
            raise UsageError("a compression cannot be had with quantization none: choose int8")


@dataclass(frozen=True, slots=True, eq=False)
class Optimized:
    """The float modules, and what becomes files.

    `reference` and `edge` hold the same graphs by name: the pipeline's own float modules, and the
    rewritten, quantised ones that ExecuTorch exports (none of `float_graphs`).
    `feature_channels` is the C of the cached feature, `consumed_channels` those of the layers
    that consume it.
    """

    reference: dict[str, nn.Module]
    edge: dict[str, nn.Module]
    noise_schedule: NoiseScheduleConfig
    feature_channels: int
    consumed_channels: int

    def released(self) -> "Optimized":
        """Returns what is exported, and no longer holds the float modules of it."""
        return replace(self, reference={})

    def exported(self) -> "Optimized":
        """Returns what is needed of the edge modules once files hold them: the shallow one, whose
        layers are fitted to."""
        return replace(self, edge={"denoise_shallow": self.edge["denoise_shallow"]})

    def compared_with(self, pipeline: DiffusionPipeline, config: OptimizeConfig) -> "Optimized":
        """Returns it with the float modules of the pipeline, loaded again."""
        full_and_shallow = split_unet(pipeline.unet, config.shallow_layers)
        return replace(self, reference=_reference(pipeline, *full_and_shallow))


def optimize(
    pipeline: DiffusionPipeline,
    config: OptimizeConfig,
    on_layer: Callable[[], object] = lambda: None,
) -> Optimized:
    """Splits, rewrites and quantises a pipeline; `calibrate` follows once it is exported.

    Args:
        pipeline: As `load_pipeline` returns it; left as it was.
        config: How to split and quantise.
        on_layer: Called as `choose_four_bits` does, for progress bars.

    Raises:
        ModelError: If the UNet cannot be split.
        UsageError: If the compression asked for cannot be had.
    """
    full, shallow = split_unet(pipeline.unet, config.shallow_layers)
    edge_full, edge_shallow = _edge_unet(pipeline, config, full, shallow, on_layer)
    reference = _reference(pipeline, full, shallow)
    text = text_graph(pipeline)
    edge: dict[str, nn.Module] = {
        **({} if text is None else {"encode": rewrite_for_xnnpack(text)}),
        "denoise": edge_full,
        "denoise_shallow": edge_shallow,
        "decode": rewrite_for_xnnpack(reference["decode"]),
    }
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    channels = (shallow.feature_channels, shallow.consumed_channels)
    return Optimized(reference, edge, noise_schedule, *channels)


def float_graphs(pipeline: DiffusionPipeline, config: OptimizeConfig) -> Optimized:
    """Splits a pipeline and leaves it as it is, for a toolchain that compresses weights itself.

    Raises:
        ModelError: If the UNet cannot be split.
    """
    full, shallow = split_unet(pipeline.unet, config.shallow_layers)
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    reference = _reference(pipeline, full, shallow)
    channels = (shallow.feature_channels, shallow.consumed_channels)
    return Optimized(reference, {}, noise_schedule, *channels)


def calibrate(
    pipeline: DiffusionPipeline,
    config: OptimizeConfig,
    optimized: Optimized,
    full: FullGraph,
    shallow: ShallowGraph,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[Calibration, ...]:
    """Runs the prompts through the graphs that ship and measures what reuse costs, for each noise
    scheduler with its steps, the bundle's own first.

    Args:
        pipeline: Gives the prompts' embeddings and the noise schedule.
        config: What to calibrate for.
        optimized: The modules: the float ones are what errors are measured against, and what
            reuse alone is measured with; the edge shallow one fits the quantisation correction.
        full: The full graph; exported ones are faster than eager modules, and the real thing.
        shallow: The shallow graph.
        on_step: Called after every step that is run (`calibration_steps`), for progress bars.

    Raises:
        CalibrationError: If a graph gives something non-finite.
        ScheduleError: If the noise scheduler or its number of steps is not possible.
    """
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    prompts = embed_prompts(pipeline, config.prompts, config.guidance_scale)
    shape, scale = latents_shape(pipeline), _branch_scale(pipeline, config)
    float_shallow = optimized.reference["denoise_shallow"]
    shipped = optimized.edge.get("denoise_shallow", float_shallow)
    consumers = Consumers(
        cast(ShallowUNet, shipped).consumed, cast(ShallowUNet, float_shallow).consumed
    )
    compared = prompts[:_COMPARED_PROMPTS]
    calibrations: list[Calibration] = []
    own: list[Tensor] | None = None
    for name, steps in ((config.noise_scheduler, config.steps), *config.also):
        noise_scheduler = make_noise_scheduler(name, steps, noise_schedule)
        calibration = capture(
            Graphs(full, shallow),
            Graphs(optimized.reference["denoise"], float_shallow),
            consumers,
            prompts,
            noise_scheduler,
            shape,
            guidance_scale=scale,
            max_gap=config.max_gap,
            on_step=on_step,
        )
        finals, exact = (
            [*map(from_numpy, latents[: len(compared)])]
            for latents in (calibration.final_latents, calibration.exact_latents)
        )
        own = own or exact
        table = replace(calibration.table, base_error=typical_distance(exact, own))
        loop = Loop(full, noise_scheduler, shape, scale)
        steady = calibration.steady_noise
        table = scaled_to_trial(table, loop, shallow, compared, finals, exact, steady, on_step)
        share = forecast_share(table, noise_scheduler)
        calibrations.append(replace(calibration, table=replace(table, forecast_share=share)))
    return tuple(calibrations)


def calibration_steps(prompts: int, totals: Sequence[int]) -> int:
    """Returns how many steps `calibrate` runs for so many prompts and each T."""
    return (RUNS * prompts + min(prompts, _COMPARED_PROMPTS)) * sum(totals)


def parity_inputs(
    pipeline: DiffusionPipeline, config: OptimizeConfig, calibration: Calibration
) -> dict[str, list[dict[str, NDArray[Any]]]]:
    """Returns for each graph the inputs to check its export with, all from calibration."""
    full, shallow = [], []
    names = context_shapes(pipeline.unet)
    for sample in calibration.samples:
        inputs = {
            "latents": sample.latents,
            "timestep": np.array([sample.timestep], np.float32),
            **dict(zip(names, sample.context, strict=True)),
        }
        correction = calibration.table.correction(sample.step - sample.gap, sample.step)
        reused = {"cached_feature": sample.anchor_feature}
        full.append(inputs)
        shallow.append({**inputs, **reused, **correction.inputs()})
    found = {
        "denoise": full,
        "denoise_shallow": shallow,
        "decode": [{"latents": latents} for latents in calibration.final_latents],
    }
    if text_reference(pipeline) is None:
        return found
    ids = [token_ids(pipeline, text) for text in config.prompts]
    arrays = [map(Tensor.numpy, each) for each in ids]
    return {"encode": [dict(zip(TOKEN_INPUTS, each, strict=False)) for each in arrays], **found}


def _reference(
    pipeline: DiffusionPipeline, full: nn.Module, shallow: nn.Module
) -> dict[str, nn.Module]:
    text = text_reference(pipeline)
    return {
        **({} if text is None else {"encode": text}),
        "denoise": full,
        "denoise_shallow": shallow,
        "decode": decode_graph(_decoder(pipeline)),
    }


def _branch_scale(pipeline: DiffusionPipeline, config: OptimizeConfig) -> float:
    """Returns the scale that guides by two calls; 1 where one call does."""
    return config.guidance_scale if guidance_kind(pipeline) == "two_calls" else 1.0


def _edge_unet(
    pipeline: DiffusionPipeline,
    config: OptimizeConfig,
    full: FullUNet,
    shallow: ShallowUNet,
    on_layer: Callable[[], object],
) -> nn.ModuleList:
    """Returns the full and the shallow graph as ExecuTorch exports them."""
    if config.quantization == "none":
        return rewrite_for_xnnpack(nn.ModuleList([full, shallow]))
    if config.compression is None:
        return eight_bit_unet(full, shallow)
    # layers are tried at four bits in the whole rewritten graph
    both = rewrite_for_xnnpack(nn.ModuleList([full, shallow]))
    chosen = _four_bits(pipeline, config, config.compression, both[0], on_layer)
    return quantize_for_xnnpack(both, four_bits={f"0.{k}": v for k, v in chosen.items()})


def _four_bits(
    pipeline: DiffusionPipeline,
    config: OptimizeConfig,
    compression: float,
    full: nn.Module,
    on_layer: Callable[[], object],
) -> dict[str, FourBits]:
    """Returns the weights of the rewritten full graph's layers that are to have four bits."""
    noise_schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    return choose_four_bits(
        full,
        compression,
        embed_prompts(pipeline, config.prompts, config.guidance_scale),
        [make_noise_scheduler("ddim", steps, noise_schedule) for steps in _FOUR_BIT_STEPS],
        latents_shape(pipeline),
        _branch_scale(pipeline, config),
        on_layer,
    )


def latents_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """Returns channels, height and width of the latents."""
    config = pipeline.unet.config
    return (config.in_channels, config.sample_size, config.sample_size)


def pixels_per_cell(pipeline: DiffusionPipeline) -> int:
    """Returns how many pixels the decoder makes of a latent cell, in height and in width."""
    vae = _decoder(pipeline)
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def _decoder(pipeline: DiffusionPipeline) -> Any:
    """Returns the autoencoder, None of a pipeline that works on pixels."""
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
