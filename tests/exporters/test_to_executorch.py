import gc

import numpy as np
import pytest
import torch
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import nn

from cq_edge.errors import ExportError
from cq_edge.manifest import TensorSpec
from cq_edge.metrics import sqnr_db
from cq_edge.model.four_bits import nearest
from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import split_unet
from cq_edge.model.unfolded_conv import unfolded_weight
from exporters.graph_spec import GraphSpec, graph_specs
from exporters.method_bytes import method_bytes, together
from exporters.module_graph import module_graph
from exporters.parity import check_parity
from exporters.to_executorch import export_executorch, load_graph
from tests.model.tiny_models import step_inputs, tiny_text, tiny_unet, tiny_vae

SPECS = graph_specs(
    (4, 8, 8), (16, 16), embedding_width=24, feature_channels=16, consumed_channels=32
)


def test_macs_shares_constants_and_what_stays_outside_are_counted(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
            self.linear = nn.Linear(5, 7)

        def forward(self, x):
            hidden = self.linear(self.conv(x).mean((2, 3), keepdim=True).reshape(1, 5))
            return torch.erf(hidden)

    report = export_executorch(
        {"forward": (Net().eval(), (torch.randn(1, 3, 6, 4),))}, tmp_path / "net.pte"
    )
    graph = report.graphs["forward"]
    assert graph.macs == 24 * 5 * 27 + 5 * 7
    assert graph.delegated_macs_share == 1.0
    assert graph.delegates == 1
    assert graph.outside == {"aten.erf.default": 1}
    assert 0.5 < graph.delegated_ops_share < 1.0
    weights = method_bytes(tmp_path / "net.pte")["forward"].weights
    assert sum(weights.values()) == 4 * (5 * 27 + 5 * 7 + 7)
    assert report.bytes == (tmp_path / "net.pte").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["net.pte"]


def test_a_module_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ExportError) as refusal:
        export_executorch({"denoise": (nn.Linear(2, 2), (torch.ones(1, 2),))}, tmp_path / "a.pte")
    assert str(refusal.value) == (
        "graph denoise is in training mode: call eval() on its module first"
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_what_was_lowered_stays_in_memory(tmp_path):
    gc.collect()
    before = {id(found) for found in _lowered()}
    module = quantize_for_xnnpack(nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 8)))
    export_executorch({"forward": (module.eval(), (torch.ones(1, 32),))}, tmp_path / "a.pte")
    gc.collect()
    assert [found for found in _lowered() if id(found) not in before] == []


def _lowered():
    return [found for found in gc.get_objects() if type(found) is LoweredBackendModule]


def test_a_missing_method_is_named_with_those_there_are(tmp_path):
    path = tmp_path / "a.pte"
    export_executorch({"encode": (nn.Linear(2, 2).eval(), (torch.ones(1, 2),))}, path)
    with pytest.raises(ExportError) as refusal:
        load_graph(path, SPECS["decode"])
    assert str(refusal.value) == "a.pte has no method decode: it has encode"


def test_a_tensor_beside_itself_is_delegated(tmp_path):
    class Doubled(nn.Module):
        def forward(self, x):
            return torch.cat([x, x], dim=-1)

    spec = GraphSpec(
        "forward", (TensorSpec("x", (2, 3), "float32"),), (TensorSpec("y", (2, 6), "float32"),)
    )
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    report = export_executorch(
        {"forward": (Doubled().eval(), (torch.from_numpy(x),))}, tmp_path / "a.pte"
    )
    assert report.graphs["forward"].outside == {}
    doubled = load_graph(tmp_path / "a.pte", spec)({"x": x})["y"]
    assert np.array_equal(doubled, np.concatenate([x, x], axis=-1))


def test_a_convolution_of_four_bits_is_delegated_and_half_as_large(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1)).eval()
    spec = GraphSpec(
        "forward",
        (TensorSpec("x", (1, 32, 8, 6), "float32"),),
        (TensorSpec("y", (1, 64, 8, 6), "float32"),),
    )
    x = torch.randn(1, 32, 8, 6)
    sizes = {}
    for name, four_bits in (("8", {}), ("4", {"0": nearest(unfolded_weight(net[0]))})):
        path = tmp_path / f"{name}.pte"
        quantised = quantize_for_xnnpack(net, four_bits=four_bits)
        report = export_executorch({"forward": (quantised, (x,))}, path)
        assert report.graphs["forward"].outside == {}
        found = load_graph(path, spec)({"x": x.numpy()})["y"]
        with torch.no_grad():
            assert sqnr_db(quantised(x).numpy(), found) > 40
            assert sqnr_db(net(x).numpy(), found) > 15
        sizes[name] = sum(method_bytes(path)["forward"].weights.values())
    assert sizes["4"] < 0.66 * sizes["8"]


@pytest.mark.slow
@pytest.mark.parametrize(("quantised", "floor_db"), [(False, 100.0), (True, 30.0)])
def test_all_four_graphs_export_into_one_file_and_compute_what_their_modules_do(
    tmp_path, quantised, floor_db
):
    unet, inputs = tiny_unet(), step_inputs()
    original = dict(zip(("denoise", "denoise_shallow"), split_unet(unet), strict=True))
    pair = rewrite_for_xnnpack(nn.ModuleList(original.values()))
    original |= {"encode": EncodeGraph(tiny_text()), "decode": DecodeGraph(tiny_vae())}
    pair = quantize_for_xnnpack(pair) if quantised else pair
    exported = dict(zip(original, pair, strict=False))
    exported |= {name: rewrite_for_xnnpack(original[name]) for name in ("encode", "decode")}

    generator = np.random.default_rng(0)
    arrays = {
        "input_ids": generator.integers(0, 99, (1, 77)),
        "cached_feature": generator.standard_normal((1, 16, 8, 8), dtype=np.float32),
        "gain": generator.uniform(0.5, 1.5, 16).astype(np.float32),
        "bias": generator.standard_normal(16, dtype=np.float32),
        "output_gain": generator.uniform(0.5, 1.5, 32).astype(np.float32),
        "output_bias": generator.standard_normal(32, dtype=np.float32),
    }
    arrays |= zip(("latents", "timestep", "embeddings"), map(np.asarray, inputs), strict=True)
    specs = dict(SPECS)
    # the tiny text tower has another width than the tiny UNet takes: encode is checked by itself
    specs["encode"] = graph_specs((4, 8, 8), (16, 16), 32, 16, 32)["encode"]
    modules = {
        name: (
            exported[name].eval(),
            tuple(torch.from_numpy(np.asarray(arrays[i.name])) for i in spec.inputs),
        )
        for name, spec in specs.items()
    }
    report = export_executorch(modules, tmp_path / "graphs.pte")

    for name, spec in specs.items():
        floor = floor_db if name.startswith("denoise") else 100.0
        run = load_graph(tmp_path / "graphs.pte", spec)
        check_parity(name, module_graph(original[name], spec), run, [arrays], floor)
    for name in ("denoise", "denoise_shallow", "decode"):
        assert report.graphs[name].delegates == 1
        assert report.graphs[name].outside == {}
    sizes = method_bytes(tmp_path / "graphs.pte")
    both = together([sizes["denoise"], sizes["denoise_shallow"]])
    assert both.weights == sizes["denoise"].weights
    assert set(sizes["denoise_shallow"].weights) < set(sizes["denoise"].weights)
