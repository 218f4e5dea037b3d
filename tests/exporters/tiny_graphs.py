"""The four graphs of tiny models, their contracts, and inputs for them."""

import numpy as np

from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.split import split_unet
from exporters.graph_spec import graph_specs
from tests.model.tiny_models import tiny_text, tiny_unet, tiny_vae

UNET = {"layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 32}
SPECS = graph_specs(
    (4, 8, 8), (16, 16), embedding_width=32, feature_channels=16, consumed_channels=32
)


def tiny_graphs():
    full, shallow = split_unet(tiny_unet(**UNET))
    return {
        "encode": EncodeGraph(tiny_text()).eval(),
        "denoise": full.eval(),
        "denoise_shallow": shallow.eval(),
        "decode": DecodeGraph(tiny_vae(attention=False)).eval(),
    }


def tiny_arrays(spec, timestep):
    generator = np.random.default_rng(int(timestep))
    arrays = {i.name: generator.standard_normal(i.shape).astype(i.dtype) for i in spec.inputs}
    if "timestep" in arrays:
        arrays["timestep"] = np.array([timestep], np.float32)
    if "input_ids" in arrays:
        arrays["input_ids"] = generator.integers(0, 99, (1, 77))
    return arrays
