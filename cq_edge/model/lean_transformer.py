"""Stable Diffusion's transformer over a picture, in operators that XNNPACK has."""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from cq_edge.errors import ModelError
from cq_edge.model.lean_norms import LeanRmsNorm, fold_affine
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


def rotate_residual_streams(root: nn.Module) -> int:
    """Turns the transformers' layer normalisations into ones that subtract no mean, exactly.

    All that a stream of tokens meets between `proj_in` and `proj_out` is linear layers and
    normalisations without an affine part. So the layers that write to it can write in other
    orthonormal coordinates, and those that read it turn them back. In the coordinates chosen the
    first is the tokens' mean: a normalisation then only scales, and its readers ignore the
    first. To be called after `fold_transformer_norms` and `fold_attention_biases`. Returns how
    many normalisations there were.

    Source: Ashkboos et al. 2024, "SliceGPT", section 3.1.
    """
    rotated = 0
    for module in list(root.modules()):
        if isinstance(module, LeanTransformer) and all(map(_has_geglu, module.transformer_blocks)):
            rotated += _rotate(module)
    return rotated


def _rotate(transformer: LeanTransformer) -> int:
    """Changes one transformer's coordinates in place; returns its number of normalisations."""
    rotation = _mean_first(transformer.proj_in.out_features)
    readers = rotation.clone()
    readers[:, 0] = 0.0
    count = 0
    _write_in(rotation, transformer.proj_in)
    for block in transformer.transformer_blocks:
        for norm, inner, outer in _sublayers(block):
            _read_in(readers, inner)
            _write_in(rotation, outer)
            setattr(block, norm, LeanRmsNorm(getattr(block, norm)))
            count += 1
    _read_in(rotation, [transformer.proj_out])
    return count


def _sublayers(block: BasicTransformerBlock) -> list[tuple[str, list[nn.Linear], nn.Linear]]:
    """Returns each norm's name, the layers that read it, and the one that writes after them."""
    first, second = block.attn1, block.attn2
    projection = block.ff.net[0]
    found = [("norm1", [first.to_q, first.to_k, first.to_v], first.to_out)]
    if second is not None:
        found.append(("norm2", [second.to_q], second.to_out))
    found.append(("norm3", [projection.value, projection.gate], block.ff.net[2]))
    return found


def _mean_first(width: int) -> Tensor:
    """Returns a symmetric orthogonal (C, C) float64 whose first row is 1/sqrt(C): a reflection."""
    normal = -torch.full((width,), width**-0.5, dtype=torch.float64)
    normal[0] += 1.0
    reflection = torch.eye(width, dtype=torch.float64)
    if width > 1:
        reflection -= 2.0 / (normal @ normal) * torch.outer(normal, normal)
    return reflection


@torch.no_grad()
def _write_in(rotation: Tensor, linear: nn.Linear) -> None:
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter((rotation @ linear.weight.double()).to(dtype), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter((rotation @ linear.bias.double()).to(dtype), requires_grad=False)


@torch.no_grad()
def _read_in(rotation: Tensor, linears: list[nn.Linear]) -> None:
    for linear in linears:
        weight = linear.weight.double() @ rotation
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)


def _has_geglu(block: BasicTransformerBlock) -> bool:
    return isinstance(block.ff.net[0], LeanGeglu)


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
