"""Stable Diffusion's transformer over a picture, in operators that XNNPACK has."""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from cq_edge.errors import ModelError
from cq_edge.model.lean_norms import fold_affine
from cq_edge.model.surgery import replace_modules


class LeanTransformer(nn.Module):
    """diffusers' Transformer2DModel over pictures, its 1×1 convolutions as linear layers."""

    def __init__(self, transformer: Transformer2DModel) -> None:
        super().__init__()
        self.norm = transformer.norm
        self.proj_in = _as_linear(transformer.proj_in)
        self.transformer_blocks = transformer.transformer_blocks
        self.proj_out = _as_linear(transformer.proj_out)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor]:
        """Returns a tuple of the (B, C, H, W) picture, as diffusers does.

        Args:
            hidden_states: (B, C, H, W).
            encoder_hidden_states: (B, L, D) embeddings of the prompt.
            _: diffusers' other arguments, which Stable Diffusion leaves empty.
        """
        batch, _channels, height, width = hidden_states.shape
        tokens = self.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
        tokens = self.proj_out(tokens)
        picture = tokens.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        return (picture + hidden_states,)


class LeanGeglu(nn.Module):
    """diffusers' GEGLU with a linear layer for either half, so that nothing is split."""

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        half = geglu.proj.out_features // 2
        self.value = _rows(geglu.proj, slice(0, half))
        self.gate = _rows(geglu.proj, slice(half, None))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, N, 4C) for (B, N, C)."""
        gated: Tensor = self.value(x) * F.gelu(self.gate(x))
        return gated


def rewrite_transformers(root: nn.Module) -> int:
    """Replaces every Transformer2DModel below `root` in place; returns how many there were.

    Raises:
        ModelError: If one is no transformer over pictures with plain layer normalisation.
    """
    return replace_modules(root, Transformer2DModel, _checked)


def rewrite_feed_forward(root: nn.Module) -> int:
    """Replaces every GEGLU below `root` in place and returns how many there were."""
    return replace_modules(root, GEGLU, LeanGeglu)


def fold_transformer_norms(root: nn.Module) -> int:
    """Moves the affine parts of the transformers' normalisations into the layers behind them.

    To be called after the other rewrites of this file and that of attention, before the norms
    themselves are rewritten. Returns how many normalisations lost their affine part.
    """
    folded = 0
    for module in list(root.modules()):
        if isinstance(module, LeanTransformer):
            fold_affine(module.norm, [module.proj_in])
            folded += 1
        if isinstance(module, BasicTransformerBlock):
            folded += _fold_block(module)
    return folded


def _fold_block(block: BasicTransformerBlock) -> int:
    first, second = block.attn1, block.attn2
    fold_affine(block.norm1, [first.to_q, first.to_k, first.to_v])
    if second is not None:
        fold_affine(block.norm2, [second.to_q])
    projection = block.ff.net[0]
    if not isinstance(projection, LeanGeglu):
        return 1 + (second is not None)
    fold_affine(block.norm3, [projection.value, projection.gate])
    return 2 + (second is not None)


def _checked(transformer: Transformer2DModel) -> LeanTransformer:
    config = transformer.config
    if not transformer.is_input_continuous or config.norm_type != "layer_norm":
        raise ModelError(
            f"a transformer has norm_type {config.norm_type!r} and "
            f"patch_size {config.patch_size}: only Stable Diffusion's, over pictures and with "
            "plain layer normalisation, can be exported"
        )
    if config.only_cross_attention or config.double_self_attention:
        raise ModelError(
            "a transformer has only_cross_attention or double_self_attention: only self- "
            "followed by cross-attention can be exported"
        )
    return LeanTransformer(transformer)


@torch.no_grad()
def _as_linear(projection: nn.Linear | nn.Conv2d) -> nn.Linear:
    if isinstance(projection, nn.Linear):
        return projection
    linear = nn.Linear(projection.in_channels, projection.out_channels)
    linear.weight = nn.Parameter(projection.weight.flatten(1).clone(), requires_grad=False)
    if projection.bias is None:
        raise ModelError("a transformer's 1×1 projection has no bias; Stable Diffusion's has one")
    linear.bias = nn.Parameter(projection.bias.clone(), requires_grad=False)
    return linear


@torch.no_grad()
def _rows(linear: nn.Linear, rows: slice) -> nn.Linear:
    weight = linear.weight[rows].clone()
    part = nn.Linear(linear.in_features, weight.shape[0], bias=linear.bias is not None)
    part.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
    return part
