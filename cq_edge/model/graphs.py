"""The text encoder and the latent decoder as the graphs that the bundle ships."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from transformers import CLIPTextModel

from cq_edge.errors import ModelError

# far below any score, and not so far that its square would overflow: exp of it is 0 in float32
_MASKED = -1e9


class EncodeGraph(nn.Module):
    """The CLIP text tower: token ids to its normalised last hidden state."""

    mask: Tensor
    positions: Tensor

    def __init__(self, text: CLIPTextModel) -> None:
        """Raises ModelError if the tower's activation is none that CLIP has."""
        super().__init__()
        config = text.config
        length = config.max_position_embeddings
        self.tokens = text.embeddings.token_embedding
        positions = text.embeddings.position_embedding.weight.detach().clone()
        self.register_buffer("positions", positions, persistent=False)
        mask = torch.full((length, length), _MASKED).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        activation = _activation(config.hidden_act)
        self.layers = nn.ModuleList(
            _TextLayer(layer, config.num_attention_heads, activation)
            for layer in text.encoder.layers
        )
        self.norm = text.final_layer_norm

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the (1, L, D) embeddings of (1, L) int64 ids, L the tower's full length."""
        hidden = self.tokens(input_ids) + self.positions
        for layer in self.layers:
            hidden = layer(hidden, self.mask)
        embeddings: Tensor = self.norm(hidden)
        return embeddings


class DecodeGraph(nn.Module):
    """The autoencoder's second half: scaled latents to a picture in [0, 1]."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        """Raises ModelError if the latents have a mean and a spread of their own."""
        super().__init__()
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ModelError("the VAE has latents_mean: only one scaling_factor can be undone")
        self.per_latent = 1.0 / vae.config.scaling_factor
        self.offset = getattr(vae.config, "shift_factor", None) or 0.0
        # AutoencoderTiny has none
        self.post_quant_conv = getattr(vae, "post_quant_conv", None)
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Returns the (1, 3, H, W) picture of (1, 4, h, w) latents as the denoiser scales them."""
        unscaled = latents * self.per_latent
        if self.offset:
            unscaled = unscaled + self.offset
        if self.post_quant_conv is not None:
            unscaled = self.post_quant_conv(unscaled)
        picture: Tensor = self.decoder(unscaled) * 0.5 + 0.5
        return picture.clamp(0.0, 1.0)


class _TextLayer(nn.Module):
    """One pre-normalised transformer layer of CLIP with causal attention."""

    def __init__(self, layer: Any, heads: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.activation = activation
        self.norm1 = layer.layer_norm1
        self.norm2 = layer.layer_norm2
        attention = layer.self_attn
        self.to_q, self.to_k, self.to_v = attention.q_proj, attention.k_proj, attention.v_proj
        self.to_out = attention.out_proj
        self.scale = float(attention.scale)
        self.expand = layer.mlp.fc1
        self.contract = layer.mlp.fc2

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns (1, L, D) for `hidden` (1, L, D) and an additive (L, L) mask."""
        normed = self.norm1(hidden)
        queries = self._by_head(self.to_q(normed) * self.scale).permute(1, 0, 2)
        keys = self._by_head(self.to_k(normed)).permute(1, 2, 0)
        values = self._by_head(self.to_v(normed)).permute(1, 0, 2)
        scores = torch.softmax(torch.bmm(queries, keys) + mask, dim=-1)
        attended = torch.bmm(scores, values).permute(1, 0, 2).reshape(hidden.shape)
        hidden = hidden + self.to_out(attended)
        expanded = self.activation(self.expand(self.norm2(hidden)))
        contracted: Tensor = self.contract(expanded)
        return hidden + contracted

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[1], self.heads, -1)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    known: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}
    if name not in known:
        raise ModelError(
            f"the text encoder's activation is {name}: CLIP's are {' and '.join(sorted(known))}"
        )
    return known[name]
