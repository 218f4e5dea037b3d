"""Each operator against torch, on packages that coremltools made and saved."""

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

from cq_edge.errors import BundleError, UsageError
from runtime.mil.interpreter import OPERATORS
from tests.runtime.mil.packages import read_main, write_package

_RNG = np.random.default_rng(0)


def _array(*shape):
    return _RNG.standard_normal(shape).astype(np.float32)


_W, _B = _array(6, 4), _array(6)
_KERNEL, _GROUPED = _array(5, 6, 3, 3), _array(4, 3, 3, 2)
_INDICES = np.array([[2, 0, -1], [1, 1, 0]], np.int32)
_PAIRS = np.array([[0, 2], [1, 5]], np.int32)
_X = (2, 6, 4, 4)
_THREE = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)]
_T = torch.from_numpy

# name: (shapes of x, y, …; the program; what torch says)
_CASES = {
    "add": ([_X, (6, 1, 1)], lambda x, y: mb.add(x=x, y=y), torch.add),
    "batch_norm": (
        [_X],
        lambda x: mb.batch_norm(x=x, mean=_B, variance=_B**2, gamma=_B + 1, beta=_B, epsilon=1e-3),
        lambda x: F.batch_norm(x, _T(_B), _T(_B**2), _T(_B + 1), _T(_B), eps=1e-3),
    ),
    "cast": ([_X], lambda x: mb.cast(x=mb.mul(x=x, y=3.0), dtype="int32"), lambda x: (3 * x).int()),
    "clip": ([_X], lambda x: mb.clip(x=x, alpha=-0.5, beta=0.7), lambda x: x.clamp(-0.5, 0.7)),
    "concat": (
        [_X, (2, 1, 4, 4)],
        lambda x, y: mb.concat(values=[x, y], axis=1),
        lambda x, y: torch.cat([x, y], 1),
    ),
    "conv": (
        [_X],
        lambda x: mb.conv(x=x, weight=_KERNEL, bias=_B[:5], pad_type="custom", pad=[1, 0, 2, 1],
                          strides=[2, 1]),
        lambda x: F.conv2d(F.pad(x, (2, 1, 1, 0)), _T(_KERNEL), _T(_B[:5]), (2, 1)),
    ),
    "conv, grouped and dilated": (
        [(2, 6, 6, 5)],
        lambda x: mb.conv(x=x, weight=_GROUPED, pad_type="valid", groups=2, dilations=[2, 1]),
        lambda x: F.conv2d(x, _T(_GROUPED), groups=2, dilation=(2, 1)),
    ),
    "cos": ([_X], lambda x: mb.cos(x=x), torch.cos),
    "einsum": (
        [(2, 3, 4, 5), (2, 5, 4, 6)],
        lambda x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y),
    ),
    "equal": (
        [_X, _X],
        lambda x, y: mb.equal(x=mb.cast(x=x, dtype="int32"), y=mb.cast(x=y, dtype="int32")),
        lambda x, y: x.int() == y.int(),
    ),
    "exp": ([_X], lambda x: mb.exp(x=x), torch.exp),
    "expand_dims": (
        [(2, 3)],
        lambda x: mb.expand_dims(x=x, axes=[0, -1]),
        lambda x: x[None, ..., None],
    ),
    "gather": (
        [_X],
        lambda x: mb.gather(x=x, indices=_INDICES, axis=1),
        lambda x: torch.stack([x[:, row] for row in _INDICES.tolist()], 1),
    ),
    "gather_nd": (
        [_X],
        lambda x: mb.gather_nd(x=x, indices=_PAIRS),
        lambda x: torch.stack([x[0, 2], x[1, 5]]),
    ),
    "gelu": ([_X], lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu),
    "gelu, tanh": (
        [_X],
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu, sigmoid": (
        [_X],
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x * torch.sigmoid(1.702 * x),
    ),
    "greater_equal": ([_X, _X], lambda x, y: mb.greater_equal(x=x, y=y), torch.ge),
    "layer_norm": (
        [(2, 5, 6)],
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=_B, beta=_B + 1, epsilon=1e-2),
        lambda x: F.layer_norm(x, (6,), _T(_B), _T(_B + 1), 1e-2),
    ),
    "less": ([_X, _X], lambda x, y: mb.less(x=x, y=y), torch.lt),
    "linear": (
        [(2, 5, 4)],
        lambda x: mb.linear(x=x, weight=_W, bias=_B),
        lambda x: F.linear(x, _T(_W), _T(_B)),
    ),
    "logical_and": (
        [_X, _X],
        lambda x, y: mb.logical_and(x=mb.less(x=x, y=0.5), y=mb.less(x=y, y=0.5)),
        lambda x, y: (x < 0.5) & (y < 0.5),
    ),
    "matmul": (
        [(2, 3, 5), (2, 4, 3)],
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        lambda x, y: x.mT @ y.mT,
    ),
    "maximum": ([_X, _X], lambda x, y: mb.maximum(x=x, y=y), torch.maximum),
    "minimum": ([_X, _X], lambda x, y: mb.minimum(x=x, y=y), torch.minimum),
    "mul": ([_X, (1, 6, 1, 4)], lambda x, y: mb.mul(x=x, y=y), torch.mul),
    "pow": ([_X], lambda x: mb.pow(x=x, y=3.0), lambda x: x**3),
    "quantize": (
        [_X],
        lambda x: mb.quantize(input=x, scale=np.float32(0.05), zero_point=np.int8(3),
                              output_dtype="int8"),
        lambda x: (torch.round(x / 0.05) + 3).clamp(-128, 127).to(torch.int8),
    ),
    "dequantize": (
        [_X],
        lambda x: mb.dequantize(
            input=mb.quantize(input=x, scale=np.abs(_B), output_dtype="int8", axis=1),
            scale=np.abs(_B), axis=1),
        lambda x: torch.round(x / _T(np.abs(_B))[:, None, None]).clamp(-128, 127)
        * _T(np.abs(_B))[:, None, None],
    ),
    "real_div": ([_X, (4,)], lambda x, y: mb.real_div(x=x, y=y), torch.div),
    "reduce_argmax": (
        [_X],
        lambda x: mb.reduce_argmax(x=x, axis=1, keep_dims=False),
        lambda x: x.argmax(1).int(),
    ),
    "reduce_max": (
        [_X],
        lambda x: mb.reduce_max(x=x, axes=[1, 3], keep_dims=True),
        lambda x: x.amax((1, 3), keepdim=True),
    ),
    "reduce_mean": (
        [_X],
        lambda x: mb.reduce_mean(x=x, axes=[2, 3], keep_dims=True),
        lambda x: x.mean((2, 3), keepdim=True),
    ),
    "reduce_sum": ([_X], lambda x: mb.reduce_sum(x=x, axes=[-1]), lambda x: x.sum(-1)),
    "relu": ([_X], lambda x: mb.relu(x=x), torch.relu),
    "reshape": (
        [_X],
        lambda x: mb.reshape(x=x, shape=[0, -1, 8]),
        lambda x: x.reshape(2, -1, 8),
    ),
    "scaled_dot_product_attention": (
        _THREE,
        lambda x, y, z: mb.scaled_dot_product_attention(query=x, key=y, value=z),
        F.scaled_dot_product_attention,
    ),
    "scaled_dot_product_attention, masked": (
        [*_THREE, (5, 7)],
        lambda x, y, z, m: mb.scaled_dot_product_attention(query=x, key=y, value=z, attn_mask=m),
        F.scaled_dot_product_attention,
    ),
    "select": (
        [_X, _X],
        lambda x, y: mb.select(cond=mb.less(x=x, y=y), a=x, b=y),
        lambda x, y: torch.where(x < y, x, y),
    ),
    "sigmoid": ([_X], lambda x: mb.sigmoid(x=x), torch.sigmoid),
    "silu": ([_X], lambda x: mb.silu(x=x), F.silu),
    "sin": ([_X], lambda x: mb.sin(x=x), torch.sin),
    "slice_by_index": (
        [_X],
        lambda x: mb.slice_by_index(x=x, begin=[1, 0, -3, 1], end=[0, 5, -1, 4],
                                    stride=[1, 2, 1, 1], end_mask=[True, False, False, False],
                                    squeeze_mask=[True, False, False, False]),
        lambda x: x[1, 0:5:2, -3:-1, 1:4],
    ),
    "softmax": ([_X], lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
    "split": (
        [_X],
        lambda x: mb.split(x=x, split_sizes=[1, 5], axis=1),
        lambda x: x.split([1, 5], 1),
    ),
    "split, evenly": (
        [_X],
        lambda x: mb.split(x=x, num_splits=3, axis=1),
        lambda x: x.chunk(3, 1),
    ),
    "sqrt": ([_X], lambda x: mb.sqrt(x=mb.square(x=x)), torch.abs),
    "square": ([_X], lambda x: mb.square(x=x), torch.square),
    "squeeze": ([(2, 1, 3, 1)], lambda x: mb.squeeze(x=x, axes=[1]), lambda x: x.squeeze(1)),
    "stack": (
        [_X, _X],
        lambda x, y: mb.stack(values=[x, y], axis=2),
        lambda x, y: torch.stack([x, y], 2),
    ),
    "sub": ([_X, _X], lambda x, y: mb.sub(x=x, y=y), torch.sub),
    "tanh": ([_X], lambda x: mb.tanh(x=x), torch.tanh),
    "tile": ([(2, 3)], lambda x: mb.tile(x=x, reps=[2, 3]), lambda x: x.repeat(2, 3)),
    "transpose": (
        [_X],
        lambda x: mb.transpose(x=x, perm=[0, 2, 3, 1]),
        lambda x: x.permute(0, 2, 3, 1),
    ),
    "upsample_nearest_neighbor": (
        [_X],
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
    ),
}  # fmt: skip
# the compressed weights: program of a x, and the weight that it stands for
_BYTES = _RNG.integers(-8, 8, (6, 8), np.int8)
_SCALES, _OFFSETS = np.abs(_array(6, 2)), _RNG.integers(-8, 8, (6, 2), np.int8)
_SPREAD = np.repeat(_SCALES, 4, axis=1)
_NIBBLES = types.np_int4_dtype
_LUT = _array(16)
_CHOICES = _RNG.integers(0, 16, (6, 8), np.uint8)
_WEIGHTS = {
    "constexpr_blockwise_shift_scale": (
        lambda: mb.constexpr_blockwise_shift_scale(
            data=_BYTES.astype(_NIBBLES), scale=_SCALES, offset=_OFFSETS.astype(_NIBBLES)
        ),
        (_BYTES - np.repeat(_OFFSETS, 4, axis=1)) * _SPREAD,
        ct.target.iOS18,
    ),
    "constexpr_affine_dequantize": (
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=_BYTES, zero_point=_OFFSETS[:, 0], scale=_SCALES[:, 0], axis=0
        ),
        (_BYTES - _OFFSETS[:, :1]) * _SCALES[:, :1],
        ct.target.iOS17,
    ),
    "constexpr_lut_to_dense": (
        lambda: mb.constexpr_lut_to_dense(
            indices=_CHOICES.astype(types.np_uint4_dtype), lut=np.stack([_LUT, -_LUT]).reshape(
                2, 1, 16, 1)
        ),
        np.concatenate([_LUT[_CHOICES[:3]], -_LUT[_CHOICES[3:]]]),
        ct.target.iOS18,
    ),
    "constexpr_lut_to_dense, packed": (
        lambda: mb.constexpr_lut_to_dense(
            indices=_CHOICES.reshape(-1, 2) @ np.array([1, 16], np.uint8), lut=_LUT,
            shape=np.array([6, 8], np.uint32)
        ),
        _LUT[_CHOICES],
        ct.target.iOS17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _CASES)
