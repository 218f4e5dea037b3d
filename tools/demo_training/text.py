"""The text tower that conditions the UNet, taught to say where a caption puts what.

A Stable Diffusion UNet meets a text encoder that already understands its captions. Ours
learns that first, from captions alone: queries, one per cell of an 8×8 grid, attend to the
tokens as the UNet will, and must name the shape and colour there and the background.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cq_edge.scenes import COLOURS, KINDS, PATTERNS
from tools.demo_training.data import layout_targets, training_scenes
from tools.demo_training.loop import TrainConfig, train

GRID = 8


def new_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns the untrained text tower for a tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns (B, 77) int64, padded as Stable Diffusion pads."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


class LayoutHead(nn.Module):
    """Names shape and colour of every cell, and the background, from vectors of width `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, 1 + len(KINDS))
        self.colour = nn.Linear(width, 1 + len(COLOURS))
        self.background = nn.Linear(width, len(COLOURS))
        self.pattern = nn.Linear(width, len(PATTERNS))

    def loss(self, cells: Tensor, whole: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Returns the cross-entropy of (B, cells, width) and (B, width) against `targets`."""
        total = F.cross_entropy(self.background(whole), targets["background"])
        total = total + F.cross_entropy(self.pattern(whole), targets["pattern"])
        # most cells are empty: the few that are not count as much as all that are
        covered = targets["kind"].flatten() > 0
        for name in ("kind", "colour"):
            logits = getattr(self, name)(cells).flatten(0, 1)
            each = F.cross_entropy(logits, targets[name].flatten(), reduction="none")
            total = total + each[covered].mean() + each[~covered].mean()
        return total


class LayoutReader(nn.Module):
    """Cell queries that attend to the tokens: the part of pre-training that is thrown away."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(GRID * GRID + 1, width) * 0.5)
        layer = nn.TransformerDecoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, 2)
        self.head = LayoutHead(width)

    def loss(self, tokens: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """Returns the layout loss of (B, 77, width) token states."""
        read = self.layers(self.queries.expand(len(tokens), -1, -1), tokens)
        return self.head.loss(read[:, 1:], read[:, 0], targets)


def train_text(
    config: TrainConfig, tokenizer: CLIPTokenizer, folder: Path, batch_size: int, device: str
) -> CLIPTextModel:
    """Trains the tower with a `LayoutReader` and returns the averaged tower alone."""
    torch.manual_seed(config.seed)
    both = nn.ModuleDict({"text": new_text_model(tokenizer), "reader": LayoutReader()}).to(device)

    def loss_of_step(step: int) -> Tensor:
        batch = training_scenes(2_000_000 + step, batch_size)
        ids = token_ids(tokenizer, [scene.caption() for scene in batch]).to(device)
        targets = {k: v.to(device) for k, v in layout_targets(batch, GRID).items()}
        reader: LayoutReader = both["reader"]  # type: ignore[assignment]
        return reader.loss(both["text"](ids).last_hidden_state, targets)

    both.load_state_dict(train(config, both, loss_of_step, folder))
    text: CLIPTextModel = both["text"].eval()
    return text
