"""Who takes part, by name, in the order of the table."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from benchmarks.rivals.task import Contender

_PACKAGE = "benchmarks.rivals"

REFERENCE = "diffusers float32"
"""The contender that times and pictures are compared with."""

CONTENDERS: Mapping[str, tuple[str, str, tuple[Any, ...]]] = {
    REFERENCE: ("with_diffusers", "Diffusers", ()),
    "diffusers float32, torch.compile": ("with_diffusers", "Diffusers", ("float32", True)),
    "diffusers bfloat16": ("with_diffusers", "Diffusers", ("bfloat16",)),
    "diffusers bfloat16, torch.compile": ("with_diffusers", "Diffusers", ("bfloat16", True)),
    "diffusers float32, DeepCache 3": ("with_diffusers", "DeepCache", (3,)),
    "diffusers float32, DeepCache 5": ("with_diffusers", "DeepCache", (5,)),
    "OpenVINO float32": ("with_openvino", "OpenVINO", ("float", "f32")),
    "OpenVINO bfloat16": ("with_openvino", "OpenVINO", ("float", "bf16")),
    "OpenVINO int8 weights, bfloat16": ("with_openvino", "OpenVINO", ("int8", "bf16")),
    "OpenVINO W8A8, float32": ("with_openvino", "OpenVINO", ("w8a8", "f32")),
    "OpenVINO W8A8, bfloat16": ("with_openvino", "OpenVINO", ("w8a8", "bf16")),
    "ONNX Runtime float32": ("with_onnxruntime", "OnnxRuntime", ("float32",)),
    "ONNX Runtime int8, dynamic": ("with_onnxruntime", "OnnxRuntime", ("dynamic",)),
    "ONNX Runtime int8, dynamic, Linear alone": (
        "with_onnxruntime",
        "OnnxRuntime",
        ("dynamic_linear",),
    ),
    "ONNX Runtime int8, static": ("with_onnxruntime", "OnnxRuntime", ("static",)),
    "stable-diffusion.cpp q8_0": ("with_sdcpp", "StableDiffusionCpp", ("q8_0",)),
    "stable-diffusion.cpp q8_0, ucache": ("with_sdcpp", "StableDiffusionCpp", ("q8_0", "ucache")),
    "stable-diffusion.cpp q8_0, spectrum": (
        "with_sdcpp",
        "StableDiffusionCpp",
        ("q8_0", "spectrum"),
    ),
    "cq-edge float32, every step full": ("with_cq_edge", "CQEdge", (False,)),
    "cq-edge float32, planned": ("with_cq_edge", "CQEdge", (False, True)),
    "cq-edge int8, every step full": ("with_cq_edge", "CQEdge", (True,)),
    "cq-edge int8, planned": ("with_cq_edge", "CQEdge", (True, True)),
}
"""Module, class and arguments of each."""


def make(name: str) -> Contender:
    """Returns a contender; its library is not imported yet."""
    module, kind, arguments = CONTENDERS[name]
    contender: Contender = getattr(import_module(f"{_PACKAGE}.{module}"), kind)(*arguments)
    return contender
