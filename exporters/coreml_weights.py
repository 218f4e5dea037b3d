"""How a weight is stored in a Core ML program: as float16, or compressed.

The chip decompresses weights when it loads or runs the program; what it computes with is float16
either way.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import coremltools.optimize.coreml as cto
import numpy as np
from numpy.typing import NDArray

from exporters.coreml_palette import palette

BLOCK = 32
TARGET_ORDER = {"ios17": 17, "ios18": 18}
"""The systems that a package can be made for, and which came first."""
_SMALLEST = 2048  # elements: what is smaller is hardly worth a scale
_HALF_BITS, _HALF_BYTES = 16, 2
_ALIGNMENT = 64  # of blobs in a weight file; also the size of their header


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One way to store a weight.

    Attributes:
        name: As the command line calls it.
        bits: Of one element, scales and tables apart.
        is_palette: Whether elements are indices into one table for the whole weight, not steps
            of a scale: one scale for each output channel at 8 bits, for `BLOCK` of its input
            channels at 4; float16, at 16 bits, is neither.
        oldest_target: The oldest system that can express it.
    """

    name: str
    bits: int
    is_palette: bool
    oldest_target: str

    def restored(self, weight: NDArray[np.generic]) -> NDArray[np.float32]:
        """Returns what a program computes with in the place of a (O, …) weight."""
        if self.bits == _HALF_BITS:
            return weight.astype(np.float16).astype(np.float32)
        if self.is_palette:
            table, indices = palette(weight, self.bits)
            return table[indices].reshape(weight.shape).astype(np.float32)
        # in float16 throughout, as coremltools does it
        groups = weight.astype(np.float16).reshape(self._scales(weight), -1)
        most = (1 << self.bits - 1) - 1
        largest = np.abs(groups).max(axis=1, keepdims=True)
        scale = np.where(largest > 0, (largest + largest) / (2 * most), 1).astype(np.float16)
        steps = np.clip(np.round(groups / scale), -most, most).astype(np.float32)
        restored: NDArray[np.float32] = (steps * scale.astype(np.float32)).reshape(weight.shape)
        return restored

    def stored_bytes(self, weight: NDArray[np.generic]) -> int:
        """Returns how many bytes a (O, …) weight takes in the package's file."""
        elements = blob_bytes(-(-weight.size * self.bits // 8))
        if self.bits == _HALF_BITS:
            return elements
        if self.is_palette:
            return elements + blob_bytes(_HALF_BYTES << self.bits)
        scales = self._scales(weight)
        offsets = -(-scales * self.bits // 8)  # all 0, and stored all the same
        return elements + blob_bytes(_HALF_BYTES * scales) + blob_bytes(offsets)

    def _scales(self, weight: NDArray[np.generic]) -> int:
        return len(weight) * (weight.shape[1] // BLOCK if self.bits == 4 else 1)


FORMATS = {
    one.name: one
    for one in (
        WeightFormat("float16", _HALF_BITS, is_palette=False, oldest_target="ios17"),
        WeightFormat("int8", 8, is_palette=False, oldest_target="ios17"),
        WeightFormat("int4", 4, is_palette=False, oldest_target="ios18"),
        WeightFormat("palette8", 8, is_palette=True, oldest_target="ios17"),
        WeightFormat("palette6", 6, is_palette=True, oldest_target="ios17"),
        WeightFormat("palette4", 4, is_palette=True, oldest_target="ios17"),
        WeightFormat("palette3", 3, is_palette=True, oldest_target="ios18"),
    )
}


def blob_bytes(content: int) -> int:
    """Returns what so many bytes take in a weight file: a header, and padding."""
    return _ALIGNMENT * (1 + -(-content // _ALIGNMENT))


def weight_key(weight: NDArray[np.generic]) -> str:
    """Returns what names a weight wherever it stands: the digest of its float16 content."""
    content = np.ascontiguousarray(weight.astype(np.float16))
    return hashlib.sha256(content.tobytes()).hexdigest()


def is_compressible(weight: NDArray[np.generic]) -> bool:
    """Returns whether a weight is a matrix or a kernel that is worth compressing."""
    return weight.ndim in (2, 4) and weight.size > _SMALLEST


def compress_weights(model: Any, choose: Callable[[NDArray[np.generic]], str]) -> Any:
    """Returns a Core ML model whose weights are stored in the formats chosen for them.

    Args:
        model: As coremltools converted it, weights in float16.
        choose: Returns the name of a weight's format in `FORMATS`; asked about compressible
            weights only. Where int4 does not fit a weight's shape, int8 is taken.
    """
    wanted = {
        name: _fitting(FORMATS[choose(entry.val)], entry.val)
        for name, entry in cto.get_weights_metadata(model, weight_threshold=_SMALLEST).items()
        if is_compressible(entry.val)
    }
    chosen = {name: one for name, one in wanted.items() if one.bits != _HALF_BITS}
    steps = {name: _step_config(one) for name, one in chosen.items() if not one.is_palette}
    if steps:
        model = cto.linear_quantize_weights(model, _only(steps))
    tables = {name: _table_config(one) for name, one in chosen.items() if one.is_palette}
    if tables:
        model = cto.palettize_weights(model, _only(tables))
    return model


def fits(one: WeightFormat, weight: NDArray[np.generic]) -> bool:
    """Returns whether a format can express a weight of this shape."""
    return one.is_palette or one.bits != 4 or weight.shape[1] % BLOCK == 0


def _fitting(one: WeightFormat, weight: NDArray[np.generic]) -> WeightFormat:
    return one if fits(one, weight) else FORMATS["int8"]


def _only(configs: Mapping[str, Any]) -> Any:
    return cto.OptimizationConfig(global_config=None, op_name_configs=dict(configs))


def _step_config(one: WeightFormat) -> Any:
    if one.bits == 8:
        return cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=_SMALLEST)
    return cto.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int4",
        granularity="per_block",
        block_size=BLOCK,
        weight_threshold=_SMALLEST,
    )


def _table_config(one: WeightFormat) -> Any:
    return cto.OpPalettizerConfig(
        mode="custom",
        lut_function=lambda weight: palette(weight, one.bits),
        weight_threshold=_SMALLEST,
    )
