"""Replacing submodules in place, once per module however many parents share it."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def replace_modules(root: nn.Module, kind: type[Kind], build: Callable[[Kind], nn.Module]) -> int:
    """Replaces every submodule of a kind below `root` and returns how many there were.

    Args:
        root: Changed in place; itself never replaced.
        kind: The class looked for, subclasses included.
        build: Makes the replacement; what several parents share stays shared.
    """
    replacements: dict[int, nn.Module] = {}
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, kind):
                continue
            if id(child) not in replacements:
                replacements[id(child)] = build(child).train(child.training)
            setattr(parent, name, replacements[id(child)])
    return len(replacements)
