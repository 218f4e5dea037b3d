"""ExecuTorch lowers copies of graphs; their constants need not be copied with them.

It copies each program before a backend may change it, weights too, and holds original, copy and
what becomes of them at once. No pass changes a constant in place.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from executorch.exir.backend import backend_api
from torch.export import ExportedProgram


@contextmanager
def uncopied_constants() -> Iterator[None]:
    """Lets the copies that lowering makes share their originals' constants within the context."""
    original = backend_api.copy
    backend_api.copy = SimpleNamespace(deepcopy=_deepcopy, copy=copy.copy)
    try:
        yield
    finally:
        backend_api.copy = original


def _deepcopy(value: Any) -> Any:
    if not isinstance(value, ExportedProgram):
        return copy.deepcopy(value)
    constants = (*value.state_dict.values(), *value.constants.values())
    return copy.deepcopy(value, {id(constant): constant for constant in constants})