def test_an_operator_computes_what_torch_does(name, tmp_path):
    shapes, build, expected = _CASES[name]
    function = read_main(write_package(tmp_path, build, *shapes))
    arrays = {n: _array(*shape) for n, shape in function.input_shapes.items()}
    found = list(function.run(arrays).values())
    right = expected(*(_T(array) for array in arrays.values()))
    right = right if isinstance(right, tuple) else (right,)
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        assert one.shape == tuple(other.shape)
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", _WEIGHTS)
def test_a_compressed_weight_is_what_it_stands_for(name, tmp_path):
    weight, expected, target = _WEIGHTS[name]
    package = write_package(
        tmp_path, lambda x: mb.linear(x=x, weight=weight()), (1, 8), target=target
    )
    function = read_main(package)
    x = _array(1, 8)
    (found,) = function.run({"x": x}).values()
    np.testing.assert_allclose(found, x @ expected.astype(np.float32).T, rtol=1e-4, atol=1e-4)


def test_every_operator_that_is_known_is_tested():
    tested = {name.split(",")[0] for name in (*_CASES, *_WEIGHTS)}
    assert tested == set(OPERATORS)


def _in_float16(operator):
    return lambda x: mb.cast(x=operator(mb.cast(x=x, dtype="fp16")), dtype="fp32")


