"""What an operator of a Core ML program is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cq_edge.errors import BundleError


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """One operation's inputs by name.

    Attributes:
        values: Tensors, floating-point ones in float32 whatever they are stored as; lists of
            them; and strings. Inputs that were left out are missing.
        where: Names the operation in messages.
    """

    values: Mapping[str, Any]
    where: str

    def tensor(self, name: str) -> Tensor:
        """Returns an input."""
        value: Tensor = self.values[name]
        return value

    def optional(self, name: str) -> Tensor | None:
        """Returns an input, None where it was left out."""
        return self.values.get(name)

    def tensors(self, name: str) -> list[Tensor]:
        """Returns an input that is a list."""
        return list(self.values[name])

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Returns a vector of whole numbers, `default` where it was left out."""
        if name not in self.values and default is not None:
            return list(default)
        return [int(number) for number in self.values[name].reshape(-1)]

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a whole number, `default` where it was left out."""
        return self.integers(name, None if default is None else [default])[0]

    def number(self, name: str, default: float) -> float:
        """Returns a number, `default` where it was left out."""
        return float(self.values[name]) if name in self.values else default

    def flag(self, name: str) -> bool:
        """Returns a truth value, False where it was left out."""
        return name in self.values and bool(self.values[name])

    def text(self, name: str, default: str) -> str:
        """Returns a string, `default` where it was left out."""
        return str(self.values.get(name, default))

    def refuse(self, what: str) -> BundleError:
        """Returns the error for an argument that the interpreter cannot honour."""
        return BundleError(f"{self.where} has {what}, which the reference interpreter does not do")
