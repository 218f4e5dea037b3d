"""A trained denoiser with wider layers: what it computes stays nearly the same, and trains on.

Source: Chen et al. 2016, "Net2Net", section 2.2: a new channel repeats an old one, and the
layers that read both share its weight between them. Only normalisation over groups and tokens
then sees other channels than before, which some training mends.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

_HEAD = 32  # channels of an attention head


def widen(narrow: UNet2DConditionModel, wide: UNet2DConditionModel) -> UNet2DConditionModel:
    """Gives `wide` the function of `narrow`, and returns it.

    Args:
        narrow: Trained.
        wide: Of the same make, its layers as wide or wider; changed in place.
    """
    generator = torch.Generator().manual_seed(0)
    repeats = _Repeats(narrow, wide, generator)
    old = dict(narrow.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(repeats.widened(name, old[name], parameter))
    return wide


class _Repeats:
    """Which old channel each new one repeats."""

    def __init__(
        self, narrow: UNet2DConditionModel, wide: UNet2DConditionModel, generator: torch.Generator
    ) -> None:
        self.generator = generator
        self.groups = narrow.config.norm_num_groups
        self.pairs = tuple(
            zip(narrow.config.block_out_channels, wide.config.block_out_channels, strict=True)
        )
        self.streams = {(old, new): self._by_group(old, new) for old, new in self.pairs}
        self.inner: dict[str, Tensor] = {}

    def widened(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """Returns the old parameter in the shape of the new one."""
        rows = self._rows(name, old.shape[0], new.shape[0])
        result = old[rows]
        if old.dim() > 1:
            columns = self._columns(name, old.shape[1], new.shape[1])
            shares = self._shares(columns).reshape(-1, *[1] * (old.dim() - 2))
            result = result[:, columns] * shares
        return result

    def _rows(self, name: str, old: int, new: int) -> Tensor:
        if any(f".{part}." in name for part in ("to_q", "to_k", "to_v")):
            return self._of_layer(name.split(".to_")[0], old, new, _HEAD)
        if ".ff.net.0." in name:
            half = self._of_layer(name.split(".net.")[0], old // 2, new // 2, 1)
            return torch.cat([half, half + old // 2])
        return self._stream(old, new)

    def _columns(self, name: str, old: int, new: int) -> Tensor:
        if ".to_out." in name:
            return self._of_layer(name.split(".to_")[0], old, new, _HEAD)
        if ".ff.net.2." in name:
            return self._of_layer(name.split(".net.")[0], old, new, 1)
        return self._stream(old, new)

    def _stream(self, old: int, new: int) -> Tensor:
        """Returns the map of a width, or of two that are concatenated."""
        if (old, new) in self.streams:
            return self.streams[old, new]
        if old == new:
            return torch.arange(old)
        for first_old, first_new in reversed(self.pairs):
            second = (old - first_old, new - first_new)
            if second in self.streams:
                first = self.streams[first_old, first_new]
                return torch.cat([first, self.streams[second] + first_old])
        raise ValueError(f"{old} channels cannot become {new}")

    def _of_layer(self, layer: str, old: int, new: int, together: int) -> Tensor:
        """Returns the map of what lies inside one layer, `together` channels at a time."""
        if layer not in self.inner:
            units = self._extended(old // together, new // together)
            offsets = torch.arange(together)
            self.inner[layer] = (units[:, None] * together + offsets).flatten()
        return self.inner[layer]

    def _by_group(self, old: int, new: int) -> Tensor:
        """Returns a map that leaves each channel in its group."""
        width = old // self.groups
        groups = [
            self._extended(width, new // self.groups) + group * width
            for group in range(self.groups)
        ]
        return torch.cat(groups)

    def _extended(self, old: int, new: int) -> Tensor:
        extra = torch.randperm(old, generator=self.generator)[: new - old]
        return torch.cat([torch.arange(old), extra])

    def _shares(self, columns: Tensor) -> Tensor:
        """Returns what each reader gets of a channel: unequal parts, so that they can part."""
        parts = 0.5 + torch.rand(len(columns), generator=self.generator)
        total = torch.zeros(int(columns.max()) + 1).index_add(0, columns, parts)
        return parts / total[columns]
