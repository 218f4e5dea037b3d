from dataclasses import replace

import pytest

from apps.block_times import _parts, measure_blocks
from cq_edge.errors import UsageError
from cq_edge.manifest import TensorSpec
from cq_edge.model.load import load_pipeline
from cq_edge.model.split import split_unet
from runtime.bundle import Bundle, open_bundle
from tests.tiny_bundle import write_bundle
from tests.tiny_pipeline import save_tiny_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("blocks") / "pipeline")


@pytest.fixture
def fitting(tmp_path):
    """A bundle whose full graph takes what the tiny pipeline's does."""
    opened = open_bundle(write_bundle(tmp_path / "bundle", quantization="none"))
    inputs = (
        TensorSpec("latents", (1, 4, 8, 8), "float32"),
        TensorSpec("timestep", (1,), "float32"),
        TensorSpec("embeddings", (1, 77, 32), "float32"),
    )
    graphs = dict(opened.manifest.graphs)
    graphs["denoise"] = replace(graphs["denoise"], inputs=inputs)
    return Bundle(opened.folder, replace(opened.manifest, graphs=graphs))


def test_every_weight_of_the_graph_lies_in_exactly_one_part(pipeline):
    full, _ = split_unet(load_pipeline(pipeline).unet)
    counted = [id(p) for _, module in _parts(full) for p in module.parameters()]
    assert sorted(counted) == sorted(id(p) for p in full.parameters())


@pytest.mark.slow
def test_the_parts_are_exported_and_timed_in_the_order_they_run(pipeline, fitting):
    blocks = measure_blocks(fitting, str(pipeline))
    names = [block.name for block in blocks]
    assert names[:2] == ["time", "conv_in"]
    assert names[-2:] == ["outer_layer_0", "head"]
    assert all(block.p50_ms > 0 for block in blocks)
    computed = {block.name: block.multiply_adds for block in blocks}
    unet = load_pipeline(pipeline).unet
    assert computed["conv_in"] == unet.conv_in.weight.numel() * unet.config.sample_size**2
    assert min(computed.values()) > 0


def test_another_model_is_refused(pipeline, tmp_path):
    other = open_bundle(write_bundle(tmp_path / "bundle"))
    with pytest.raises(
        UsageError, match=r"takes latents \(1, 4, 8, 8\), embeddings \(1, 77, 32\), but"
    ):
        measure_blocks(other, str(pipeline))
