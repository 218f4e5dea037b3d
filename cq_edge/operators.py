"""What a graph computes, operator by operator: enough to predict how long it takes on a device.

`operators.json` of a bundle holds one list of operators for each backend and graph. Equal
operators are one row with a count, so that a UNet is a few kilobytes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cq_edge.errors import BundleError

OPERATORS_FILE = "operators.json"
FORMAT_VERSION = 1
PRODUCTS = ("convolution", "linear", "matmul")
"""Kinds that multiply matrices; a convolution counts as the product of its unfolded picture."""
KINDS = (
    *PRODUCTS,
    "depthwise",  # a convolution of each channel apart
    "softmax",
    "elementwise",  # sums, products, bounds
    "activation",  # exponentials and roots of each element
    "mean",
    "layout",  # transposes, concatenations, slices: copies in another order
    "reshape",
    "quantise",  # float to int8 while the graph runs
    "outside",  # what the delegate does not run
    "call",  # of a delegate: its inputs and outputs
)
DTYPES = ("float32", "float16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Operator:
    """Operators of one kind and shape.

    Attributes:
        kind: One of `KINDS`.
        dtype: What it computes on, one of `DTYPES`; int4 is four-bit weights on int8.
        batch: Matrix products in it: heads or groups, and pictures; 1 for other kinds.
        rows: Of each product's result: tokens or pixels; 0 for other kinds, as the next two.
        depth: Multiply-adds of each element of the result.
        columns: Of each product's result: channels.
        read_bytes: Of what other operators computed.
        weight_bytes: Of constants.
        written_bytes: Of the result.
        count: How many there are.
    """

    kind: str
    dtype: str
    batch: int
    rows: int
    depth: int
    columns: int
    read_bytes: int
    weight_bytes: int
    written_bytes: int
    count: int = 1

    def __post_init__(self) -> None:
        """Refuses an operator of another kind, and sizes that none has."""
        for name, allowed in (("kind", KINDS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise BundleError(
                    f'an operator\'s {name} is "{getattr(self, name)}": it must be one of '
                    f"{', '.join(allowed)}"
                )
        for entry in fields(self)[2:]:
            least = 1 if entry.name in ("batch", "count") else 0
            size = getattr(self, entry.name)
            if not isinstance(size, int) or isinstance(size, bool) or size < least:
                raise BundleError(
                    f"an operator's {entry.name} is {size!r}: it must be a whole number, "
                    f"{least} or more"
                )

    @property
    def multiply_adds(self) -> int:
        """Of all `count` of them."""
        return self.count * self.batch * self.rows * self.depth * self.columns


Operators = tuple[Operator, ...]


def merged(operators: Iterable[Operator]) -> Operators:
    """Returns the operators with equal ones counted, each where the first of them stood."""
    counts: Counter[Operator] = Counter()
    for operator in operators:
        counts[replace(operator, count=1)] += operator.count
    return tuple(replace(operator, count=count) for operator, count in counts.items())


def multiply_adds(operators: Iterable[Operator]) -> int:
    """Returns the multiply-adds of a whole graph."""
    return sum(operator.multiply_adds for operator in operators)


def save_operators(path: Path, graphs: Mapping[str, Mapping[str, Operators]]) -> None:
    """Writes the operators of each backend's graphs as JSON, a row for each."""
    columns = [entry.name for entry in fields(Operator)]
    lists = {
        backend: {name: [astuple(o) for o in merged(found)] for name, found in named.items()}
        for backend, named in graphs.items()
    }
    content = {"format_version": FORMAT_VERSION, "columns": columns, "backends": lists}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def load_operators(path: Path) -> dict[str, dict[str, Operators]]:
    """Returns what `save_operators` wrote, by backend and graph.

    Raises:
        BundleError: The file cannot be read or holds something else; says what.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as operators: {error}") from error
    columns = [entry.name for entry in fields(Operator)]
    expected = {"format_version": FORMAT_VERSION, "columns": columns}
    if not isinstance(content, dict) or content.keys() != {*expected, "backends"}:
        raise BundleError(
            f"{path} holds no operators: it needs format_version, columns and backends alone"
        )
    for key, value in expected.items():
        if content[key] != value:
            raise BundleError(f"{path}: {key} is {content[key]!r}: it must be {value!r}")
    try:
        return {
            backend: {name: tuple(Operator(*row) for row in rows) for name, rows in named.items()}
            for backend, named in content["backends"].items()
        }
    except (AttributeError, TypeError) as error:
        raise BundleError(f"{path} holds no operators: {error}") from error
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None
