"""Which bytes of a `.pte` belong to which of its methods, read from the file itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir.schema import Tensor

from exporters.program_file import read_program


@dataclass(frozen=True, slots=True)
class MethodBytes:
    """One method's share of a file: its delegated programs, and its weights by identity.

    Weights are keyed by what the file stores them under; two methods that hold the same key
    share one copy.
    """

    program_bytes: int
    weights: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes that the method would take alone."""
        return self.program_bytes + sum(self.weights.values())


def method_bytes(path: Path) -> dict[str, MethodBytes]:
    """Returns each method's share of a `.pte`."""
    file = read_program(path)
    program, named = file.program, file.named_data
    sizes = {
        key.encode(): len(named.buffers[entry.buffer_index])
        for key, entry in named.pte_data.items()
    }
    found = {}
    for plan in program.execution_plan:
        blobs = [
            bytes(program.backend_delegate_data[d.processed.index].data) for d in plan.delegates
        ]
        # an XNNPACK program names each of its weights by the key that the file stores it under
        weights = {k.decode(): n for k, n in sizes.items() if any(k in blob for blob in blobs)}
        weights |= _constants(plan, program.constant_buffer)
        found[plan.name] = MethodBytes(sum(map(len, blobs)), weights)
    return found


def together(methods: Iterable[MethodBytes]) -> MethodBytes:
    """Returns what several methods of one file take, shared weights counted once."""
    methods = list(methods)
    weights: dict[str, int] = {}
    for method in methods:
        weights |= method.weights
    return MethodBytes(sum(m.program_bytes for m in methods), weights)


def _constants(plan: Any, constant_buffer: Any) -> dict[str, int]:
    """Returns the weights that stay outside the delegate, by their place in the file."""
    constants = {}
    for value in plan.values:
        tensor = value.val
        if isinstance(tensor, Tensor) and tensor.data_buffer_idx and not tensor.allocation_info:
            index = tensor.data_buffer_idx
            constants[f"constant {index}"] = len(constant_buffer[index].storage)
    return constants
