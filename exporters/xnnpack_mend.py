"""A mend for a miscompile of ExecuTorch's XNNPACK backend, up to 1.5.1 at least.

`ChannelsLastTaggedReshapePass.input_to_nhwc` must turn the picture before a dynamically
quantised convolution to channels last. It looks for that picture by walking up first arguments
until none is left, which is the graph's first operator, and rewires that one: everything
lowers, and the result is silently wrong. The picture is what the quantising operator and the
one that chooses its parameters both read, and is what the mend converts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import (
    ChannelsLastTaggedReshapePass,
)
from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_dynamic_qdq
from executorch.exir.dialects._ops import ops as exir_ops

_PARTNER = ChannelsLastTaggedReshapePass.PARTNER_NODE
_original_input_to_nhwc = ChannelsLastTaggedReshapePass.input_to_nhwc


@contextmanager
def mended_channels_last_pass() -> Iterator[None]:
    """Lowers correctly within the context; the backend is as it was afterwards."""
    ChannelsLastTaggedReshapePass.input_to_nhwc = _input_to_nhwc
    try:
        yield
    finally:
        ChannelsLastTaggedReshapePass.input_to_nhwc = _original_input_to_nhwc


def _input_to_nhwc(
    self: Any,
    graph_module: torch.fx.GraphModule,
    input_node: torch.fx.Node,
    target_node: torch.fx.Node,
) -> None:
    if not (is_dequant(input_node) and is_dynamic_qdq(input_node)):
        _original_input_to_nhwc(self, graph_module, input_node, target_node)
        return
    quantise: Any = input_node.args[0]
    picture = quantise.args[0]
    if picture.op != "placeholder" and self.is_nhwc_node(picture):
        return
    chooses_parameters = quantise.args[1].args[0]
    turned = _channels_last_copy(self, graph_module, picture)
    for reader in (quantise, chooses_parameters):
        reader.replace_input_with(picture, turned)


def _channels_last_copy(
    self: Any, graph_module: torch.fx.GraphModule, picture: torch.fx.Node
) -> torch.fx.Node:
    """Returns the one channels-last copy of a picture, made where there is none yet."""
    turned: torch.fx.Node
    if _PARTNER in picture.meta:
        turned = picture.meta[_PARTNER]
        return turned
    with graph_module.graph.inserting_after(picture):
        turned = self.create_call_function_node(
            graph_module=graph_module,
            target=exir_ops.edge.aten._to_copy.default,
            args=(picture,),
            memory_format=torch.channels_last,
        )
    self.mark_as_nhwc_node(turned)
    self.make_partners(picture, turned)
    return turned
