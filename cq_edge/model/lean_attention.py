"""Attention as batched matrix products, in operators that XNNPACK has."""

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from cq_edge.errors import ModelError
from cq_edge.model.surgery import replace_modules

SCORES_AT_ONCE = 1 << 20
"""Float32 scores that are computed before any is used: 4 MiB, which caches hold."""
MOST_PIECES = 128
"""Of an attention: graphs of more operators take long to lower, and much memory."""
_UNSUPPORTED = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj")


class LeanAttention(nn.Module):
    """diffusers' Attention, numerically equal to it.

    The softmax's scale lives in the query projection. Where there are many scores, heads go few at
    a time and their queries in chunks: the 134 million of 4096 tokens and 8 heads never leave the
    caches, which takes a quarter of the time off, and 4 MB instead of 537.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.group_norm = attention.group_norm
        self.to_q = _scaled(attention.to_q, attention.scale)
        self.to_k = attention.to_k
        self.to_v = attention.to_v
        self.to_out = attention.to_out[0]
        self.residual = attention.residual_connection
        self.rescale = attention.rescale_output_factor

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """Returns the attended tokens.

        Args:
            hidden_states: (B, N, C) tokens, or a (B, C, H, W) picture in the autoencoder.
            encoder_hidden_states: (B, M, D) tokens to attend to; None for self-attention.
            _: diffusers' other arguments, which Stable Diffusion leaves empty.
        """
        picture = hidden_states
        tokens = hidden_states
        if picture.dim() == 4:
            normed = picture if self.group_norm is None else self.group_norm(picture)
            tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        attended: Tensor = self.to_out(self._attend(tokens, context))
        if picture.dim() == 4:
            batch, channels, height, width = picture.shape
            attended = attended.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        if self.residual:
            attended = attended + picture
        return attended if self.rescale == 1.0 else attended * (1.0 / self.rescale)

    def _attend(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Returns (B, N, C) of queries (B, N, C) over `context` (B, M, D), before the output."""
        batch, count, _ = tokens.shape
        queries = self._by_head(self.to_q(tokens))
        keys = self._by_head(self.to_k(context), transposed=True)
        values = self._by_head(self.to_v(context))
        attended = _attended(queries, keys, values)
        if batch == 1:
            return attended.permute(1, 0, 2).reshape(1, count, -1)
        split = attended.reshape(batch, self.heads, count, -1)
        return split.permute(0, 2, 1, 3).flatten(2, 3)

    def _by_head(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        """Returns (B·heads, N, d) of (B, N, C), or (B·heads, d, N) if transposed."""
        batch, count, _ = x.shape
        # the graphs have batch 1, and three axes then need one operator less
        if batch == 1:
            heads = x.reshape(count, self.heads, -1)
            return heads.permute((1, 2, 0) if transposed else (1, 0, 2))
        heads = x.reshape(batch, count, self.heads, -1)
        return heads.permute((0, 2, 3, 1) if transposed else (0, 2, 1, 3)).flatten(0, 1)


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Returns (H, N, d) of queries (H, N, d), keys (H, d, M) and values (H, M, d)."""
    heads, count, _ = queries.shape
    size = keys.shape[-1]
    scores = heads * count * size
    at_once = max(SCORES_AT_ONCE, scores // MOST_PIECES)
    if scores <= at_once:
        return _weighted(queries, keys, values)
    together, rows = max(1, at_once // (count * size)), max(1, at_once // size)
    pieces = []
    for head in range(0, heads, together):
        q, k, v = (x[head : head + together] for x in (queries, keys, values))
        chunks = [q[:, i : i + rows] for i in range(0, count, rows)] if rows < count else [q]
        pieces.append(_joined([_weighted(chunk, k, v) for chunk in chunks], 1))
    return _joined(pieces, 0)


def _joined(pieces: list[Tensor], axis: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def _weighted(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(queries, keys), dim=-1), values)


def rewrite_attention(root: nn.Module) -> int:
    """Replaces every Attention below `root` in place and returns how many there were.

    Raises:
        ModelError: If one normalises its queries, keys or context, or has added keys.
    """
    return replace_modules(root, Attention, _checked)


def fold_attention_biases(root: nn.Module) -> int:
    """Removes the biases of keys and values of every LeanAttention below `root`, exactly.

    A key's bias adds the same to all scores of a query, which a softmax does not see; a value's
    is in every weighted mean whole, and so moves through the output projection into its bias.
    Returns how many layers there were.
    """
    layers = [module for module in root.modules() if isinstance(module, LeanAttention)]
    for layer in layers:
        layer.to_k.register_parameter("bias", None)
        _move_bias(layer.to_v, layer.to_out)
    return len(layers)


@torch.no_grad()
def _move_bias(inner: nn.Linear, outer: nn.Linear) -> None:
    """Moves the bias of `inner` into that of `outer`, computed in float64."""
    if inner.bias is None:
        return
    moved = outer.weight.double() @ inner.bias.double()
    if outer.bias is not None:
        moved = moved + outer.bias.double()
    outer.bias = nn.Parameter(moved.to(outer.weight.dtype), requires_grad=False)
    inner.register_parameter("bias", None)


def _checked(attention: Attention) -> LeanAttention:
    for name in _UNSUPPORTED:
        if getattr(attention, name, None):
            raise ModelError(
                f"an attention layer has {name}, which the XNNPACK rewrite does not know: "
                "only Stable Diffusion's plain attention can be exported"
            )
    return LeanAttention(attention)


@torch.no_grad()
def _scaled(linear: nn.Linear, scale: float) -> nn.Linear:
    result = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    result.weight = nn.Parameter(linear.weight * scale, requires_grad=False)
    if linear.bias is not None:
        result.bias = nn.Parameter(linear.bias * scale, requires_grad=False)
    return result
