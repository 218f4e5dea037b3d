"""How a pipeline's prompts become what its UNet is told: one text encoder, two, or none."""

from typing import TypeAlias

from diffusers import DiffusionPipeline
from torch import Tensor, cat, nn
from transformers import CLIPTokenizer

from cq_edge.model.graphs import EncodeGraph, EncodePairGraph

Encoder: TypeAlias = nn.Module
"""Of each tokenizer's (1, L) ids: to embeddings, or to embeddings and pooled text."""


def tokenizers(pipeline: DiffusionPipeline) -> list[CLIPTokenizer]:
    """Returns the pipeline's tokenizers, in the order that its encoder takes their ids."""
    found = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def text_reference(pipeline: DiffusionPipeline) -> Encoder | None:
    """Returns the pipeline's own text encoders as one module; None if it has none."""
    texts = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    first, second = texts
    if first is None:
        return None
    return _LastHidden(first) if second is None else _Penultimate(first, second)


def text_graph(pipeline: DiffusionPipeline) -> Encoder | None:
    """Returns what computes the same and is exported; None if there are no text encoders.

    Raises:
        ModelError: A text encoder is none of CLIP's.
    """
    texts = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    first, second = texts
    if first is None:
        return None
    return EncodeGraph(first) if second is None else EncodePairGraph(first, second)


class _LastHidden(nn.Module):
    """transformers' text model, reduced to its normalised last hidden state."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.text(input_ids)[0]
        return hidden


class _Penultimate(nn.Module):
    """transformers' two text models as StableDiffusionXLPipeline.encode_prompt calls them."""

    def __init__(self, text: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.second = second

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        pair = (first.hidden_states[-2], second.hidden_states[-2])
        return cat(pair, dim=-1), second[0]
