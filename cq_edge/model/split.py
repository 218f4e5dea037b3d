"""A UNet as two graphs that share their weights: the full one and the shallow one.

The full graph hands out its cached feature, the hidden state that enters the last
`shallow_layers` layers of the last up block before the skip is concatenated; the shallow graph
takes it in and runs only those layers. Each module holds only the submodules that it runs,
because torch.export keeps every buffer of the module that it is given.

Beside latents and timestep both take what the UNet is told, its *context*, in this order:
`embeddings` (1, L, D) of the prompt (none of an unconditional UNet2DModel), `pooled` (1, P), the
second text encoder's summary of it (SDXL), `guidance_scale` (1,) (guidance-distilled: LCM).
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from cq_edge.errors import ModelError
from cq_edge.model.corrected_resnet import consumed, corrected

UNet: TypeAlias = UNet2DConditionModel | UNet2DModel

_DOWN_BLOCKS = ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")
_UP_BLOCKS = ("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
_MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
# configuration keys that add inputs or paths which the graphs do not have, and their neutral values
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False, None),
    "class_embed_type": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    # of UNet2DModel
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
}
_SIZES = 6  # that SDXL is told: the original's, the crop's corner, the target's
_PX_PER_CELL = 8  # of SDXL's latents
_GUIDANCE_SCALING = 1000.0  # of a guidance scale before its sinusoids, as of a timestep in 0…1


class SizedText(nn.Module):
    """SDXL's pooled text with the picture's sizes, as an offset of the time embedding.

    A bundle's pictures have one size: what the UNet is told of it is a constant.
    """

    sizes: Tensor

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        side = float(unet.config.sample_size * _PX_PER_CELL)
        told = torch.tensor([side, side, 0.0, 0.0, side, side])
        sizes = unet.add_time_proj(told).reshape(1, -1)
        self.register_buffer("sizes", sizes, persistent=False)
        self.network = unet.add_embedding

    def forward(self, pooled: Tensor) -> Tensor:
        """Returns (B, E) for the (B, P) pooled text."""
        sizes = self.sizes.expand(pooled.shape[0], -1)
        offset: Tensor = self.network(torch.cat([pooled, sizes], dim=-1))
        return offset


class TimeEmbedding(nn.Module):
    """The timestep's sinusoids and the two-layer network on top of them, with what else the UNet
    is told about the whole picture."""

    def __init__(
        self,
        sinusoids: nn.Module,
        network: nn.Module,
        guidance: nn.Module | None = None,
        text: SizedText | None = None,
    ) -> None:
        """Takes the guidance scale's sinusoids, if the network was distilled to follow one."""
        super().__init__()
        self.sinusoids = sinusoids
        self.network = network
        self.guidance = guidance
        self.text = text

    def forward(self, timestep: Tensor, *told: Tensor) -> Tensor:
        """Returns the (1, E) embedding of a (1,) timestep in 0…999.

        Args:
            timestep: (1,).
            told: Of the context `pooled` and `guidance_scale`, if it has them.
        """
        condition = None if self.guidance is None else self.guidance(told[-1] - 1.0)
        embedded: Tensor = self.network(self.sinusoids(timestep), condition)
        return embedded if self.text is None else embedded + self.text(told[0])


