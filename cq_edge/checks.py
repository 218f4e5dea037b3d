"""What a bundle carries to be checked again without the model it was made of: `checks.npz`.

A few sets of inputs for each graph, what the float module computed from them, and what each
backend's exported graph computed on the machine that built the bundle; and the digests of the
files that were run there, because one bit of one weight may change less than another processor's
rounding does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import BundleError

CHECKS_FILE = "checks.npz"
_SEALS = "sha256"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Check:
    """One set of a graph's inputs by name, and the outputs: the float module's, and by backend
    the exported graphs'."""

    inputs: Arrays
    expected: Arrays
    exported: Mapping[str, Arrays]


@dataclass(frozen=True, slots=True, eq=False)
class Checks:
    """The checks of each graph, and the SHA-256 of every file of the graphs by relative path."""

    graphs: Mapping[str, Sequence[Check]]
    seals: Mapping[str, str]


def save_checks(path: Path, checks: Checks) -> None:
    """Writes the file."""
    arrays: dict[str, NDArray[Any]] = {_SEALS: np.array(sorted(checks.seals.items()), dtype=str)}
    for graph, sets in checks.graphs.items():
        for number, check in enumerate(sets):
            kinds = {"inputs": check.inputs, "expected": check.expected, **check.exported}
            for kind, named in kinds.items():
                arrays |= {f"{graph}/{number}/{kind}/{name}": a for name, a in named.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def load_checks(path: Path) -> Checks:
    """Returns what the file holds.

    Raises:
        BundleError: There is no such file, or it is none of ours.
    """
    if not path.is_file():
        raise BundleError(f"{path} is missing: without it nothing can be verified; build again")
    found: dict[str, dict[int, dict[str, dict[str, NDArray[Any]]]]] = {}
    try:
        arrays = dict(_arrays(path))
        seals = {str(file): str(digest) for file, digest in arrays.pop(_SEALS)}
        for key, array in arrays.items():
            graph, number, kind, name = key.split("/")
            found.setdefault(graph, {}).setdefault(int(number), {}).setdefault(kind, {})[name] = (
                array
            )
        graphs = {
            graph: [
                Check(kinds.pop("inputs"), kinds.pop("expected"), kinds)
                for _, kinds in sorted(sets.items())
            ]
            for graph, sets in found.items()
        }
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise BundleError(f"{path} is no file of checks: {error}") from error
    return Checks(graphs, seals)


def _arrays(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            yield key, file[key]
