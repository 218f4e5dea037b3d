"""Which layers take four bits, so that the UNet fits a size: those that cost least.

Linear layers come first. XNNPACK has no convolution of four bits: as a linear layer it is slower,
and is chosen only where the linear layers do not save enough.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cq_edge.errors import UsageError
from cq_edge.influence import step_influence
from cq_edge.model.four_bits import GROUP, WIDEST, FourBits, compensated, nearest
from cq_edge.model.quantize import FLOAT_LAYERS, is_named
from cq_edge.model.trajectory import Prompt
from cq_edge.model.unfolded_conv import (
    can_unfold,
    folded_weight,
    neighbourhoods,
    unfolded_weight,
)
from cq_edge.noise_scheduler import NoiseScheduler

Layer = nn.Linear | nn.Conv2d
_Run = tuple[int, Prompt, NoiseScheduler]  # with the seed of its noise first
_TRIED_PROMPTS = 2
_PRODUCTS_BYTES = 2 << 30
_SCALE_BYTES, _GROUP_SCALE_BYTES = 4, 2  # XNNPACK's are float32 and bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """What the full graph sees at a step, both branches, and how much that step matters."""

    inputs: tuple[Tensor, ...]
    weight: float


@torch.no_grad()
def choose_four_bits(
    full: nn.Module,
    compression: float,
    prompts: Sequence[Prompt],
    noise_schedulers: Sequence[NoiseScheduler],
    latents_shape: tuple[int, int, int],
    guidance_scale: float,
    on_layer: Callable[[], object] = lambda: None,
) -> dict[str, FourBits]:
    """Returns the weights of the layers of `full` that are to have four bits, by name.

    Each candidate is rounded to four bits for the inputs that it has in short runs of the loop.
    With it alone rounded the guided noise prediction's squared error is measured over other runs,
    weighted by each step's influence. Layers are taken in the order of that error per byte saved.

    Args:
        full: The rewritten `FullUNet`, float; weights are put back.
        compression: Float32 bytes of the parameters over bytes of the weights stored, at least.
        prompts: The contexts of some prompts. Errors are measured on the first.
        noise_schedulers: Of a few steps, different ones each. The first measures errors; with each
            of the others a prompt is run, the last ones first, for the inputs.
        latents_shape: (4, h, w).
        guidance_scale: Of the guided prediction.
        on_layer: Called after each candidate that was rounded, and again after its error was
            measured, for progress bars.

    Raises:
        UsageError: The layers there are do not save enough; says how much is possible.
    """
    target = 4 * sum(p.numel() for p in full.parameters()) / compression
    chosen: list[str] = []
    layers: Mapping[str, Layer] = linear_candidates(full)
    if stored_bytes(full, layers) > target:
        chosen, layers = list(layers), conv_candidates(full)
    smallest = stored_bytes(full, {*chosen, *layers})
    if smallest > target:
        most = compression * target / smallest
        raise UsageError(
            f"the UNet cannot be {compression:g} times smaller: with four bits wherever they are "
            f"possible it is {most:.2f} times smaller; ask for less"
        )
    measuring, *others = noise_schedulers
    tried = [(seed, prompt, measuring) for seed, prompt in enumerate(prompts[:_TRIED_PROMPTS])]
    seen = [
        (_TRIED_PROMPTS + i, prompts[-1 - i % len(prompts)], noise_scheduler)
        for i, noise_scheduler in enumerate(others)
    ]
    rounded = _rounded(full, [*chosen, *layers], seen, latents_shape, on_layer)
    samples = [sample for run in tried for sample in _samples(full, *run, latents_shape)]
    errors = _errors(full, layers, rounded, samples, guidance_scale, on_layer)
    saved = {name: _saved_bytes(layer) for name, layer in layers.items()}
    for name in sorted(layers, key=lambda name: errors[name] / saved[name]):
        if stored_bytes(full, chosen) <= target:
            break
        chosen.append(name)
    return {name: rounded[name] for name in chosen}


def linear_candidates(full: nn.Module) -> dict[str, nn.Linear]:
    """Returns the Linear layers that can have four bits, by name."""
    return {
        name: module
        for name, module in full.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % GROUP == 0
        and not is_named(name, FLOAT_LAYERS)
    }


def conv_candidates(full: nn.Module) -> dict[str, nn.Conv2d]:
    """Returns the convolutions that can have four bits, by name."""
    return {
        name: module
        for name, module in full.named_modules()
        if isinstance(module, nn.Conv2d)
        and can_unfold(module)
        and module.in_channels % GROUP == 0
        and not is_named(name, FLOAT_LAYERS)
    }


def stored_bytes(full: nn.Module, four_bits: Collection[str]) -> int:
    """Returns about how many bytes the quantised weights of a float graph take in a file."""
    total = 0
    for name, module in full.named_modules():
        for parameter in module.parameters(recurse=False):
            is_weight = isinstance(module, nn.Linear | nn.Conv2d) and parameter.dim() > 1
            if not is_weight or is_named(name, FLOAT_LAYERS):
                total += 4 * parameter.numel()
            elif name in four_bits:
                total += parameter.numel() // 2 + _GROUP_SCALE_BYTES * (parameter.numel() // GROUP)
            else:
                total += parameter.numel() + _SCALE_BYTES * len(parameter)
    return total


def _saved_bytes(layer: Layer) -> int:
    """Returns what four bits save against eight."""
    count = layer.weight.numel()
    return count // 2 + _SCALE_BYTES * len(layer.weight) - _GROUP_SCALE_BYTES * (count // GROUP)


def _samples(
    full: nn.Module,
    seed: int,
    prompt: Prompt,
    noise_scheduler: NoiseScheduler,
    latents_shape: tuple[int, int, int],
) -> list[_Sample]:
    """Runs the loop on a prompt alone, unguided, and returns what the graph saw."""
    influence = step_influence(noise_scheduler)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((1, *latents_shape), generator=generator)
    latents = latents * noise_scheduler.init_noise_sigma
    samples, history = [], ()
    for step, time in enumerate(noise_scheduler.timesteps):
        seen = noise_scheduler.model_input(latents, step).expand(2, -1, -1, -1)
        context = (torch.cat(both) for both in zip(*prompt, strict=True))
        inputs = (seen, torch.tensor([time]), *context)
        samples.append(_Sample(inputs, float(influence[step]) ** 2))
        predicted = full(*inputs)[0][1:]
        latents, history = noise_scheduler.advance(latents, predicted, step, history)
    return samples


def _rounded(
    full: nn.Module,
    names: Sequence[str],
    runs: Sequence[_Run],
    latents_shape: tuple[int, int, int],
    on_layer: Callable[[], object],
) -> dict[str, FourBits]:
    """Returns the layers' weights, rounded for the inputs that they have in the runs; of as many
    layers at a time as fit into `_PRODUCTS_BYTES`."""
    found = {}
    for part in _parts(full, names):
        sums: dict[str, Tensor] = {}
        hooks = [
            full.get_submodule(name).register_forward_pre_hook(partial(_add_products, sums, name))
            for name in part
            if _products_bytes(full, name)
        ]
        for run in runs if hooks else ():
            _samples(full, *run, latents_shape)
        for hook in hooks:
            hook.remove()
        for name in part:
            matrix, products = _matrix(full.get_submodule(name)), sums.pop(name, None)
            found[name] = nearest(matrix) if products is None else compensated(matrix, products)
            on_layer()
    return found


def _parts(full: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Returns the names in groups whose products take no more than `_PRODUCTS_BYTES`, if one
    layer's do not."""
    parts: list[list[str]] = []
    held = 0
    for name in names:
        held += _products_bytes(full, name)
        if not parts or held > _PRODUCTS_BYTES:
            parts.append([])
            held = _products_bytes(full, name)
        parts[-1].append(name)
    return parts


