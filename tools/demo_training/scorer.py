"""The demo's CLIP: a small `CLIPModel` trained contrastively on rendered scenes.

Its hard negatives are the very captions that attribute accuracy retrieves among: the same
sentence with one attribute changed. Both towers also name what is in every cell of a grid (a
head that is thrown away), which makes the towers see before they are asked to agree.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from cq_edge.model.scorer import normalise
from cq_edge.scenes import Scene, attribute_queries
from tools.demo_training.data import layout_targets, pictures, training_scenes
from tools.demo_training.loop import TrainConfig, train
from tools.demo_training.text import GRID, LayoutHead, LayoutReader

_NEGATIVES = 4  # changed captions per picture


def new_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns the untrained scorer for a tokenizer."""
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
    vision = CLIPVisionConfig(**width, num_hidden_layers=5, image_size=128, patch_size=16)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=256)
    )


def train_scorer(
    config: TrainConfig, tokenizer: CLIPTokenizer, folder: Path, batch_size: int, device: str
) -> CLIPModel:
    """Trains the scorer and returns it with averaged weights."""
    torch.manual_seed(config.seed)
    parts = nn.ModuleDict(
        {"clip": new_scorer(tokenizer), "head": LayoutHead(128), "reader": LayoutReader()}
    ).to(device)

    def loss_of_step(step: int) -> Tensor:
        batch = training_scenes(3_000_000 + step, batch_size)
        captions = [s.caption() for s in batch] + _changed_captions(batch, random.Random(step))
        encoded = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        targets = {k: v.to(device) for k, v in layout_targets(batch, GRID).items()}
        return _loss(parts, normalise((pictures(batch) + 1) / 2).to(device), encoded, targets)

    parts.load_state_dict(train(config, parts, loss_of_step, folder))
    clip: CLIPModel = parts["clip"].eval()
    return clip


def _loss(
    parts: nn.ModuleDict, pixels: Tensor, encoded: dict[str, Tensor], targets: dict[str, Tensor]
) -> Tensor:
    """Returns InfoNCE both ways plus the layout losses; the first B captions are true."""
    clip: CLIPModel = parts["clip"]
    seen = clip.vision_model(pixels)
    read = clip.text_model(encoded["input_ids"])
    image = F.normalize(clip.visual_projection(seen.pooler_output), dim=-1)
    text = F.normalize(clip.text_projection(read.pooler_output), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
    count = len(pixels)
    labels = torch.arange(count, device=pixels.device)
    contrastive = F.cross_entropy(logits, labels)
    contrastive = contrastive + F.cross_entropy(logits[:, :count].T, labels)
    # each picture against its own changed captions alone: what retrieval will ask
    own = torch.cat([logits.diag()[:, None], _own_negatives(logits, count)], 1)
    contrastive = contrastive + F.cross_entropy(own, torch.zeros_like(labels))
    head: LayoutHead = parts["head"]  # type: ignore[assignment]
    reader: LayoutReader = parts["reader"]  # type: ignore[assignment]
    cells = seen.last_hidden_state
    layout = head.loss(cells[:, 1:], cells[:, 0], targets)
    layout = layout + reader.loss(read.last_hidden_state[:count], targets)
    return contrastive + layout


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
