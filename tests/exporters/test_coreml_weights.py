import re

import coremltools as ct
import numpy as np
import pytest
import torch
from torch import nn

from cq_edge.errors import ExportError, UsageError
from cq_edge.manifest import TensorSpec
from cq_edge.metrics import sqnr_db
from cq_edge.model.eight_bit_activations import with_rounded_inputs
from cq_edge.model.weight_only import with_weights_of
from exporters.coreml_mix import choose_formats
from exporters.coreml_palette import palette
from exporters.coreml_weights import FORMATS, compress_weights, weight_key
from exporters.graph_spec import GraphSpec
from exporters.module_graph import module_graph
from exporters.to_coreml import export_coreml, weight_bytes
from runtime.mil.interpreter import read_functions

_RNG = np.random.default_rng(0)


class _Net(nn.Module):
    """A convolution and a linear layer, both large enough to compress; two outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        hidden = self.conv(x.tanh())  # a convolution of an input is computed in float32
        return self.linear(hidden.mean((2, 3))), hidden


_SPEC = GraphSpec(
    "denoise",
    (TensorSpec("x", (1, 32, 6, 5), "float32"),),
    (TensorSpec("noise_pred", (1, 64), "float32"), TensorSpec("feature", (1, 64, 6, 5), "float32")),
)
_X = {"x": _RNG.standard_normal((1, 32, 6, 5)).astype(np.float32)}


def _exported(folder, choose=None):
    compress = (lambda model: model) if choose is None else lambda m: compress_weights(m, choose)
    place = export_coreml({"denoise": _Net().eval()}, {"denoise": _SPEC}, folder, "ios18", compress)
    package = folder / place["denoise"].package
    return package, read_functions(package)["main"].run(_X)


def _restored(name):
    net = _Net().eval()
    with torch.no_grad():
        for weight in (net.conv.weight, net.linear.weight):
            weight.copy_(torch.from_numpy(FORMATS[name].restored(weight.numpy())))
    return module_graph(net, _SPEC)(_X)


def _lloyd(values, bits):
    """The same, slowly: 200 rounds over all values from 10 random starts."""
    best = np.inf
    for seed in range(10):
        levels = np.random.default_rng(seed).choice(values, 1 << bits, replace=False)
        for _ in range(200):
            nearest = np.abs(values[:, None] - levels).argmin(1)
            held = [values[nearest == i] for i in range(len(levels))]
            levels = np.array(
                [h.mean() if len(h) else v for h, v in zip(held, levels, strict=True)]
            )
        best = min(best, float(np.square(values - levels[nearest]).sum()))
    return best


def test_a_palette_leaves_about_the_least_error_that_many_searches_find():
    values = _RNG.standard_normal(2000).astype(np.float16).astype(np.float64)
    table, indices = palette(values, 3)
    assert (np.diff(table) > 0).all()
    assert float(np.square(values - table[indices]).sum()) < 1.05 * _lloyd(values, 3)


def test_a_palette_of_few_values_is_exact():
    values = np.array([[0.5, -1.0], [0.5, 2.0]], np.float16)
    table, indices = palette(values, 2)
    assert np.array_equal(table[indices].reshape(2, 2), values)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_in_the_package_computes_with_the_weights_it_says(name, tmp_path):
    package, found = _exported(tmp_path, lambda _weight: name)
    expected = _restored(name)
    for output, array in expected.items():
        assert sqnr_db(array, found[output]) > 45, output
    smallest = sum(p.numel() for p in _Net().parameters()) * FORMATS[name].bits / 8
    assert smallest < weight_bytes(package) < 1.15 * smallest + 1500


def _agreement_of(net, folder, target):
    """Returns the package's worst agreement with a module, dB, and its operators' kinds."""
    places = export_coreml({"denoise": net}, {"denoise": _SPEC}, folder, target)
    package = folder / places["denoise"].package
    expected, found = module_graph(net, _SPEC)(_X), read_functions(package)["main"].run(_X)
    program = ct.utils.load_spec(str(package)).mlProgram.functions["main"]
    operations = program.block_specializations[program.opset].operations
    worst = min(sqnr_db(array, found[name]) for name, array in expected.items())
    return worst, {operation.type for operation in operations}


@pytest.mark.parametrize(
    ("bits", "target", "operator"),
    [
        (8, "ios18", "constexpr_blockwise_shift_scale"),
        (4, "ios18", "constexpr_blockwise_shift_scale"),
        (8, "ios17", "constexpr_affine_dequantize"),
    ],
)
def test_torchaos_weights_are_carried_into_the_package(bits, target, operator, tmp_path):
    net = with_weights_of(_Net().eval().requires_grad_(requires_grad=False), bits)
    worst, operators = _agreement_of(net, tmp_path, target)
    assert worst > 50
    assert operator in operators
    smallest = sum(p.numel() for p in _Net().parameters()) * bits / 8
    package = tmp_path / "Unet.mlpackage"
    assert smallest < weight_bytes(package) < 1.15 * smallest + 1500


def test_four_bits_in_blocks_on_ios17_are_refused(tmp_path):
    net = with_weights_of(_Net().eval().requires_grad_(requires_grad=False), 4)
    with pytest.raises(ExportError, match="graph denoise could not be converted"):
        export_coreml({"denoise": net}, {"denoise": _SPEC}, tmp_path, "ios17")


@pytest.mark.parametrize("target", ["ios17", "ios18"])
def test_eight_bit_activations_compute_in_the_package_as_in_torch(target, tmp_path):
    """Single operators: over a whole UNet a rounding that falls the other way is as large as the
    rounding itself."""
    graphs = nn.ModuleList([_Net().eval().requires_grad_(requires_grad=False)])
    rounded = with_rounded_inputs(graphs, [(graphs[0], (torch.from_numpy(_X["x"]),))])
    worst, operators = _agreement_of(with_weights_of(rounded, 8)[0], tmp_path, target)
    assert worst > 45
    assert {"quantize", "dequantize"} <= operators


def test_fewer_bits_take_fewer_bytes_and_more_error(tmp_path):
    sizes, ratios = [], []
    for name in ("int8", "palette6", "palette4", "palette3"):
        (tmp_path / name).mkdir()
        package, found = _exported(tmp_path / name, lambda _weight, name=name: name)
        sizes.append(weight_bytes(package))
        exact = module_graph(_Net().eval(), _SPEC)(_X)
        ratios.append(sqnr_db(exact["feature"], found["feature"]))
    assert sizes == sorted(sizes, reverse=True)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 38


def test_the_mix_fits_and_keeps_bits_where_they_matter():
    class Lopsided(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.loud = nn.Linear(64, 64, bias=False)
            self.faint = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.loud(x) + 1e-3 * self.faint(x), self.loud(x)

    net = Lopsided().eval().requires_grad_(requires_grad=False)
    inputs = [{"x": _RNG.standard_normal((1, 64)).astype(np.float32)} for _ in range(2)]
    chosen = choose_formats(net, inputs, 4.6, "ios18")
    assert chosen[weight_key(net.loud.weight.numpy())] == "int8"
    assert chosen[weight_key(net.faint.weight.numpy())].startswith("palette")
    assert not net.loud.weight.requires_grad


def test_more_compression_than_there_is_says_what_is_possible_and_what_ios18_adds():
    net = _Net().eval().requires_grad_(requires_grad=False)
    with pytest.raises(UsageError) as refusal:
        choose_formats(net, [_X], 9.0, "ios17")
    assert re.sub(r"7\.\d\d", "7.__", str(refusal.value)) == (
        "the Core ML UNet cannot be 9 times smaller on ios17: with its smallest weights everywhere "
        "it is 7.__ times smaller; ask for less, or for --coreml-target ios18, which has smaller "
        "palettes (and keeps both UNet graphs in one package)"
    )
    with pytest.raises(UsageError, match=r"ask for less$"):
        choose_formats(net, [_X], 20.0, "ios18")
