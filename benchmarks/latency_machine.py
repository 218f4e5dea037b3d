"""The latency model on this machine: fitted on some graphs, judged on others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency_graphs import LATENTS, WIDTHS, Setting
from cq_edge.latency_model import MOVED, Device, MeasuredGraph, fit_costs, terms_of
from cq_edge.operators import DTYPES, KINDS, PRODUCTS, Operators

TILE = (1, 16)
_LOOSENESS = 10.0
_RATE_UNCERTAINTY = 0.5
_FEW_INT8 = WIDTHS[2]
# a core's rates in proportion to each other, from which fits start: what they do not pin stays so
_GMACS_PER_S = {"float32": 50.0, "float16": 100.0, "int8": 200.0, "int4": 180.0}
_GB_PER_S = dict.fromkeys(KINDS, 10.0) | {"activation": 5.0, "softmax": 5.0, "layout": 5.0}
START = {
    **{f"{kind} {dtype}": 1e3 / _GMACS_PER_S[dtype] for kind in PRODUCTS for dtype in DTYPES},
    **{term: 1e3 / rate for term, rate in _GB_PER_S.items()},
    "weights": 1e3 / 10.0,
    "dispatch": 1e-3,
    "dispatch int8": 1e-3,
    "calls": 2e-2,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One measured graph: what was exported, its operators, and the median of its turns."""

    setting: Setting
    operators: Operators
    ms: float
    spread: float


