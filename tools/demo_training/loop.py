"""The one training loop: AdamW, warm-up and cosine decay, EMA, checkpoints to resume from.

Started by torchrun, every process trains on its own part of a step's batches: two single-threaded
processes train faster on two cores than one with two threads.
"""

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast to train one network.

    `steps` may be changed between two runs of the same checkpoint: the learning rate follows
    the new end. `ema_decay` is per step.
    """

    name: str
    steps: int
    learning_rate: float
    ema_decay: float = 0.999
    warmup_steps: int = 100
    checkpoint_every: int = 100
    seed: int = 0


def train(
    config: TrainConfig,
    network: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    folder: Path,
) -> dict[str, Tensor]:
    """Trains `network` in place and returns its averaged (EMA) weights.

    Args:
        config: The hyper-parameters.
        network: Everything that learns.
        loss_of_step: The loss of the batch that belongs to a step; it seeds itself from the
            step, so that a resumed run sees what an unbroken one would have. With several
            processes, each gets a number of its own in every step.
        folder: Where `<name>.pt` (the checkpoint) and `<name>_loss.csv` go.
    """
    checkpoint = folder / f"{config.name}.pt"
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    average = {k: v.detach().clone() for k, v in network.state_dict().items()}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    rank, processes = _place()
    progress = tqdm(
        range(first, config.steps),
        desc=config.name,
        initial=first,
        total=config.steps,
        disable=rank > 0,
    )
    losses: list[tuple[int, float]] = []
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        loss = loss_of_step(step * processes + rank)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if processes > 1:
            _average_gradients(network, processes)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1 - decay)
        losses.append((step, loss.item()))
        progress.set_postfix(loss=f"{losses[-1][1]:.4f}")
        is_due = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
        if is_due and rank == 0:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            _save({**state, "average": average, "step": step + 1}, checkpoint)
            _append_losses(folder / f"{config.name}_loss.csv", losses)
            losses.clear()
    return average


def _place() -> tuple[int, int]:
    """Returns this process's number and how many there are; joins the others at first."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def _average_gradients(network: nn.Module, processes: int) -> None:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def load_average(name: str, folder: Path) -> dict[str, Tensor]:
    """Returns the averaged weights of the newest checkpoint of `name`."""
    average: dict[str, Tensor] = torch.load(
        folder / f"{name}.pt", weights_only=True, map_location="cpu"
    )["average"]
    return average


def _learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))
    return config.learning_rate * warm * (0.02 + 0.98 * cosine)


def _save(state: dict[str, object], path: Path) -> None:
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(path)


def _append_losses(path: Path, losses: list[tuple[int, float]]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(losses)


def plot_losses(folder: Path, path: Path) -> None:
    """Draws every `<name>_loss.csv` of `folder`, smoothed, into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = sorted(folder.glob("*_loss.csv"))
    figure, axes = plt.subplots(1, len(files), figsize=(4 * len(files), 3), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        steps, losses = np.loadtxt(file, delimiter=",", unpack=True, ndmin=2)
        width = max(1, len(losses) // 100)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth)
        axis.set(title=file.stem.removesuffix("_loss"), xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
