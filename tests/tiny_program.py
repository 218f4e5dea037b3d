"""Four tiny torch modules of a bundle's graphs, and the real `.pte` program made of them."""

import torch
from torch import Tensor, nn

from tests.tiny_bundle import CHANNELS, SIDE, WIDTH


class _Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, CHANNELS, 3, padding=1)

    def forward(self, latents: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        return torch.tanh(self.conv(latents) + timestep / 1000 + embeddings.mean())


class FullUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = _Trunk()

    def forward(
        self, latents: Tensor, timestep: Tensor, embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        feature = self.trunk(latents, timestep, embeddings)
        return feature * 0.7 + latents * 0.3, feature


class ShallowUNet(nn.Module):
    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        embeddings: Tensor,
        cached_feature: Tensor,
        gain: Tensor,
        bias: Tensor,
        output_gain: Tensor,
        output_bias: Tensor,
    ) -> Tensor:
        corrected = cached_feature * gain[None, :, None, None] + bias[None, :, None, None]
        for half in (slice(0, CHANNELS), slice(CHANNELS, 2 * CHANNELS)):
            factor, offset = output_gain[half], output_bias[half]
            corrected = corrected * factor[None, :, None, None] + offset[None, :, None, None]
        # the real one reads them too; an input that nothing reads is dropped by the exporter
        unread = (timestep.sum() + embeddings.mean()) * 0
        return corrected * 0.7 + latents * 0.3 + unread


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1024, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


class Decoder(nn.Module):
    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents[:, :3], scale_factor=8.0).sigmoid()


def tiny_modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    modules = {
        "encode": TextEncoder(),
        "denoise": FullUNet(),
        "denoise_shallow": ShallowUNet(),
        "decode": Decoder(),
    }
    return {name: module.eval() for name, module in modules.items()}


def tiny_program(modules: dict[str, nn.Module]) -> bytes:
    """Returns the modules as one ExecuTorch program, delegated to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    latents, timestep = torch.randn(1, 4, SIDE, SIDE), torch.tensor([981.0])
    embeddings, feature = torch.randn(1, 77, WIDTH), torch.randn(1, CHANNELS, SIDE, SIDE)
    seen = (latents, timestep, embeddings)
    none = [x for n in (CHANNELS, 2 * CHANNELS) for x in (torch.ones(n), torch.zeros(n))]
    inputs = {
        "encode": (torch.zeros(1, 77, dtype=torch.int64),),
        "denoise": seen,
        "denoise_shallow": (*seen, feature, *none),
        "decode": (latents,),
    }
    programs = {name: torch.export.export(module, inputs[name]) for name, module in modules.items()}
    partitioners = {name: [XnnpackPartitioner()] for name in modules}
    lowered = to_edge_transform_and_lower(programs, partitioner=partitioners)
    return bytes(lowered.to_executorch().buffer)
