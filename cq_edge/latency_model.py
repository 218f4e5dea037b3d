"""How long a graph takes on a device, predicted from its operators.

Every operator costs what it computes, what it moves and its dispatch: a roofline whose two sides
add up, since a core does not overlap them. Sums are linear in what each unit costs, so that costs
can be fitted where graphs were measured, and so that how far a graph is from the measured ones
says how uncertain its prediction is.

The units ("terms") of a graph, each with a device's cost:

    {kind} {dtype}   10⁹ multiply-adds of a matrix product, rows and columns rounded up to tiles
    {kind}           10⁹ bytes that operators of a kind read and write, weights apart
    weights          10⁹ bytes of constants
    dispatch         operators
    dispatch int8    operators that quantise or compute on eight bits or fewer
    rows int8        rows of linear layers on eight bits or fewer: each gets a scale of its own
    calls            of the engine: once for each piece that a delegate runs
"""

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import BundleError, UsageError
from cq_edge.manifest import decode, parse_object
from cq_edge.operators import DTYPES, KINDS, PRODUCTS, Operator, Operators

DEVICES = Path(__file__).parent / "devices"
MOVED = (*(kind for kind in KINDS), "weights")
"""What has a rate in bytes per second."""
_COMPUTED = tuple(f"{kind} {dtype}" for kind in PRODUCTS for dtype in DTYPES)
_NARROW = ("int8", "int4")
_STARTED = ("dispatch", "dispatch int8", "rows int8", "calls")
_ABOVE_ZERO = (
    "dispatch_us", "dispatch_int8_us", "row_int8_us", "call_us", "tile_rows", "tile_columns",
    "load_ms", "load_gb_per_s", "error", "rate_uncertainty",
)  # fmt: skip
_WITHIN = 1.645  # standard deviations to either side that hold 90 % of a normal distribution


