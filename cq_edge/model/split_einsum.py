"""Attention as the Neural Engine likes it, numerically equal to the original.

Tensors stay (B, C, 1, S), projections are 1×1 convolutions over them, and every head multiplies
by itself. The names are those of Apple's converter: `split-einsum`, and `split-einsum-v2`, which
also takes the queries in chunks.

Source: Apple's ml-stable-diffusion and ml-ane-transformers. We differ in that the weights stay
those of the Linear layers, seen as kernels.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from cq_edge.errors import ModelError, UsageError

Root = TypeVar("Root", bound=nn.Module)
ATTENTIONS = ("original", "split-einsum", "split-einsum-v2")
_QUERY_CHUNK = 512  # Apple's


def with_attention(module: Root, name: str, query_chunk: int = _QUERY_CHUNK) -> Root:
    """Returns a copy whose attention is of the kind named; the module itself for "original".

    Args:
        module: A UNet, or a ModuleList of a full and a shallow one, whose parts stay shared.
        name: One of `ATTENTIONS`.
        query_chunk: Queries that `split-einsum-v2` takes at a time.

    Raises:
        UsageError: There is no such kind.
        ModelError: An attention normalises or masks in a way that Stable Diffusion's does not.
    """
    if name not in ATTENTIONS:
        raise UsageError(f"attention is {name!r}: it must be one of {', '.join(ATTENTIONS)}")
    if name == "original":
        return module
    changed = copy.deepcopy(module)
    for part, child in changed.named_modules():
        if isinstance(child, Attention):
            _require_plain(part, child)
            child.set_processor(_SplitEinsum(query_chunk if name == "split-einsum-v2" else None))
    return changed


class _SplitEinsum:
    """A processor of diffusers' `Attention`; without a chunk it takes all queries at once."""

    def __init__(self, query_chunk: int | None) -> None:
        self.query_chunk = query_chunk

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, S, C) for hidden states (B, S, C) and a context (B, L, D) or None."""
        if attention_mask is not None:
            raise ModelError("split-einsum attention takes no mask")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        hidden_states, context = _channels_first(hidden_states), _channels_first(context)
        queries, keys, values = (
            _projected(layer, source).chunk(attention.heads, dim=1)
            for layer, source in (
                (attention.to_q, hidden_states),
                (attention.to_k, context),
                (attention.to_v, context),
            )
        )
        heads = [
            self._attended(query * attention.scale, key.transpose(1, 3), value)
            for query, key, value in zip(queries, keys, values, strict=True)
        ]
        joined = _projected(attention.to_out[0], torch.cat(heads, dim=1))
        result: Tensor = joined.squeeze(2).transpose(1, 2) / attention.rescale_output_factor
        return result

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns one head's (B, C, 1, S) for queries (B, C, 1, S), keys (B, L, 1, C) and values
        (B, C, 1, L)."""
        chunk = self.query_chunk or query.shape[3]
        parts = []
        for some in torch.split_with_sizes(query, _chunks(query.shape[3], chunk), dim=3):
            scores = torch.einsum("bkhc,bchq->bkhq", key, some).softmax(dim=1)
            parts.append(torch.einsum("bchk,bkhq->bchq", value, scores))
        return torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]


def _chunks(count: int, size: int) -> list[int]:
    """Returns the sizes of the pieces of so many, all of one size but the last."""
    return [min(size, count - start) for start in range(0, count, size)]


def _channels_first(x: Tensor) -> Tensor:
    """Returns (B, C, 1, S) for (B, S, C)."""
    return x.transpose(1, 2).unsqueeze(2)


def _projected(layer: nn.Linear, x: Tensor) -> Tensor:
    """Returns (B, C', 1, S) for (B, C, 1, S)."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def _require_plain(name: str, attention: Any) -> None:
    kinds = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    for kind in kinds:
        if getattr(attention, kind, None) is not None:
            raise ModelError(f"attention {name} has {kind}: split-einsum knows none")
    if attention.residual_connection:
        raise ModelError(f"attention {name} adds its input itself: split-einsum does not")