def _products_bytes(full: nn.Module, name: str) -> int:
    """Returns what the products of a layer's inputs take; 0 if they are not to be had."""
    weight: Tensor = full.get_submodule(name).weight  # type: ignore[assignment]
    width = weight[0].numel()
    return 4 * width**2 if width <= WIDEST else 0


def _add_products(
    sums: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    """A hook that adds x·xᵀ of a layer's inputs to its sum."""
    (x,) = inputs
    rows = (neighbourhoods(x) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)
    if name not in sums:
        sums[name] = torch.zeros(rows.shape[1], rows.shape[1])
    sums[name].addmm_(rows.T, rows)


def _errors(
    full: nn.Module,
    layers: Mapping[str, Layer],
    rounded: Mapping[str, FourBits],
    samples: list[_Sample],
    guidance_scale: float,
    on_layer: Callable[[], object],
) -> dict[str, float]:
    """Returns each layer's error of the guided noise prediction, had it alone four bits."""

    def guided(sample: _Sample) -> Tensor:
        uncond, cond = full(*sample.inputs)[0]
        prediction: Tensor = uncond + guidance_scale * (cond - uncond)
        return prediction

    expected = [guided(sample) for sample in samples]
    errors = {}
    for name, layer in layers.items():
        kept, matrix = layer.weight, rounded[name].weight()
        folded = folded_weight(matrix, layer) if isinstance(layer, nn.Conv2d) else matrix
        layer.weight = nn.Parameter(folded, requires_grad=False)
        errors[name] = sum(
            sample.weight * float((guided(sample) - right).square().mean())
            for sample, right in zip(samples, expected, strict=True)
        )
        layer.weight = kept
        on_layer()
    return errors


def _matrix(layer: nn.Module) -> Tensor:
    """Returns a layer's weights as (O, I), or (O, 9·I) of a convolution."""
    if isinstance(layer, nn.Conv2d):
        return unfolded_weight(layer)
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight
