"""What is exported to be measured and predicted."""

from dataclasses import dataclass
from typing import Self

WIDTHS = ((32, 64), (48, 96), (64, 128), (96, 160), (128, 192), (160, 256))
LATENTS = (8, 16, 24, 32, 48, 64)
DATA_TYPES = ("float32", "int8")


@dataclass(frozen=True, slots=True)
class Setting:
    """One exported graph.

    Attributes:
        graph: What is exported: "denoise", "denoise_shallow", "encode", "decode" or "operator".
        kind: Of a UNet: "attention" (transformers at its upper level and in the middle) or
            "convolution" (in the middle alone); "text" or "picture" for the others; what an
            operator does; "bundle" and its name, for the graphs of one.
        widths: Channels of each level; in and out of an operator; none of a bundle's graphs.
        latents: Height and width of the latents or picture; layers of a text encoder.
        dtype: Of the weights: "float32" or "int8".
    """

    graph: str
    kind: str
    widths: tuple[int, ...]
    latents: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        widths = ".".join(map(str, self.widths))
        return f"{self.graph}-{self.kind}-{widths}-{self.latents}-{self.dtype}"

    @property
    def is_of_bundle(self) -> bool:
        """Whether it is a graph of a bundle, which nothing is fitted on."""
        return self.kind.startswith("bundle ")

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Returns the setting of a name."""
        graph, rest = name.split("-", 1)
        kind, widths, latents, dtype = rest.rsplit("-", 3)
        channels = tuple(map(int, widths.split("."))) if widths else ()
        return cls(graph, kind, channels, int(latents), dtype)
