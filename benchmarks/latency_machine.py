"""The latency model on this machine: fitted on some graphs, judged on others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency_setting import LATENTS, WIDTHS, Setting
from cq_edge.latency_model import MOVED, Device, MeasuredGraph, fit_costs, terms_of
from cq_edge.operators import DTYPES, PRODUCTS, Operators

TILE = (1, 16)
_LOOSENESS = 3.0
_RATE_UNCERTAINTY = 0.5
_FEW_INT8 = WIDTHS[2]
# what a core of these years does, in proportion: fits start there, and what they do not pin stays.
# int8 is four times float32, as dot products of bytes are; what is moved comes from the caches,
# more slowly where each element takes an exponential or goes to another place
_GMACS_PER_S = {"float32": 50.0, "float16": 100.0, "int8": 200.0, "int4": 180.0}
_GB_PER_S = dict.fromkeys(MOVED, 25.0) | {"activation": 12.0, "softmax": 12.0, "layout": 12.0}
START = {
    **{f"{kind} {dtype}": 1e3 / _GMACS_PER_S[dtype] for kind in PRODUCTS for dtype in DTYPES},
    **{term: 1e3 / rate for term, rate in _GB_PER_S.items()},
    "dispatch": 3e-4,
    "dispatch int8": 6e-4,
    "rows int8": 2e-5,
    "calls": 1e-2,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One measured graph: what was exported, its operators, the median of its turns and, where it
    is known, their interquartile range over it."""

    setting: Setting
    operators: Operators
    ms: float
    spread: float | None


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


def splits(*, operators: bool = True) -> dict[str, list[Split]]:
    """Returns the folds of each question, by the question.

    Args:
        operators: Whether single operators were timed, so that there is a question of them.
    """

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

    def int8(also: Callable[[Setting], bool]) -> list[Split]:
        def held(setting: Setting) -> bool:
            return setting.dtype == "int8" and not is_operator(setting) and not also(setting)

        return [Split("int8", lambda s: s.dtype == "float32" or also(s), held)]

    def is_operator(setting: Setting) -> bool:
        return setting.graph == "operator"

    def is_few(setting: Setting) -> bool:
        return setting.widths == _FEW_INT8 and setting.graph == "denoise_shallow"

    single = "int8 from float32 and single int8 operators"
    return {
        "other widths": other("width", lambda s: s.widths, WIDTHS),
        "other latents": other("latents", lambda s: s.latents, LATENTS),
        "full from shallow": one_way(
            "full", lambda s: s.graph not in ("denoise", "decode"), "denoise"
        ),
        "shallow from full": one_way(
            "shallow", lambda s: s.graph != "denoise_shallow", "denoise_shallow"
        ),
        "int8 from float32 alone": int8(lambda _: False),
        "int8 from float32 and three small int8 graphs": int8(is_few),
        **({single: int8(is_operator)} if operators else {}),
        "decoders from the rest": one_way("decode", lambda s: s.graph != "decode", "decode"),
        "text encoders from the rest": one_way("encode", lambda s: s.graph != "encode", "encode"),
    }


def device_of(
    points: Sequence[Point], loading: tuple[float | None, float | None] = (None, None), **words: str
) -> Device:
    """Returns the device that points were measured on, fitted on all of them.

    Args:
        points: What to fit.
        loading: What loading costs there, as `fit_loading` returns it, if it was measured.
        words: The device's fields that are text.
    """
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
        row_int8_us=_significant(costs["rows int8"] * 1e3),
        call_us=_significant(costs["calls"] * 1e3),
        tile_rows=TILE[0],
        tile_columns=TILE[1],
        load_ms=loading[0],
        load_gb_per_s=loading[1],
        throttling_factor=None,
        error=float(np.sqrt(np.square(errors).sum() / free)),
        rate_uncertainty=_RATE_UNCERTAINTY,
        measured_graphs=graphs,
    )


def fit_loading(points: Sequence[Point], loads_ms: Mapping[str, float]) -> tuple[float, float]:
    """Returns the milliseconds of loading a graph, and 10⁹ bytes of weights loaded a second."""
    rows = [
        (
            {"graph": 1.0, "weights": terms_of(p.operators).get("weights", 0.0)},
            loads_ms[p.setting.name],
        )
        for p in points
        if p.setting.name in loads_ms
    ]
    costs = fit_costs(rows, {"graph": 1.0, "weights": 1e3}, looseness=_LOOSENESS)
    return round(costs["graph"], 3), _significant(1e3 / costs["weights"])


def held_out(points: Sequence[Point], folds: Sequence[Split]) -> list[HeldOut]:
    """Returns the held-out points of all folds, each predicted without its own fold."""
    found: list[HeldOut] = []
    for fold in folds:
        fitted = [point for point in points if fold.fits(point.setting)]
        device = device_of(fitted, (None, None), **dict.fromkeys(_WORDS, "held out"))
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


def _shares(amounts: Mapping[str, float], costs: Mapping[str, float]) -> dict[str, float]:
    total = _ms(amounts, costs)
    shares = {term: amount * costs[term] / total for term, amount in amounts.items()}
    return {term: round(share, 4) for term, share in shares.items() if share >= 5e-4}


def _rates(costs: Mapping[str, float], wanted: Callable[[str], bool]) -> dict[str, float]:
    return {term: _significant(1e3 / cost) for term, cost in costs.items() if wanted(term)}


def _significant(value: float) -> float:
    return round(value, 3 - int(log(value, 10)))