def test_float16_is_stored_between_operators(tmp_path):
    program = _in_float16(lambda x: mb.sub(x=mb.add(x=x, y=np.float16(0.0001)), y=x))
    function = read_main(write_package(tmp_path, program, (1, 3)))
    (found,) = function.run({"x": np.ones((1, 3), np.float32)}).values()
    assert (found == 0).all()  # 1.0001 is 1 in float16


def test_inside_an_operator_nothing_is_rounded(tmp_path):
    program = _in_float16(lambda x: mb.reduce_sum(x=x, axes=[-1]))
    function = read_main(write_package(tmp_path, program, (1, 5000)))
    (found,) = function.run({"x": np.ones((1, 5000), np.float32)}).values()
    assert found == 5000  # counting in float16 would never pass 2048


def test_an_operator_that_is_not_known_is_named_with_its_place(tmp_path):
    package = write_package(tmp_path, lambda x: mb.atan(x=x, name="turn"), (1, 3))
    with pytest.raises(BundleError) as refusal:
        read_main(package)
    assert str(refusal.value).startswith(
        "function main of small.mlpackage: operation turn (atan) is of a kind that the reference "
        "interpreter does not know: it knows add, batch_norm, "
    )


def test_an_argument_that_is_not_honoured_is_refused(tmp_path):
    build = lambda x: mb.conv(x=x, weight=_KERNEL, pad_type="same", name="c")  # noqa: E731
    function = read_main(write_package(tmp_path, build, _X))
    with pytest.raises(BundleError) as refusal:
        function.run({"x": _array(*_X)})
    assert str(refusal.value) == (
        "function main of small.mlpackage: operation c (conv) has pad_type same, which the "
        "reference interpreter does not do"
    )


def test_inputs_are_refused_by_name_and_shape(tmp_path):
    function = read_main(write_package(tmp_path, lambda x: mb.exp(x=x), (1, 3)))
    with pytest.raises(UsageError) as refusal:
        function.run({"y": _array(1, 3)})
    assert str(refusal.value) == "function main of small.mlpackage takes x; it was given y"
    with pytest.raises(UsageError) as refusal:
        function.run({"x": _array(3, 1)})
    assert str(refusal.value) == (
        "function main of small.mlpackage takes x of shape [1, 3], not [3, 1]"
    )


def test_a_folder_that_is_no_package_is_refused(tmp_path):
    with pytest.raises(BundleError) as refusal:
        read_main(tmp_path)
    assert str(refusal.value) == (
        f"{tmp_path} is no Core ML package: it has no Data/com.apple.CoreML/model.mlmodel"
    )
