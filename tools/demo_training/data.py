"""Batches of rendered scenes as tensors; each batch is drawn from its own seed."""

from itertools import islice

import numpy as np
import torch
from torch import Tensor

from cq_edge.scenes import (
    COLOURS,
    KINDS,
    PATTERNS,
    Scene,
    cover_map,
    render,
    scenes,
    shape_map,
)

HELD_OUT_SEED = 20_000_001  # captions are held out by their hash; the seed only picks among them


def training_scenes(seed: int, count: int) -> list[Scene]:
    """Returns `count` scenes for training, the same for the same seed."""
    return list(islice(scenes(seed, held_out=False), count))


def held_out_scenes(count: int) -> list[Scene]:
    """Returns the first `count` held-out scenes."""
    return list(islice(scenes(HELD_OUT_SEED, held_out=True), count))


def pictures(batch: list[Scene]) -> Tensor:
    """Returns (B, 3, 128, 128) float32 in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(np.stack([render(scene) for scene in batch]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def layout_targets(batch: list[Scene], side: int) -> dict[str, Tensor]:
    """Returns what a network that understood the scenes could say of each cell.

    Returns:
        `kind` and `colour`: (B, side²) int64, 0 where no shape is, else 1 + the index into
        `KINDS` / `COLOURS`; `background` and `pattern`: (B,) int64 indices.
    """
    colours = list(COLOURS)
    kind = np.zeros((len(batch), side * side), np.int64)
    colour = np.zeros_like(kind)
    for row, scene in enumerate(batch):
        covered = shape_map(scene, side).ravel()
        for position, shape in enumerate(scene.shapes):
            kind[row, covered == position] = 1 + KINDS.index(shape.kind)
            colour[row, covered == position] = 1 + colours.index(shape.colour)
    return {
        "kind": torch.from_numpy(kind),
        "colour": torch.from_numpy(colour),
        "background": torch.tensor([colours.index(s.background) for s in batch]),
        "pattern": torch.tensor([PATTERNS.index(s.pattern) for s in batch]),
    }


def outline_targets(batch: list[Scene], side: int, fineness: int) -> Tensor:
    """Returns (B, side², fineness²) float32: how much shapes cover each part of each cell."""
    covers = torch.from_numpy(np.stack([cover_map(scene, side * fineness) for scene in batch]))
    parts = covers.reshape(len(batch), side, fineness, side, fineness)
    return parts.transpose(2, 3).reshape(len(batch), side * side, fineness * fineness)
