"""Names, shapes and element types of each graph's inputs and outputs: every door obeys them."""

from dataclasses import dataclass

from cq_edge.manifest import TOKEN_INPUTS, TensorSpec


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """One graph's contract; inputs and outputs stand in call order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_specs(
    latents: tuple[int, int, int],
    image_px: tuple[int, int],
    embedding_width: int | None,
    feature_channels: int,
    consumed_channels: int,
    token_count: int = 77,
    pooled_width: int | None = None,
    *,
    takes_guidance: bool = False,
) -> dict[str, GraphSpec]:
    """Returns the contracts of the graphs, by name, for batch 1.

    Args:
        latents: Channels, height and width of the latents.
        image_px: Height and width of the picture.
        embedding_width: D of the prompt's embeddings; None where nothing is prompted, and then
            there is no graph that encodes.
        feature_channels: C of the cached feature, which has the latents' height and width.
        consumed_channels: Of the layers that consume the cached feature, all together.
        token_count: L of the prompt.
        pooled_width: P of the pooled text of two text encoders; None where there is one.
        takes_guidance: Whether the UNet is told the guidance scale.
    """
    channels, height, width = latents
    noisy = TensorSpec("latents", (1, channels, height, width), "float32")
    timestep = TensorSpec("timestep", (1,), "float32")
    ids = [TensorSpec(TOKEN_INPUTS[0], (1, token_count), "int64")]
    encoded = []
    if embedding_width is not None:
        encoded.append(TensorSpec("embeddings", (1, token_count, embedding_width), "float32"))
    if pooled_width is not None:
        ids.append(TensorSpec(TOKEN_INPUTS[1], (1, token_count), "int64"))
        encoded.append(TensorSpec("pooled", (1, pooled_width), "float32"))
    scale = [TensorSpec("guidance_scale", (1,), "float32")] if takes_guidance else []
    feature = TensorSpec("cached_feature", (1, feature_channels, height, width), "float32")
    gain = TensorSpec("gain", (feature_channels,), "float32")
    bias = TensorSpec("bias", (feature_channels,), "float32")
    output_gain = TensorSpec("output_gain", (consumed_channels,), "float32")
    output_bias = TensorSpec("output_bias", (consumed_channels,), "float32")
    reused = (feature, gain, bias, output_gain, output_bias)
    predicted = TensorSpec("noise_pred", noisy.shape, "float32")
    image = TensorSpec("image", (1, 3, *image_px), "float32")
    conditioned = (noisy, timestep, *encoded, *scale)
    specs = (
        *([GraphSpec("encode", tuple(ids), tuple(encoded))] if encoded else []),
        GraphSpec("denoise", conditioned, (predicted, feature)),
        GraphSpec("denoise_shallow", (*conditioned, *reused), (predicted,)),
        GraphSpec("decode", (noisy,), (image,)),
    )
    return {spec.name: spec for spec in specs}
