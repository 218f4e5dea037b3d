"""Replacing submodules in place, once per module however many parents share it."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)
Root = TypeVar("Root", bound=nn.Module)


def copied(module: Root) -> Root:
    """Returns a copy of a module and of all below it that has the very tensors of the original:
    surgeries may give the copy's layers other tensors, and must not change one in place."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


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
