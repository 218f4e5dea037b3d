"""Which format each weight of the UNet takes, so that the package fits a size at least error.

What a rounded weight does to the UNet's outputs, the noise prediction and the cached feature, is
J·δ to first order: J their derivative, δ the weight's change. Its squared length is measured for
all weights and formats at once by random projections, each one backward pass, on what the UNet
sees in real steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cq_edge.errors import UsageError
from exporters.coreml_weights import (
    FORMATS,
    TARGET_ORDER,
    blob_bytes,
    is_compressible,
    weight_key,
)
from exporters.parity import Arrays

_LADDER = ("float16", "int8", "palette6", "palette4", "palette3")
_PREDICTED = 0.995  # of the bytes: the rest are constants that the conversion adds
_PROJECTIONS = 4  # of each set of inputs


@dataclass(frozen=True, slots=True, eq=False)
class _Rung:
    """A weight in one format: the bytes it takes and the error that it causes."""

    name: str
    bytes: int
    error: float


def choose_formats(
    full: nn.Module,
    inputs: Sequence[Arrays],
    compression: float,
    target: str,
    on_pass: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Returns the format of each weight by `weight_key`.

    Args:
        full: The float `FullUNet`.
        inputs: Its named inputs at several real steps, in call order.
        compression: Float32 bytes of the parameters over bytes stored, at least.
        target: The oldest system that is to run the package.
        on_pass: Called after each backward pass, for progress bars.

    Raises:
        UsageError: The formats of that system do not save enough; says how much is possible.
    """
    ladder = [n for n in _LADDER if TARGET_ORDER[FORMATS[n].oldest_target] <= TARGET_ORDER[target]]
    weights = {
        name: parameter
        for name, parameter in full.named_parameters()
        if is_compressible(parameter.detach().numpy())
    }
    count = sum(p.numel() for p in full.parameters())
    loose = sum(blob_bytes(2 * p.numel()) for n, p in full.named_parameters() if n not in weights)
    room = _PREDICTED * 4 * count / compression - loose
    smallest = sum(FORMATS[ladder[-1]].stored_bytes(w.detach().numpy()) for w in weights.values())
    if smallest > room:
        raise _too_much(compression, 4 * count / (smallest + loose), target)
    rungs = _measured(full, weights, ladder, inputs, on_pass)
    taken = _descend(rungs, room)
    return {
        weight_key(weights[name].detach().numpy()): rungs[name][rung].name
        for name, rung in taken.items()
    }


def _too_much(compression: float, most: float, target: str) -> UsageError:
    cure = "ask for less"
    if TARGET_ORDER[target] < max(TARGET_ORDER.values()):
        cure += ", or for --coreml-target ios18, which has smaller palettes (and keeps both UNet "
        cure += "graphs in one package)"
    return UsageError(
        f"the Core ML UNet cannot be {compression:g} times smaller on {target}: with its smallest "
        f"weights everywhere it is {most:.2f} times smaller; {cure}"
    )


def _descend(rungs: dict[str, list[_Rung]], room: float) -> dict[str, int]:
    """Returns the rung of each weight: steps down are taken where they cost least error for the
    bytes that they save, until everything fits."""
    taken = dict.fromkeys(rungs, 0)
    total = sum(ladder[0].bytes for ladder in rungs.values())
    while total > room:
        steps = [(_price(ladder, taken[name]), name) for name, ladder in rungs.items()]
        (_, down), name = min(steps, key=lambda step: (step[0], step[1]))
        total -= rungs[name][taken[name]].bytes - rungs[name][down].bytes
        taken[name] = down
    return taken


def _price(ladder: list[_Rung], rung: int) -> tuple[float, int]:
    """Returns the least error for each byte saved from a rung on, and the rung that has it."""
    now = ladder[rung]
    offers = [
        ((below.error - now.error) / (now.bytes - below.bytes), number)
        for number, below in enumerate(ladder)
        if number > rung and below.bytes < now.bytes
    ]
    return min(offers, default=(float("inf"), rung))


def _measured(
    full: nn.Module,
    weights: dict[str, nn.Parameter],
    ladder: list[str],
    inputs: Sequence[Arrays],
    on_pass: Callable[[], object],
) -> dict[str, list[_Rung]]:
    """Returns each weight's rungs, errors relative to the outputs' energy."""
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    errors = {name: np.zeros(len(ladder)) for name in weights}
    changes = {
        name: [_change(array, FORMATS[step].restored(array)) for step in ladder]
        for name, array in arrays.items()
    }
    for gradients in _projections(full, weights, inputs, on_pass):
        for name, gradient in gradients.items():
            projected = [float((gradient * change).sum()) for change in changes[name]]
            errors[name] += np.square(projected)
    return {
        name: [
            _Rung(step, FORMATS[step].stored_bytes(arrays[name]), float(error))
            for step, error in zip(ladder, errors[name], strict=True)
        ]
        for name in weights
    }


def _change(weight: NDArray[np.float32], restored: NDArray[np.float32]) -> Tensor:
    # five of these are held for every weight: in float16 they take as much as two and a half UNets
    return torch.from_numpy(restored - weight).half()


def _projections(
    full: nn.Module,
    weights: dict[str, nn.Parameter],
    inputs: Sequence[Arrays],
    on_pass: Callable[[], object],
) -> Iterator[dict[str, Tensor]]:
    """Gives, for each random direction of each step's outputs, the gradient by weight."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for arrays in inputs:
            for _ in range(_PROJECTIONS):
                outputs = full(*(torch.from_numpy(np.asarray(a)) for a in arrays.values()))
                projected = torch.stack([_projected(output, generator) for output in outputs]).sum()
                gradients = torch.autograd.grad(projected, list(weights.values()))
                yield dict(zip(weights, gradients, strict=True))
                on_pass()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)


def _projected(output: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the length of an output, in units of its own, along a random direction."""
    direction = torch.randn(output.shape, generator=generator)
    length: Tensor = (output * direction).sum() / output.detach().norm()
    return length
