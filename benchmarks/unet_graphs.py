"""A UNet's full and shallow module with their contracts, as the Core ML benchmarks export them."""

from typing import TYPE_CHECKING

from apps.quiet import quiet_toolchains

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from torch import nn

    from exporters.graph_spec import GraphSpec


def unet_graphs(
    unet: "UNet2DConditionModel",
) -> "tuple[dict[str, nn.Module], dict[str, GraphSpec]]":
    """Returns both modules over the UNet's own submodules, and their contracts, by graph."""
    with quiet_toolchains():
        from cq_edge.model.split import split_unet
        from exporters.graph_spec import graph_specs
        from exporters.to_coreml import UNET_GRAPHS

    config = unet.config
    full, shallow = split_unet(unet)
    latents = (config.in_channels, config.sample_size, config.sample_size)
    channels = (shallow.feature_channels, shallow.consumed_channels)
    # the picture's size is the decoder's affair
    specs = graph_specs(latents, latents[1:], config.cross_attention_dim, *channels)
    modules = dict(zip(UNET_GRAPHS, (full.eval(), shallow.eval()), strict=True))
    return modules, {name: specs[name] for name in UNET_GRAPHS}
