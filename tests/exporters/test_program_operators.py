"""Operators read from files and from running modules, against what is known by hand."""

import pytest
import torch
from torch import nn

from cq_edge.errors import ExportError
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.operators import multiply_adds
from exporters import program_operators as module
from exporters.module_operators import module_operators
from exporters.program_operators import program_operators
from exporters.to_executorch import export_executorch


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.linear = nn.Linear(16, 24)

    def forward(self, x):
        hidden = self.conv(x)
        tokens = hidden.permute(0, 2, 3, 1).reshape(1, 36, 16)
        projected = self.linear(tokens)
        scores = torch.softmax(torch.bmm(projected, projected.transpose(1, 2)), dim=-1)
        return torch.bmm(scores, projected)


CONVOLUTION = 36 * 9 * 8 * 16
LINEAR = 36 * 16 * 24
ATTENTION = 2 * 36 * 36 * 24
PICTURE = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def _exported(module, tmp_path):
    export_executorch({"net": (module.eval(), (PICTURE,))}, tmp_path / "net.pte")
    return program_operators(tmp_path / "net.pte")["net"]


def _of(operators, kind):
    return [operator for operator in operators if operator.kind == kind]


def test_a_float_program_holds_the_products_of_its_module(tmp_path):
    found = _exported(_Net(), tmp_path)
    (convolution,), (linear,) = _of(found, "convolution"), _of(found, "linear")
    assert multiply_adds([convolution]) == CONVOLUTION
    assert (linear.rows, linear.depth, linear.columns) == (36, 16, 24)
    assert multiply_adds(found) == CONVOLUTION + LINEAR + ATTENTION
    assert convolution.weight_bytes == 4 * (9 * 8 * 16 + 16)
    assert linear.written_bytes == 4 * 36 * 24
    (softmax,) = _of(found, "softmax")
    assert softmax.read_bytes == softmax.written_bytes == 4 * 36 * 36
    assert {operator.dtype for operator in found} == {"float32"}
    assert _of(found, "call")[0].read_bytes == 4 * (8 * 36 + 36 * 24)


def test_a_quantised_program_computes_on_eight_bits_and_quantises_first(tmp_path):
    found = _exported(quantize_for_xnnpack(_Net(), keep=()), tmp_path)
    products = [*_of(found, "convolution"), *_of(found, "linear")]
    assert {operator.dtype for operator in products} == {"int8"}
    assert sum(operator.count for operator in _of(found, "quantise")) == 2
    assert _of(found, "linear")[0].read_bytes == 36 * 16  # a byte each


def test_a_watched_module_has_the_same_products():
    found = module_operators(_Net(), (PICTURE,), dtype="float16", weight_bits=6)
    assert multiply_adds(found) == CONVOLUTION + LINEAR + ATTENTION
    (convolution,) = _of(found, "convolution")
    assert convolution.weight_bytes == round((9 * 8 * 16 + 16) * 6 / 8)
    assert convolution.written_bytes == 2 * 16 * 36


def test_attention_in_one_function_counts_as_its_two_products():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    with torch.device("meta"):
        heads = torch.empty(2, 5, 77, 64)
    found = module_operators(Attention(), (heads,), dtype="float16", weight_bits=16)
    assert multiply_adds(found) == 2 * 2 * 5 * 77 * 77 * 64
    assert _of(found, "softmax")[0].written_bytes == 2 * 2 * 5 * 77 * 77


def test_an_operator_of_an_unknown_kind_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.delitem(module._KIND_OF, "XNNSoftmax")
    with pytest.raises(ExportError) as refused:
        _exported(_Net(), tmp_path)
    assert str(refused.value) == "XNNPACK operator XNNSoftmax is of a kind unknown here"
