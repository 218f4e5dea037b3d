"""The text encoder and the latent decoder as the graphs that the bundle ships."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from cq_edge.errors import ModelError

# far below any score, and not so far that its square would overflow: exp of it is 0 in float32
_MASKED = -1e9
_UNWRITTEN_END = 2


class EncodeGraph(nn.Module):
    """The CLIP text tower: token ids to its normalised last hidden state."""

    def __init__(self, text: CLIPTextModel) -> None:
        """Raises ModelError if the tower's activation is none that CLIP has."""
        super().__init__()
        self.tower = _Tower(text, len(text.encoder.layers))
        self.norm = text.final_layer_norm

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the (1, L, D) embeddings of (1, L) int64 ids, L the tower's full length."""
        embeddings: Tensor = self.norm(self.tower(input_ids))
        return embeddings


class EncodePairGraph(nn.Module):
    """SDXL's two text towers: the hidden states before each one's last layer, side by side, and
    the second one's projected summary."""

    end: Tensor | None

    def __init__(self, text: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        """Raises ModelError if a tower's activation is none that CLIP has."""
        super().__init__()
        inner = second.text_model
        self.first = _Tower(text, len(text.encoder.layers) - 1)
        self.second = _Tower(inner, len(inner.encoder.layers) - 1)
        self.last = _text_layer(inner, inner.encoder.layers[-1])
        self.norm = inner.final_layer_norm
        self.projection = second.text_projection
        end = inner.config.eos_token_id
        written = end != _UNWRITTEN_END
        self.register_buffer("end", torch.tensor([end]) if written else None, persistent=False)

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (1, L, D1 + D2) embeddings and the (1, P) pooled text of each tokenizer's
        (1, L) int64 ids."""
        first, second = self.first(input_ids), self.second(input_ids_2)
        hidden = self.norm(self.last(second, self.second.mask))
        # as transformers finds it: configurations from before the token that closes a prompt was
        # written into them say 2; it has the highest id
        marks = input_ids_2 if self.end is None else input_ids_2 == self.end
        place = marks.to(torch.float32).argmax(dim=-1)
        pooled: Tensor = self.projection(hidden.index_select(1, place).reshape(1, -1))
        return torch.cat([first, second], dim=-1), pooled


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


class VectorDecodeGraph(nn.Module):
    """The same of a VQModel: each cell's latents become the nearest of the codebook's vectors."""

    squares: Tensor

    def __init__(self, vqvae: VQModel) -> None:
        """Raises ModelError if the codebook's vectors are not the latents themselves."""
        super().__init__()
        if vqvae.quantize.remap is not None or vqvae.config.lookup_from_codebook:
            raise ModelError("the VQModel maps its codebook anew: only a plain one can be built")
        self.per_latent = 1.0 / vqvae.config.scaling_factor
        self.codebook = vqvae.quantize.embedding
        squares = self.codebook.weight.detach().square().sum(dim=1)
        self.register_buffer("squares", squares, persistent=False)
        self.post_quant_conv = vqvae.post_quant_conv
        self.decoder = vqvae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Returns the (1, 3, H, W) picture of (1, C, h, w) latents as the denoiser scales them."""
        batch, channels, height, width = latents.shape
        cells = (latents * self.per_latent).permute(0, 2, 3, 1).reshape(-1, channels)
        # the cells' own squares are the same for every vector
        distances = self.squares - 2.0 * F.linear(cells, self.codebook.weight)
        nearest = self.codebook(distances.argmin(dim=1))
        quantised = nearest.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        picture: Tensor = self.decoder(self.post_quant_conv(quantised)) * 0.5 + 0.5
        return picture.clamp(0.0, 1.0)


class PixelGraph(nn.Module):
    """The picture of a denoiser that works on pixels: in [0, 1] instead of [-1, 1]."""

    def forward(self, latents: Tensor) -> Tensor:
        """Returns (1, 3, H, W) for (1, 3, H, W)."""
        return (latents * 0.5 + 0.5).clamp(0.0, 1.0)


def decode_graph(vae: nn.Module | None) -> nn.Module:
    """Returns what makes pictures of a denoiser's latents.

    Args:
        vae: The pipeline's autoencoder; None where the denoiser works on pixels.

    Raises:
        ModelError: It is one that cannot be built.
    """
    if vae is None:
        return PixelGraph()
    return VectorDecodeGraph(vae) if isinstance(vae, VQModel) else DecodeGraph(vae)


class _Tower(nn.Module):
    """A CLIP text tower's embeddings and its first layers."""

    mask: Tensor
    positions: Tensor

    def __init__(self, text: CLIPTextModel, layers: int) -> None:
        super().__init__()
        length = text.config.max_position_embeddings
        self.tokens = text.embeddings.token_embedding
        positions = text.embeddings.position_embedding.weight.detach().clone()
        self.register_buffer("positions", positions, persistent=False)
        mask = torch.full((length, length), _MASKED).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.layers = nn.ModuleList(
            _text_layer(text, layer) for layer in text.encoder.layers[:layers]
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the (1, L, D) hidden states of (1, L) int64 ids."""
        hidden: Tensor = self.tokens(input_ids) + self.positions
        for layer in self.layers:
            hidden = layer(hidden, self.mask)
        return hidden


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


def _text_layer(text: CLIPTextModel, layer: Any) -> _TextLayer:
    config = text.config
    return _TextLayer(layer, config.num_attention_heads, _activation(config.hidden_act))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    known: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": _quick_gelu, "gelu": F.gelu}
    if name not in known:
        raise ModelError(
            f"the text encoder's activation is {name}: CLIP's are {' and '.join(sorted(known))}"
        )
    return known[name]