@dataclass(frozen=True, slots=True)
class Split:
    """Which points are fitted and which are held out; every other point is left out."""

    name: str
    fits: Callable[[Setting], bool]
    holds_out: Callable[[Setting], bool]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out point with its prediction."""

    point: Point
    predicted_ms: float
    low_ms: float
    high_ms: float
    distance: float

    @classmethod
    def of(cls, point: Point, device: Device) -> Self:
        """Returns a point as a device that was fitted without it predicts it."""
        p = device.predict(point.operators)
        return cls(point, p.ms, p.low_ms, p.high_ms, p.distance)

    @property
    def error(self) -> float:
        """Relative: 0.1 is a tenth too long."""
        return self.predicted_ms / self.point.ms - 1

    @property
    def is_in_range(self) -> bool:
        """Whether the measured time lies in the range of the prediction."""
        return self.low_ms <= self.point.ms <= self.high_ms


def splits() -> dict[str, list[Split]]:
    """Returns the folds of each question, by the question."""

    def is_unet(setting: Setting) -> bool:
        return setting.graph.startswith("denoise")

    def other(name: str, of: Callable[[Setting], object], values: Sequence[object]) -> list[Split]:
        def fold(value: object) -> Split:
            return Split(
                f"{name} {value}",
                lambda s: not is_unet(s) or of(s) != value,
                lambda s: is_unet(s) and of(s) == value,
            )

        return [fold(value) for value in values]

    def one_way(name: str, fits: Callable[[Setting], bool], graph: str) -> list[Split]:
        return [Split(name, fits, lambda s: s.graph == graph)]

    def is_few(setting: Setting) -> bool:
        return setting.widths == _FEW_INT8 and setting.graph == "denoise_shallow"

    def came_later(setting: Setting) -> bool:
        """Whether it was exported when the form of the model had been chosen on the others."""
        if setting.graph == "decode":
            return setting.latents > 8
        return setting.graph == "encode" or (
            setting.graph == "denoise" and setting.widths[0] >= 128
        )

    return {
        "other widths": other("width", lambda s: s.widths, WIDTHS),
        "other latents": other("latents", lambda s: s.latents, LATENTS),
        "full from shallow": one_way(
            "full", lambda s: s.graph not in ("denoise", "decode"), "denoise"
        ),
        "shallow from full": one_way(
            "shallow", lambda s: s.graph != "denoise_shallow", "denoise_shallow"
        ),
        "int8 from float32 and three small int8 graphs": [
            Split(
                "int8",
                lambda s: s.dtype == "float32" or is_few(s),
                lambda s: s.dtype == "int8" and not is_few(s),
            )
        ],
        "int8 from float32 alone": [
            Split("int8", lambda s: s.dtype == "float32", lambda s: s.dtype == "int8")
        ],
        "what came after the form was chosen": [
            Split("later", lambda s: not came_later(s), came_later)
        ],
        "decoders from the rest": one_way("decode", lambda s: s.graph != "decode", "decode"),
        "text encoders from the rest": one_way("encode", lambda s: s.graph != "encode", "encode"),
    }


def device_of(
    points: Sequence[Point], loads_ms: Mapping[str, float] | None = None, **words: str
) -> Device:
    """Returns the device that points were measured on, fitted on all of them.

    Args:
        points: What to fit.
        loads_ms: What loading each took, by the setting's name, if it was measured.
        words: The device's fields that are text.
    """
    load_ms, load_gb_per_s = _loading(points, loads_ms) if loads_ms else (None, None)
    measured = [(terms_of(point.operators, TILE), point.ms) for point in points]
    costs = fit_costs(measured, START, looseness=_LOOSENESS)
    errors = np.array([_ms(amounts, costs) / ms - 1 for amounts, ms in measured])
    free = max(1, len(points) - len({term for amounts, _ in measured for term in amounts}))
    graphs = tuple(
        MeasuredGraph(point.setting.name, round(point.ms, 4), _shares(amounts, costs))
        for point, (amounts, _) in zip(points, measured, strict=True)
    )
    return Device(
        **words,
        gmacs_per_s=_rates(costs, lambda term: term.split()[0] in PRODUCTS and " " in term),
        gb_per_s=_rates(costs, lambda term: term in MOVED),
        dispatch_us=_significant(costs["dispatch"] * 1e3),
        dispatch_int8_us=_significant(costs["dispatch int8"] * 1e3),
        call_us=_significant(costs["calls"] * 1e3),
        tile_rows=TILE[0],
        tile_columns=TILE[1],
        load_ms=load_ms,
        load_gb_per_s=load_gb_per_s,
        throttling_factor=None,
        error=float(np.sqrt(np.square(errors).sum() / free)),
        rate_uncertainty=_RATE_UNCERTAINTY,
        measured_graphs=graphs,
    )


def held_out(points: Sequence[Point], folds: Sequence[Split]) -> list[HeldOut]:
    """Returns the held-out points of all folds, each predicted without its own fold."""
    found: list[HeldOut] = []
    for fold in folds:
        fitted = [point for point in points if fold.fits(point.setting)]
        device = device_of(fitted, None, **dict.fromkeys(_WORDS, "held out"))
        outside = [point for point in points if fold.holds_out(point.setting)]
        found += [HeldOut.of(point, device) for point in outside]
    return found


_WORDS = ("name", "engine", "compute_unit", "source", "date", "measured", "derived")


def errors_of(found: Sequence[HeldOut]) -> NDArray[np.float64]:
    """Returns the absolute relative errors."""
    errors: NDArray[np.float64] = np.abs(np.array([h.error for h in found]))
    return errors


def _ms(amounts: Mapping[str, float], costs: Mapping[str, float]) -> float:
    return sum(amount * costs[term] for term, amount in amounts.items())


def _loading(points: Sequence[Point], loads_ms: Mapping[str, float]) -> tuple[float, float]:
    """Returns the milliseconds of loading a graph, and 10⁹ bytes of weights loaded a second."""
    rows = [
        ({"graph": 1.0, "weights": terms_of(p.operators)["weights"]}, loads_ms[p.setting.name])
        for p in points
        if p.setting.name in loads_ms
    ]
    costs = fit_costs(rows, {"graph": 1.0, "weights": 1e3}, looseness=_LOOSENESS)
    return round(costs["graph"], 3), _significant(1e3 / costs["weights"])


def _shares(amounts: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    total = _ms(amounts, costs)
    shares = {term: amount * costs[term] / total for term, amount in amounts.items()}
    return {term: round(share, 4) for term, share in shares.items() if share >= 5e-4}


def _rates(costs: Mapping[str, float], wanted: Callable[[str], bool]) -> dict[str, float]:
    return {term: _significant(1e3 / cost) for term, cost in costs.items() if wanted(term)}


def _significant(value: float) -> float:
    return round(value, 3 - int(log(value, 10)))
