"""A torch module as a graph of named arrays: the reference that exports are compared with."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.graph_spec import GraphSpec
from exporters.parity import Arrays


def module_graph(
    module: nn.Module, spec: GraphSpec
) -> Callable[[Arrays], dict[str, NDArray[np.generic]]]:
    """Returns a module as the same kind of function, the reference of `check_parity`."""

    @torch.no_grad()
    def run(arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        outputs = module(*(torch.from_numpy(np.asarray(arrays[i.name])) for i in spec.inputs))
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        return {o.name: t.numpy() for o, t in zip(spec.outputs, outputs, strict=True)}

    return run
