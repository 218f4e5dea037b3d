"""The loop of a bundle's full graph at every step, watched as calibration watches it."""

import torch
from torch import Tensor

from cq_edge.model.trajectory import FullGraph, Loop, Prompt
from cq_edge.noise_scheduler import make_noise_scheduler
from runtime.bundle import Bundle
from runtime.engine import Engine
from runtime.generate import encode_prompt

_SEED = 3_000


def full_graph(engine: Engine, bundle: Bundle) -> FullGraph:
    """Returns the bundle's full graph as a function of tensors."""
    names = [spec.name for spec in bundle.manifest.graph("denoise").inputs]

    def full(*given: Tensor) -> tuple[Tensor, Tensor]:
        arrays = (x.numpy() for x in given)
        outputs = engine.run("denoise", dict(zip(names, arrays, strict=True)))
        noise_pred, feature = (torch.from_numpy(x) for x in outputs.values())
        return noise_pred, feature

    return full


def full_loop(engine: Engine, bundle: Bundle) -> Loop:
    """Returns the loop with the bundle's own noise scheduler, steps and guidance."""
    manifest = bundle.manifest
    defaults, size = manifest.defaults, manifest.latents
    return Loop(
        full_graph(engine, bundle),
        make_noise_scheduler(defaults.noise_scheduler, defaults.steps, manifest.noise_schedule),
        (size.channels, size.height, size.width),
        defaults.guidance_scale,
        seed=_SEED,
    )


def prompt_contexts(engine: Engine, bundle: Bundle, caption: str) -> Prompt:
    """Returns what the graph is told of the empty prompt and of a caption."""
    negative, prompt = (
        tuple(map(torch.from_numpy, encode_prompt(engine, bundle.tokenizers(), text)[0].values()))
        for text in ("", caption)
    )
    return negative, prompt
