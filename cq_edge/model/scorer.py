"""A CLIP model that judges pictures: CLIP score, and attribute accuracy by retrieval."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPModel, CLIPTokenizer

from cq_edge.errors import ModelError
from cq_edge.metrics import clip_score
from cq_edge.scenes import Scene, attribute_queries

DEMO_SCORER = Path(__file__).parents[1] / "demo_scorer"

# CLIP's own normalisation; the demo scorer's preprocessor_config.json says the same
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Scorer:
    """Embeds pictures and captions with a `CLIPModel`; its vectors have length one."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, source: str | Path = DEMO_SCORER) -> "Scorer":
        """Loads a folder or hub id of transformers' CLIP layout.

        Raises:
            ModelError: If there is no CLIP model.
        """
        try:
            model = CLIPModel.from_pretrained(source, dtype=torch.float32)
            return cls(model, CLIPTokenizer.from_pretrained(source))
        except (OSError, ValueError) as error:
            raise ModelError(f"{source} is no CLIP model that could be loaded: {error}") from error

    @torch.no_grad()
    def embed_pictures(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns (N, D) unit vectors of (N, H, W, 3) uint8 pictures."""
        side = self._model.config.vision_config.image_size
        parts = []
        for start in range(0, len(pictures), 64):
            batch = torch.from_numpy(pictures[start : start + 64]).permute(0, 3, 1, 2).float() / 255
            if batch.shape[-2:] != (side, side):
                batch = torch.nn.functional.interpolate(
                    batch, (side, side), mode="bicubic", antialias=True
                ).clamp(0, 1)
            parts.append(_unit(self._model.get_image_features(normalise(batch))))
        return np.concatenate(parts)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Returns (N, D) unit vectors of N captions."""
        parts = []
        for start in range(0, len(captions), 256):
            encoded = self._tokenizer(
                list(captions[start : start + 256]),
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            parts.append(_unit(self._model.get_text_features(**encoded)))
        return np.concatenate(parts)

    def clip_scores(
        self, pictures: NDArray[np.uint8], captions: Sequence[str]
    ) -> NDArray[np.float64]:
        """Returns (N,) scores, 100 · cosine, of each picture with its caption."""
        return clip_score(self.embed_pictures(pictures), self.embed_captions(captions))

    def attribute_accuracy(
        self, pictures: NDArray[np.uint8], scenes: Sequence[Scene]
    ) -> dict[str, float]:
        """Returns how often each attribute is what the caption says, in [0, 1].

        An attribute is right where its true caption scores above every caption that differs
        in it alone. The key "all" is the mean over every attribute asked of every scene.

        Args:
            pictures: (N, H, W, 3) uint8, one per scene.
            scenes: The N scenes whose captions the pictures should show.
        """
        vectors = self.embed_pictures(pictures)
        asked = [(i, query) for i, s in enumerate(scenes) for query in attribute_queries(s)]
        texts = self.embed_captions([c for _, query in asked for c in query.captions])
        right: dict[str, list[bool]] = defaultdict(list)
        start = 0
        for i, query in asked:
            scores = texts[start : start + len(query.captions)] @ vectors[i]
            start += len(query.captions)
            won = bool(scores[0] > scores[1:].max())
            right[query.attribute].append(won)
            right["all"].append(won)
        return {name: float(np.mean(wins)) for name, wins in right.items()}


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Returns (B, 3, H, W) pictures in [0, 1] normalised as CLIP's vision towers expect."""
    mean = torch.tensor(_MEAN)[:, None, None].to(pictures)
    return (pictures - mean) / torch.tensor(_STD)[:, None, None].to(pictures)


def _unit(features: Any) -> NDArray[np.float32]:
    """Returns unit rows; transformers 5 wraps the projected features in an output record."""
    vectors = getattr(features, "pooler_output", features)
    unit: NDArray[np.float32] = torch.nn.functional.normalize(vectors, dim=-1).numpy()
    return unit