class SelfAttention(nn.Module):
    """An attention over a picture's own pixels, called as a transformer is."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        """Returns a tuple of the (B, C, H, W) picture."""
        return (self.attention(hidden_states),)


class Layer(nn.Module):
    """One resnet and, where the block has attention, its transformer."""

    def __init__(self, resnet: nn.Module, attention: nn.Module | None) -> None:
        super().__init__()
        self.resnet = resnet
        self.attention = attention

    def forward(self, hidden: Tensor, time: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Returns (B, C2, H, W) for `hidden` (B, C, H, W), the time and prompt embeddings."""
        return self._attend(self.resnet(hidden, time), embeddings)

    def corrected(
        self,
        hidden: Tensor,
        time: Tensor,
        embeddings: Tensor | None,
        gain: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Returns the same with the outputs of the layers that consume `hidden` corrected.

        Args:
            hidden: (B, C, H, W).
            time: (1, E).
            embeddings: (B, L, D).
            gain: (2·C2,) as `corrected_resnet.corrected` takes it.
            bias: (2·C2,).
        """
        return self._attend(corrected(self.resnet, hidden, time, gain, bias), embeddings)

    def _attend(self, hidden: Tensor, embeddings: Tensor | None) -> Tensor:
        if self.attention is None:
            return hidden
        attended: Tensor = self.attention(
            hidden, encoder_hidden_states=embeddings, return_dict=False
        )[0]
        return attended


class Stage(nn.Module):
    """The layers of one block and the resampler behind them, if it has one."""

    def __init__(self, layers: Iterable[Layer], resampler: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.resampler = resampler


class OutputHead(nn.Module):
    """The normalisation, activation and convolution that give the noise prediction."""

    def __init__(self, norm: nn.Module, activation: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.activation = activation
        self.conv = conv

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the (B, 4, h, w) noise prediction for `hidden` (B, C, h, w)."""
        predicted: Tensor = self.conv(self.activation(self.norm(hidden)))
        return predicted


class FullUNet(nn.Module):
    """The whole UNet, handing out its cached feature too.

    `last` and `outer` are the layers of the last up block: those of this graph alone, and those
    that the shallow graph runs as well.
    """

    def __init__(
        self,
        time: TimeEmbedding,
        conv_in: nn.Module,
        down: list[Stage],
        mid: Stage,
        up: list[Stage],
        last: list[Layer],
        outer: list[Layer],
        head: OutputHead,
    ) -> None:
        super().__init__()
        self.time = time
        self.conv_in = conv_in
        self.down = nn.ModuleList(down)
        self.mid = mid
        self.up = nn.ModuleList(up)
        self.last = nn.ModuleList(last)
        self.outer = nn.ModuleList(outer)
        self.head = head

    def forward(self, latents: Tensor, timestep: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the noise prediction (B, 4, h, w) and the cached feature (B, C, h, w).

        Args:
            latents: (B, 4, h, w).
            timestep: (1,), 0…999.
            context: What the UNet is told; see the top of this file.
        """
        time, embeddings = self.time(timestep, *context[1:]), _embeddings(context)
        hidden = self.conv_in(latents)
        skips = [hidden]
        for stage in cast("Iterable[Stage]", self.down):
            for layer in stage.layers:
                hidden = layer(hidden, time, embeddings)
                skips.append(hidden)
            if stage.resampler is not None:
                hidden = stage.resampler(hidden)
                skips.append(hidden)
        for layer in self.mid.layers:
            hidden = layer(hidden, time, embeddings)
        for stage in cast("Iterable[Stage]", self.up):
            for layer in stage.layers:
                hidden = layer(torch.cat([hidden, skips.pop()], dim=1), time, embeddings)
            if stage.resampler is not None:
                hidden = stage.resampler(hidden, _forced_size(hidden, skips[-1]))
        for layer in self.last:
            hidden = layer(torch.cat([hidden, skips.pop()], dim=1), time, embeddings)
        feature = hidden
        for layer in self.outer:
            hidden = layer(torch.cat([hidden, skips.pop()], dim=1), time, embeddings)
        return self.head(hidden), feature


class ShallowUNet(nn.Module):
    """The UNet's outermost layers, fed a cached feature and both halves of its correction.

    `feature_channels` is the C of that feature, `consumed_channels` the number of channels of
    the layers that consume it.
    """

    def __init__(
        self,
        time: TimeEmbedding,
        conv_in: nn.Module,
        down: list[Layer],
        outer: list[Layer],
        head: OutputHead,
        feature_channels: int,
    ) -> None:
        super().__init__()
        self.time = time
        self.conv_in = conv_in
        self.down = nn.ModuleList(down)
        self.outer = nn.ModuleList(outer)
        self.head = head
        self.feature_channels = feature_channels
        self.consumed_channels = 2 * cast("int", outer[0].resnet.out_channels)

    def forward(self, latents: Tensor, timestep: Tensor, *given: Tensor) -> Tensor:
        """Returns the (B, 4, h, w) noise prediction.

        Args:
            latents: (B, 4, h, w).
            timestep: (1,), 0…999.
            given: In this order: the context (see the top of this file);
                cached_feature: (B, C, h, w) that a full step handed out;
                gain: (C,) factor of the cache correction, 1 for none;
                bias: (C,) offset of the cache correction, 0 for none;
                output_gain: (2·C',) factor of the quantisation correction, on the outputs of the
                convolution and of the shortcut that consume the feature; 1 for none;
                output_bias: (2·C',) its offset, 0 for none.
        """
        *context, cached_feature, gain, bias, output_gain, output_bias = given
        time, embeddings = self.time(timestep, *context[1:]), _embeddings(context)
        skips = self._skips(latents, time, embeddings)
        feature = cached_feature * gain.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        first, *others = cast("Iterable[Layer]", self.outer)
        joined = torch.cat([feature, skips.pop()], dim=1)
        hidden = first.corrected(joined, time, embeddings, output_gain, output_bias)
        for layer in others:
            hidden = layer(torch.cat([hidden, skips.pop()], dim=1), time, embeddings)
        predicted: Tensor = self.head(hidden)
        return predicted

    def consumed(self, latents: Tensor, timestep: Tensor, *given: Tensor) -> Tensor:
        """Returns (B, 2·C', h, w): what the layers that consume a feature make of it.

        Args:
            latents: (B, 4, h, w).
            timestep: (1,), 0…999.
            given: The context, and the feature (B, C, h, w), corrected if it is to be.
        """
        *context, feature = given
        time = self.time(timestep, *context[1:])
        skip = self._skips(latents, time, _embeddings(context))[-1]
        resnet = cast("Layer", self.outer[0]).resnet
        return torch.cat(consumed(resnet, torch.cat([feature, skip], dim=1)), dim=1)

    def _skips(self, latents: Tensor, time: Tensor, embeddings: Tensor | None) -> list[Tensor]:
        hidden = self.conv_in(latents)
        skips = [hidden]
        for layer in self.down:
            hidden = layer(hidden, time, embeddings)
            skips.append(hidden)
        return skips


def split_unet(unet: UNet, shallow_layers: int = 1) -> tuple[FullUNet, ShallowUNet]:
    """Returns the full and the shallow module over the UNet's own submodules (none is copied).

    Args:
        unet: A Stable-Diffusion-type UNet, or an unconditional one, float.
        shallow_layers: Layers of the last up block that the shallow module runs, 1 … its count.

    Raises:
        ModelError: If the UNet has inputs or blocks that the two graphs do not.

    Source: DeepCache's branch (Ma et al. 2024, arXiv 2312.00858) and CacheQuant (2503.01323);
    1 is the cut of both published extensions, 2 that of DeepCache's original code.
    """
    reason = split_refusal(unet, shallow_layers)
    if reason is not None:
        raise ModelError(reason)
    time = _time_embedding(unet)
    head = OutputHead(unet.conv_norm_out, unet.conv_act, unet.conv_out)
    down = [Stage(_layers(block), _only(block.downsamplers)) for block in unet.down_blocks]
    *inner, last = unet.up_blocks
    up = [Stage(_layers(block), _only(block.upsamplers)) for block in inner]
    last_layers = _layers(last)
    cut = len(last_layers) - shallow_layers
    own, outer = last_layers[:cut], last_layers[cut:]
    full = FullUNet(time, unet.conv_in, down, _mid_stage(unet), up, own, outer, head)
    skip_channels = unet.config["block_out_channels"][0]
    feature_channels = outer[0].resnet.in_channels - skip_channels
    kept = cast("list[Layer]", list(down[0].layers))[: shallow_layers - 1]
    shallow = ShallowUNet(time, unet.conv_in, kept, outer, head, feature_channels)
    return full.train(unet.training), shallow.train(unet.training)


def split_refusal(unet: UNet, shallow_layers: int = 1) -> str | None:
    """Returns why this UNet cannot be split, in one sentence, or None if it can."""
    config: dict[str, Any] = dict(unet.config)
    for kinds, allowed in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        for kind in config[kinds]:
            if kind not in allowed:
                return f"the UNet has a {kind}: only {' and '.join(allowed)} can be split"
    if config["mid_block_type"] not in _MID_BLOCKS:
        known = " and ".join(filter(None, _MID_BLOCKS))
        return f"the UNet's middle block is {config['mid_block_type']}: only {known} are known"
    for key, neutral in _NEUTRAL.items():
        value = config.get(key, neutral[0])
        if value not in neutral:
            return f"the UNet has {key} = {value!r}, an input or a path that the graphs lack"
    if unet.conv_norm_out is None:
        return "the UNet has no conv_norm_out (norm_num_groups is None): it needs one"
    count = len(unet.up_blocks[-1].resnets)
    if not 1 <= shallow_layers <= count:
        return (
            f"shallow_layers is {shallow_layers}, but the last up block has {count} layers: "
            f"give 1 to {count}"
        )
    return None


def context_shapes(unet: UNet, token_count: int = 77) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a UNet is told beside latents and timestep, by name, in order.

    Args:
        unet: As `split_unet` takes it.
        token_count: L of the prompt.
    """
    config: Any = unet.config
    shapes: dict[str, tuple[int, ...]] = {}
    if not isinstance(unet, UNet2DModel):
        shapes["embeddings"] = (1, token_count, config.cross_attention_dim)
    width = _pooled_width(unet)
    if width is not None:
        shapes["pooled"] = (1, width)
    if getattr(config, "time_cond_proj_dim", None) is not None:
        shapes["guidance_scale"] = (1,)
    return shapes


def _pooled_width(unet: UNet) -> int | None:
    """Returns P of the pooled text, None where there is none."""
    config: Any = unet.config
    if getattr(config, "addition_embed_type", None) is None:
        return None
    taken: int = config.projection_class_embeddings_input_dim
    return taken - _SIZES * int(config.addition_time_embed_dim)


def _time_embedding(unet: UNet) -> TimeEmbedding:
    config: Any = unet.config
    width = getattr(config, "time_cond_proj_dim", None)
    guidance = None
    if width is not None:
        guidance = Timesteps(
            width, flip_sin_to_cos=False, downscale_freq_shift=1, scale=_GUIDANCE_SCALING
        )
    text = None if _pooled_width(unet) is None else SizedText(unet)
    return TimeEmbedding(unet.time_proj, unet.time_embedding, guidance, text)


def _embeddings(context: Sequence[Tensor]) -> Tensor | None:
    return context[0] if context else None


def _layers(block: Any) -> list[Layer]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = zip(block.resnets, attentions, strict=True)
    return [Layer(resnet, _as_transformer(attention)) for resnet, attention in pairs]


def _as_transformer(attention: nn.Module | None) -> nn.Module | None:
    return SelfAttention(attention) if isinstance(attention, Attention) else attention


def _mid_stage(unet: UNet) -> Stage:
    """Returns the middle as layers: an attention may follow every resnet but the last."""
    block = unet.mid_block
    if block is None:
        return Stage([], None)
    attentions = [*map(_as_transformer, block.attentions), None]
    return Stage((Layer(r, a) for r, a in zip(block.resnets, attentions, strict=True)), None)


def _only(resamplers: nn.ModuleList | None) -> nn.Module | None:
    return None if resamplers is None else resamplers[0]


def _forced_size(hidden: Tensor, skip: Tensor) -> tuple[int, int] | None:
    """Returns the size to upsample to where the skip is not exactly twice as large, else None."""
    height, width = skip.shape[-2:]
    doubled = (2 * hidden.shape[-2], 2 * hidden.shape[-1])
    return None if doubled == (height, width) else (height, width)