@dataclass(frozen=True, slots=True)
class MeasuredGraph:
    """A graph that was measured on a device.

    Attributes:
        name: Of the graph.
        p50_ms: Median of a run.
        shares: Of that time, by term, as the device's costs divide it; they sum to 1.
    """

    name: str
    p50_ms: float
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        """Refuses what no measurement gives."""
        _require_above_zero("p50_ms", self.p50_ms)
        for term, share in self.shares.items():
            _require_known_term("shares", term)
            if not (math.isfinite(share) and share >= 0):
                raise BundleError(f"shares.{term} is {share}: it must be finite and 0 or more")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Milliseconds of one run of a graph.

    Attributes:
        ms: The most likely.
        low_ms: What 5 % of graphs so predicted are below.
        high_ms: What 5 % are above.
        distance: From the device's measured graphs: 0 where they pin all that the graph's time is
            made of, 1 where they say nothing about it.
        load_ms: Loading the graph; None where the device's loading was not measured.
        shares: Of `ms`, by kind of operator (and weights, rows, calls, dispatch): largest first.
    """

    ms: float
    low_ms: float
    high_ms: float
    distance: float
    load_ms: float | None
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a device's units of work cost, and where that is known from.

    Attributes:
        name: Of the device, for people.
        engine: The backend whose graphs it runs: "xnnpack", "coreml" or "qnn".
        compute_unit: Such as "cpu", 1 thread; or "cpu_and_ne".
        source: Where the measurements come from.
        date: Of the measurements, year-month-day.
        measured: What was measured, in a sentence.
        derived: What was not, and from what it follows.
        gmacs_per_s: Sustained 10⁹ multiply-adds a second, by kind of product and data type.
        gb_per_s: Sustained 10⁹ bytes a second, by kind of operator, and of weights.
        dispatch_us: Microseconds that starting an operator takes.
        dispatch_int8_us: Likewise, of those that quantise or compute on eight bits or fewer.
        row_int8_us: Microseconds that a row of a linear layer on eight bits takes, apart from what
            it computes and moves: finding its scale.
        call_us: Microseconds that calling the engine takes, apart from what it moves.
        tile_rows: What the rows of a matrix product are rounded up to a multiple of.
        tile_columns: Likewise its columns.
        load_ms: Milliseconds that loading a graph takes apart from its weights; None, as in the
            next two, where nobody measured it.
        load_gb_per_s: 10⁹ bytes of weights loaded a second.
        throttling_factor: How many times longer a run takes when the device is hot, 1 or more.
        error: Standard deviation of the relative error on graphs like those measured.
        rate_uncertainty: Relative standard deviation of a rate that no measurement pins.
        measured_graphs: What the rates were fitted on.
    """

    name: str
    engine: str
    compute_unit: str
    source: str
    date: str
    measured: str
    derived: str
    gmacs_per_s: Mapping[str, float]
    gb_per_s: Mapping[str, float]
    dispatch_us: float
    dispatch_int8_us: float
    row_int8_us: float
    call_us: float
    tile_rows: int
    tile_columns: int
    load_ms: float | None
    load_gb_per_s: float | None
    throttling_factor: float | None
    error: float
    rate_uncertainty: float
    measured_graphs: tuple[MeasuredGraph, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuses rates that are no rates; names the field and what is allowed."""
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None:
                _require_above_zero(name, value)
        hot = self.throttling_factor
        if hot is not None and not (math.isfinite(hot) and hot >= 1):
            raise BundleError(f"throttling_factor is {hot}: it must be finite and 1 or more")
        for name, known in (("gmacs_per_s", _COMPUTED), ("gb_per_s", MOVED)):
            for term, rate in getattr(self, name).items():
                if term not in known:
                    raise BundleError(f"{name} has {term!r}: it may have {', '.join(known)}")
                _require_above_zero(f"{name}.{term}", rate)
        for term in MOVED:
            if term not in self.gb_per_s:
                raise BundleError(f"gb_per_s.{term} is missing: it must be finite and above 0")

    @property
    def costs(self) -> dict[str, float]:
        """Milliseconds that a unit of each term takes."""
        per_second = {**self.gmacs_per_s, **self.gb_per_s}
        costs = {term: 1e3 / rate for term, rate in per_second.items()}
        started = (self.dispatch_us, self.dispatch_int8_us, self.row_int8_us, self.call_us)
        return {**costs, **{term: us * 1e-3 for term, us in zip(_STARTED, started, strict=True)}}

    def predict(self, operators: Operators, *, sustained: bool = False) -> Prediction:
        """Returns how long a graph takes.

        Args:
            operators: Of the graph.
            sustained: Whether the device is hot.

        Raises:
            UsageError: The device has no rate for a product or data type of the graph, or was
                never measured hot.
        """
        amounts = terms_of(operators, (self.tile_rows, self.tile_columns))
        costs = self.costs
        unknown = sorted(amounts.keys() - costs.keys())
        if unknown:
            raise UsageError(
                f"{self.name} has no rate for {', '.join(unknown)}: it has "
                f"{', '.join(self.gmacs_per_s)}"
            )
        parts = {term: amount * costs[term] for term, amount in amounts.items()}
        ms = cold_ms = sum(parts.values())
        if ms <= 0:
            raise UsageError("the graph has no operators: there is nothing to predict")
        unpinned, distance = self._uncertainty({term: part / ms for term, part in parts.items()})
        spread = math.exp(_WITHIN * math.hypot(self.error, unpinned))
        if sustained:
            if self.throttling_factor is None:
                raise UsageError(f"{self.name} has no throttling_factor: it was not measured hot")
            ms *= self.throttling_factor
        load_ms = None
        if self.load_ms is not None and self.load_gb_per_s is not None:
            load_ms = self.load_ms + amounts.get("weights", 0.0) * 1e3 / self.load_gb_per_s
        shares = _by_kind({term: part / cold_ms for term, part in parts.items()})
        return Prediction(ms, ms / spread, ms * spread, distance, load_ms, shares)

    def _uncertainty(self, shares: Mapping[str, float]) -> tuple[float, float]:
        """Returns the relative standard deviation of a graph's time that comes of its costs, and
        that over what it would be had nothing been measured.

        Source: the posterior of Bayesian linear regression with relative errors, rates
        independent at first.
        """
        terms = sorted({t for graph in self.measured_graphs for t in graph.shares} | shares.keys())
        measured = _matrix([graph.shares for graph in self.measured_graphs], terms)
        precision = measured.T @ measured / self.error**2
        precision += np.eye(len(terms)) / self.rate_uncertainty**2
        row = _matrix([shares], terms)[0]
        unpinned = float(np.sqrt(row @ np.linalg.solve(precision, row)))
        return unpinned, min(1.0, unpinned / (self.rate_uncertainty * float(np.linalg.norm(row))))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the device in a JSON file.

        Raises:
            UsageError: The file cannot be read, or a field is missing, unknown or no such number.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as a device: {error}") from error
        try:
            device: Self = decode(cls, parse_object(text, str(path)), "")
        except BundleError as error:
            raise UsageError(f"device {path.name}: {error}") from None
        return device


def device_names() -> tuple[str, ...]:
    """Returns the names of the devices that ship."""
    return tuple(sorted(path.stem for path in DEVICES.glob("*.json")))


def shipped_device(name: str) -> Device:
    """Returns a device that ships.

    Raises:
        UsageError: There is none of that name; lists those there are.
    """
    if name not in device_names():
        raise UsageError(f"no device {name!r} ships: choose one of {', '.join(device_names())}")
    return Device.load(DEVICES / f"{name}.json")


def terms_of(operators: Operators, tile: tuple[int, int] = (1, 1)) -> dict[str, float]:
    """Returns how many units of each term a graph has.

    Args:
        operators: Of the graph.
        tile: What rows and columns of matrix products are rounded up to.
    """
    amounts: defaultdict[str, float] = defaultdict(float)
    for operator in operators:
        if operator.kind in PRODUCTS:
            rows, columns = (
                -(-size // multiple) * multiple
                for size, multiple in zip((operator.rows, operator.columns), tile, strict=True)
            )
            products = operator.count * operator.batch * rows * operator.depth * columns
            amounts[f"{operator.kind} {operator.dtype}"] += products / 1e9
        moved = operator.count * (operator.read_bytes + operator.written_bytes)
        amounts[operator.kind] += moved / 1e9
        amounts["weights"] += operator.count * operator.weight_bytes / 1e9
        amounts[_started(operator)] += operator.count
        if operator.kind == "linear" and operator.dtype in _NARROW:
            amounts["rows int8"] += operator.count * operator.batch * operator.rows
    return {term: amount for term, amount in amounts.items() if amount > 0}


def _by_kind(shares: Mapping[str, float]) -> dict[str, float]:
    """Returns the shares of terms added up by their first word, largest first."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for term, share in shares.items():
        kinds[term.split()[0]] += share
    return dict(sorted(kinds.items(), key=lambda pair: -pair[1]))


def _started(operator: Operator) -> str:
    """Returns the term that starting an operator belongs to."""
    if operator.kind == "call":
        return "calls"
    narrow = operator.kind == "quantise" or operator.dtype in _NARROW
    return "dispatch int8" if narrow else "dispatch"


def fit_costs(
    measured: Sequence[tuple[Mapping[str, float], float]],
    start: Mapping[str, float],
    *,
    looseness: float,
) -> dict[str, float]:
    """Returns the costs that explain measured times best: least squares of relative errors.

    What the measurements do not pin keeps its proportion at the start: narrower products that to
    float32 products of their kind, everything else that to the rest.

    Args:
        measured: Of each graph its terms and its milliseconds.
        start: Milliseconds per unit of each term, whose proportions are believed at first.
        looseness: How far a cost may leave its proportion: a relative change of `looseness`
            counts as much as a relative error of 1 of one graph's time.
    """
    from scipy.optimize import nnls  # only fitting needs it

    terms = sorted(start)
    first = np.array([start[term] for term in terms])
    rows = _matrix([amounts for amounts, _ in measured], terms) * first
    rows /= np.array([ms for _, ms in measured])[:, None]
    scale = float(rows.sum(axis=1).sum() / np.square(rows.sum(axis=1)).sum())
    rows *= scale
    anchors, proportions = np.eye(len(terms)), np.ones(len(terms))
    for index, term in enumerate(terms):
        wide = f"{term.split()[0]} float32"
        if term in _COMPUTED and term != wide and wide in terms:
            anchors[index, terms.index(wide)], proportions[index] = -1.0, 0.0
    matrix = np.vstack([rows, anchors / looseness])
    factors, _ = nnls(matrix, np.concatenate([np.ones(len(rows)), proportions / looseness]))
    factors = np.maximum(factors, 0.02)  # a rate must be finite
    return dict(zip(terms, (first * scale * factors).tolist(), strict=True))


def _matrix(rows: Sequence[Mapping[str, float]], terms: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[row.get(t, 0.0) for t in terms] for row in rows]).reshape(-1, len(terms))


def _require_above_zero(name: str, value: float) -> None:
    if not 0 < value <= sys.float_info.max:  # a whole number may be too large for a float
        raise BundleError(f"{name} is {value!r:.40}: it must be finite and above 0")


def _require_known_term(name: str, term: str) -> None:
    if term not in (*_COMPUTED, *MOVED, *_STARTED):
        raise BundleError(f"{name} has {term!r}, which is no term of the latency model")
