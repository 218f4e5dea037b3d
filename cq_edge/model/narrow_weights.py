"""Half-precision weights that each layer widens to float32 for as long as it runs.

SDXL's UNet takes 10 GB in float32, and its file half of that, which the system maps and can drop
again. Where a UNet is only run, or converted part by part, float32 weights need never be whole.
"""

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def widen_while_running(root: nn.Module) -> None:
    """Lets every layer below `root` with half-precision weights compute in float32."""
    for module in root.modules():
        if any(p.dtype in HALVES for p in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)


def widen(root: nn.Module) -> None:
    """Gives every module below `root` float32 weights of its own, for good."""
    for module in root.modules():
        if _widen in module._forward_pre_hooks.values():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            _widen(module, ())
            del module.__dict__["narrow"]


def _widen(module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
    module.__dict__["narrow"] = dict(module._parameters)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)


def _narrow(module: nn.Module, _inputs: tuple[Tensor, ...], _outputs: object) -> None:
    module._parameters.update(module.__dict__.pop("narrow"))
