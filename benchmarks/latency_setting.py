"""What is exported to be measured and predicted."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """One exported graph.

    Attributes:
        graph: What is exported: "denoise", "denoise_shallow", "encode", "decode" or
            "operator".
        kind: Of a UNet: "attention" (transformers at its upper level and in the middle) or
            "convolution" (in the middle alone); "text" or "picture" for the others; what
            an operator does.
        widths: Channels of each level; in and out of an operator.
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
