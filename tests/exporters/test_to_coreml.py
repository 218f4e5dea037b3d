"""The four graphs of tiny models as packages, run from the disk by the interpreter."""

import numpy as np
import pytest
import torch
from torch import nn

from cq_edge.errors import ExportError
from cq_edge.metrics import sqnr_db
from cq_edge.model.split import TimeEmbedding
from exporters.coreml_weights import compress_weights
from exporters.module_graph import module_graph
from exporters.parity import check_parity
from exporters.to_coreml import export_coreml, weight_bytes
from runtime.mil.interpreter import read_functions
from tests.exporters.tiny_graphs import SPECS, UNET, tiny_arrays, tiny_graphs
from tests.model.tiny_models import tiny_unet


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Float16 packages: (folder, places, modules)."""
    folder, modules = tmp_path_factory.mktemp("coreml"), tiny_graphs()
    return folder, export_coreml(modules, SPECS, folder), modules


def test_both_unet_graphs_are_functions_of_one_package(exported):
    folder, places, _ = exported
    found = {name: (place.package, place.function) for name, place in places.items()}
    assert found == {
        "encode": ("TextEncoder.mlpackage", "main"),
        "denoise": ("Unet.mlpackage", "denoise"),
        "denoise_shallow": ("Unet.mlpackage", "denoise_shallow"),
        "decode": ("VAEDecoder.mlpackage", "main"),
    }
    assert sorted(path.name for path in folder.iterdir()) == [
        "TextEncoder.mlpackage",
        "Unet.mlpackage",
        "VAEDecoder.mlpackage",
    ]


def test_names_and_shapes_are_those_of_the_contract(exported):
    folder, places, _ = exported
    for name, place in places.items():
        function = read_functions(folder / place.package)[place.function]
        shapes = {tensor.name: tensor.shape for tensor in SPECS[name].inputs}
        assert function.input_shapes == shapes
        assert function.output_names == tuple(tensor.name for tensor in SPECS[name].outputs)


def test_every_function_computes_what_its_module_does_early_and_late(exported):
    folder, places, modules = exported
    for name, place in places.items():
        run = read_functions(folder / place.package)[place.function].run
        inputs = [tiny_arrays(SPECS[name], timestep) for timestep in (999.0, 500.25, 1.0)]
        check_parity(name, module_graph(modules[name], SPECS[name]), run, inputs, 50.0)


def test_shared_weights_are_stored_once(exported):
    folder, places, _ = exported
    both = weight_bytes(folder / "Unet.mlpackage")
    assert both <= 1.03 * places["denoise"].weight_bytes
    assert places["denoise_shallow"].weight_bytes > 0.05 * both


@pytest.mark.slow
def test_they_are_stored_once_when_compressed_too(tmp_path):
    modules = {name: m for name, m in tiny_graphs().items() if name.startswith("denoise")}
    kinds = {2: "palette6", 4: "int8"}
    compress = lambda model: compress_weights(model, lambda weight: kinds[weight.ndim])  # noqa: E731
    places = export_coreml(modules, SPECS, tmp_path, "ios18", compress)
    assert weight_bytes(tmp_path / "Unet.mlpackage") <= 1.03 * places["denoise"].weight_bytes


@pytest.mark.slow
def test_ios17_gets_a_package_for_each_graph_that_computes_the_same(tmp_path):
    modules = tiny_graphs()
    places = export_coreml(modules, SPECS, tmp_path, "ios17")
    assert places["denoise_shallow"].package == "UnetShallow.mlpackage"
    for name, place in places.items():
        run = read_functions(tmp_path / place.package)["main"].run
        inputs = [tiny_arrays(SPECS[name], 981.0)]
        check_parity(name, module_graph(modules[name], SPECS[name]), run, inputs, 50.0)


def test_float16_does_not_blur_neighbouring_timesteps(tmp_path):
    unet = tiny_unet(**UNET)
    time = TimeEmbedding(unet.time_proj, nn.Identity()).eval()
    full = SPECS["denoise"]
    spec = type(full)("time", full.inputs[1:2], (full.outputs[0],))
    export_coreml({"decode": time}, {"decode": spec}, tmp_path)
    run = read_functions(tmp_path / "VAEDecoder.mlpackage")["main"].run
    for timestep in (981.0, 980.0, 979.5):
        given = {"timestep": np.array([timestep], np.float32)}
        with torch.no_grad():
            expected = time(torch.tensor([timestep])).numpy()
        assert sqnr_db(expected, run(given)["noise_pred"]) > 60


def test_a_module_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ExportError) as refusal:
        export_coreml({"decode": nn.Identity().train()}, SPECS, tmp_path)
    assert str(refusal.value) == (
        "graph decode is in training mode: call eval() on its module first"
    )
    assert list(tmp_path.iterdir()) == []
