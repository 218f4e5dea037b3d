"""The demo's CLIP: a small `CLIPModel` trained contrastively on rendered scenes.

Its hard negatives are the very captions that attribute accuracy retrieves among: the same
sentence with one attribute changed. Both towers also name what is in every cell of a grid, by
heads that are thrown away, which makes the towers see before they are asked to agree. The
vision tower also draws the shapes' outlines, and for the first steps looks alone: kinds of
shapes are the hardest to see.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from cq_edge.model.scorer import normalise
from cq_edge.scenes import Scene, attribute_queries
from tools.demo_training.data import (
    layout_targets,
    outline_targets,
    pictures,
    training_scenes,
)
from tools.demo_training.loop import TrainConfig, train
from tools.demo_training.precision import autocast
from tools.demo_training.text import GRID, LayoutHead, LayoutReader

_NEGATIVES = 8  # changed captions per picture
_PATCH_PX = 8
_SIDE = 128 // _PATCH_PX
_FINENESS = 4  # an outline's parts along a patch's side
_OUTLINE_WEIGHT = 4.0


def new_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns the untrained scorer for a tokenizer.

    Patches of 8 px: with 16, shapes of a few patches are told apart two times in three.
    """
    width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **width,
        vocab_size=len(tokenizer),
        num_hidden_layers=3,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_attention_heads=3,
        num_hidden_layers=5,
        image_size=128,
        patch_size=_PATCH_PX,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=256
    )
    config._attn_implementation = "eager"  # fused attention is slow backward in bfloat16
    clip = CLIPModel(config)
    _place_patches(clip.vision_model.embeddings.position_embedding)
    return clip


@torch.no_grad()
def _place_patches(positions: nn.Embedding) -> None:
    """Starts the patches' position embeddings as sinusoids of row and column, which tell
    neighbours from the first step on (Beyer et al. 2022, "Better plain ViT baselines")."""
    quarter = positions.embedding_dim // 4
    frequencies = 100.0 ** -(torch.arange(quarter) / quarter)
    angles = torch.arange(_SIDE)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    down = waves[:, None].expand(-1, _SIDE, -1)
    across = waves[None].expand(_SIDE, -1, -1)
    positions.weight[1:] = 0.2 * torch.cat([down, across], dim=-1).flatten(0, 1)


class ScorerParts(nn.Module):
    """The scorer with the heads that only training needs."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        self.head = LayoutHead(width)
        self.outline = nn.Linear(width, _FINENESS**2)
        self.reader = LayoutReader()

    def looking_loss(self, cells: Tensor, layout: dict[str, Tensor], outlines: Tensor) -> Tensor:
        """Returns the layout and outline losses of the vision tower's (B, 1 + cells, width)."""
        outline = F.binary_cross_entropy_with_logits(self.outline(cells[:, 1:]), outlines)
        return self.head.loss(cells[:, 1:], cells[:, 0], layout) + _OUTLINE_WEIGHT * outline


def train_scorer(
    config: TrainConfig,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    batch_size: int,
    device: str,
    *,
    looking_steps: int,
    bf16: bool,
) -> CLIPModel:
    """Trains `clip` and returns it with averaged weights.

    Args:
        config: How long and how fast.
        clip: The scorer to start from.
        tokenizer: Of its captions.
        folder: For checkpoints.
        batch_size: Pictures per step.
        device: Where to train.
        looking_steps: How many first steps train the vision tower's layout alone.
        bf16: Whether forward passes run in bfloat16.
    """
    torch.manual_seed(config.seed)
    parts = ScorerParts(clip).to(device)

    def loss_of_step(step: int) -> Tensor:
        batch = training_scenes(3_000_000 + step, batch_size)
        pixels = normalise((pictures(batch) + 1) / 2).to(device)
        seen = {k: v.to(device) for k, v in layout_targets(batch, _SIDE).items()}
        with autocast(device, bf16=bf16):
            cells = clip.vision_model(pixels).last_hidden_state
        outlines = outline_targets(batch, _SIDE, _FINENESS).to(device)
        looking = parts.looking_loss(cells.float(), seen, outlines)
        if step < looking_steps:
            return looking
        captions = [s.caption() for s in batch] + _changed_captions(batch, random.Random(step))
        encoded = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        with autocast(device, bf16=bf16):
            read = clip.text_model(encoded["input_ids"])
        said = {k: v.to(device) for k, v in layout_targets(batch, GRID).items()}
        reading = parts.reader.loss(read.last_hidden_state[:batch_size].float(), said)
        whole = clip.vision_model.post_layernorm(cells[:, 0].float())
        return looking + reading + _contrastive_loss(clip, whole, read.pooler_output.float())

    parts.load_state_dict(train(config, parts, loss_of_step, folder))
    return clip.eval()


def _contrastive_loss(clip: CLIPModel, seen: Tensor, read: Tensor) -> Tensor:
    """Returns InfoNCE both ways, and of each picture against its own changed captions alone.

    Args:
        clip: Whose projections and scale are used.
        seen: (B, width) of the pictures.
        read: (B + B·negatives, width) of the captions; the first B are true.
    """
    image = F.normalize(clip.visual_projection(seen), dim=-1)
    text = F.normalize(clip.text_projection(read), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
    count = len(seen)
    labels = torch.arange(count, device=seen.device)
    loss = F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :count].T, labels)
    # what retrieval will ask
    own = torch.cat([logits.diag()[:, None], _own_negatives(logits, count)], 1)
    return loss + F.cross_entropy(own, torch.zeros_like(labels))


def _own_negatives(logits: Tensor, count: int) -> Tensor:
    """Returns (B, negatives) logits of each picture with its own changed captions."""
    changed = logits[:, count:].reshape(count, count, _NEGATIVES)
    return changed[torch.arange(count), torch.arange(count)]


def _changed_captions(batch: list[Scene], rng: random.Random) -> list[str]:
    """Returns `_NEGATIVES` captions per scene, half of them with another kind of shape: kinds
    are the hardest to tell apart."""
    changed = []
    for scene in batch:
        queries = attribute_queries(scene)
        kinds = [query for query in queries if query.attribute == "kind"]
        half = _NEGATIVES // 2
        for query in rng.choices(kinds, k=half) + rng.sample(queries, _NEGATIVES - half):
            changed.append(rng.choice(query.captions[1:]))
    return changed
