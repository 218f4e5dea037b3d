"""The gate of every export: what the file computes against what the float module computes.

Delegation counts prove nothing, since a miscompiled graph delegates as fully as a right one:
the exported graph is run, and compared in dB.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import ParityError, UsageError
from cq_edge.metrics import sqnr_db

Arrays = Mapping[str, NDArray[np.generic]]
Graph = Callable[[Arrays], Arrays]


@dataclass(frozen=True, slots=True)
class ParityReport:
    """How far an exported graph is from its reference, over all inputs; inf where equal.

    Attributes:
        name: The graph.
        min_db: The signal-to-error ratio of the worst output of the worst input.
        floor_db: What `min_db` had to reach.
        min_db_by_output: The worst input's ratio of every output.
    """

    name: str
    min_db: float
    floor_db: float
    min_db_by_output: Mapping[str, float]


def check_parity(
    name: str,
    reference: Graph,
    exported: Graph,
    inputs: Sequence[Arrays],
    floor_db: float,
    cure: str = "",
) -> ParityReport:
    """Returns the report of an exported graph that computes what its reference does.

    Args:
        name: The graph, for the report and the error.
        reference: The float module as a function of named arrays; its outputs' order counts.
        exported: The file as such a function, returning the same names.
        inputs: At least one set of real inputs.
        floor_db: The least ratio allowed for every output and every input.
        cure: What would help an output that is below the floor, for the error.

    Raises:
        ParityError: If there are no inputs, names or shapes differ, or an output is below
            the floor or not finite.
    """
    if not inputs:
        raise ParityError(f"graph {name} was compared on no inputs: give at least one set")
    ratios: dict[str, list[float]] = {}
    for arrays in inputs:
        expected, actual = reference(arrays), exported(arrays)
        if list(expected) != list(actual):
            raise ParityError(
                f"graph {name} returns {', '.join(actual)}: its reference returns "
                f"{', '.join(expected)}"
            )
        for output, values in expected.items():
            ratios.setdefault(output, []).append(_ratio_db(name, output, values, actual[output]))
    for output, values_db in ratios.items():
        if not min(values_db) >= floor_db:
            raise ParityError(
                f"graph {name} computes something else than its float module: {output} agrees "
                f"to {min(values_db):.1f} dB, and at least {floor_db:.1f} dB are required"
                f"{cure and f'; {cure}'}"
            )
    worst = {output: min(values_db) for output, values_db in ratios.items()}
    return ParityReport(name, min(worst.values()), floor_db, worst)


def _ratio_db(
    name: str, output: str, expected: NDArray[np.generic], actual: NDArray[np.generic]
) -> float:
    if expected.shape != actual.shape:
        raise ParityError(
            f"graph {name} returns {output} of shape {list(actual.shape)}: its reference's is "
            f"{list(expected.shape)}"
        )
    try:
        return sqnr_db(expected, actual)
    except UsageError as error:
        raise ParityError(f"graph {name} cannot be compared, {output}: {error}") from error
