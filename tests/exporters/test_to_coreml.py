"""The four graphs of tiny models as packages, run from the disk by the interpreter."""

from collections import Counter

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.proto.MIL_pb2 import DataType
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


def _in_float32(package, function):
    """Returns how many operations that sum or convolve have results in float32, by kind."""
    kinds = Counter()
    held = ct.utils.load_spec(str(package)).mlProgram.functions[function]
    for operation in held.block_specializations[held.opset].operations:
        kind = operation.outputs[0].type.tensorType.dataType
        if operation.type in ("add", "concat", "conv") and kind == DataType.FLOAT32:
            kinds[operation.type] += 1
    return dict(kinds)


def test_of_the_unet_only_the_first_convolution_is_in_float32(exported):
    package = exported[0] / "Unet.mlpackage"
    assert _in_float32(package, "denoise") == {"conv": 1}
    assert _in_float32(package, "denoise_shallow") == {"conv": 1}


def test_the_last_stream_is_summed_in_float32_where_that_is_asked_for(exported, tmp_path):
    modules = {name: m for name, m in exported[2].items() if name.startswith("denoise")}
    export_coreml(modules, SPECS, tmp_path, float32_stream=True)
    package = tmp_path / "Unet.mlpackage"
    # two layers in the full graph and one in the shallow: a skip joined, a shortcut, two sums each
    assert _in_float32(package, "denoise") == {"concat": 2, "conv": 3, "add": 4}
    assert _in_float32(package, "denoise_shallow") == {"concat": 1, "conv": 2, "add": 2}
    for name, function in read_functions(package).items():
        inputs = [tiny_arrays(SPECS[name], timestep) for timestep in (999.0, 1.0)]
        reference = module_graph(modules[name], SPECS[name])
        check_parity(name, reference, function.run, inputs, 50.0)


class _Sinusoids(nn.Module):
    """Stands for the layers that the sinusoids go into."""

    def forward(self, sinusoids, condition=None):
        del condition
        return sinusoids


def test_float16_does_not_blur_neighbouring_timesteps(tmp_path):
    unet = tiny_unet(**UNET)
    time = TimeEmbedding(unet.time_proj, _Sinusoids()).eval()
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
