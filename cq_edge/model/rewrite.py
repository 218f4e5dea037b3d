"""A denoiser or decoder rewritten into operators that XNNPACK has, numerically equal.

Exported as it stands, Stable Diffusion's UNet falls into more than a hundred delegated pieces
with float copies between them, slower than eager torch. Each surgery replaces one kind of layer.
"""

from typing import TypeVar

from torch import nn

from cq_edge.model.lean_attention import fold_attention_biases, rewrite_attention
from cq_edge.model.lean_norms import rewrite_group_norms, rewrite_layer_norms
from cq_edge.model.lean_resnet import rewrite_resnets, rewrite_timesteps, rewrite_upsamplers
from cq_edge.model.lean_transformer import (
    fold_transformer_norms,
    rewrite_feed_forward,
    rewrite_transformers,
    rotate_residual_streams,
)
from cq_edge.model.striped_decoder import stripe_decoders
from cq_edge.model.surgery import copied

Root = TypeVar("Root", bound=nn.Module)

SURGERIES = (
    rewrite_timesteps,
    rewrite_resnets,
    rewrite_upsamplers,
    rewrite_transformers,
    rewrite_attention,
    rewrite_feed_forward,
    fold_transformer_norms,
    fold_attention_biases,
    rotate_residual_streams,
    rewrite_group_norms,
    rewrite_layer_norms,
    stripe_decoders,
)


def rewrite_for_xnnpack(module: Root) -> Root:
    """Returns a rewritten copy; what the parts of `module` share, those of the copy share too, and
    weights that no rewrite changes are the original's.

    Args:
        module: A UNet, a ModuleList of a full and a shallow one, or a decoder; float32.

    Raises:
        ModelError: If a layer is of a kind that Stable Diffusion 1.x and 2.x do not have.
    """
    rewritten = copied(module)
    for surgery in SURGERIES:
        surgery(rewritten)
    return rewritten
