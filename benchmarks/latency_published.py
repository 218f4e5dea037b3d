"""The latency model on devices that others measured: each predicted from the others.

A published row is one number, so that a device has few unknowns: what share of its peak arithmetic
and of its memory bandwidth an engine reaches there, for activations and for weights. The shares
are fitted on all devices of an engine and compute unit together, then moved a little to where the
device's own rows are.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmarks.published_models import text_operators, unet_operators
from cq_edge.latency_model import Device, MeasuredGraph, fit_costs, terms_of
from cq_edge.operators import KINDS, PRODUCTS, Operators

_ROWS = Path(__file__).with_name("published_latency.json")
_PEAKS = Path(__file__).with_name("published_devices.json")
_MODELS = {
    "stabilityai/stable-diffusion-2-1-base": "sd21",
    "apple/coreml-stable-diffusion-xl-base-ios": "sdxl",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Stable-Diffusion-v1.5 (Qualcomm AI Hub)": "sd15",
    "BK-SDM-tiny-vpred": "bk-sdm-tiny",
}
_WEIGHT_BITS = {
    "palettised 6-bit": 6.0,
    "palettised, 4.04 bits mixed": 4.04,
    "float16": 16.0,
    "int8": 8.0,
    "float32": 32.0,
}
_DTYPES = {"coreml": "float16", "qnn": "int8", "executorch-xnnpack": "float32"}
_ENGINES = {"executorch-xnnpack": "xnnpack"}  # what a bundle calls it
_LOOSENESS = 3.0  # of the shares against each other
_OWN_LOOSENESS = 0.5  # of a device against its family
_GROWTHS = np.arange(1.0, 2.001, 0.02)  # of Qualcomm's NPUs from one generation to the next
# little beside the rest: no published row pins them
_DISPATCH_US, _ROW_INT8_US, _CALL_US = 1.0, 1e-5, 500.0
_RATE_UNCERTAINTY = 0.5
_TIE = 0.03
_PARTS = ("computed", "moved", "weights")
_GROWTH = 1.2  # where nothing says more than that newer ones are faster


@dataclass(frozen=True, slots=True)
class Chip:
    """A device's peaks; see `published_devices.json`."""

    file: str
    device: str
    compute_unit: str
    gmacs_per_s: float
    gb_per_s: float
    basis: str
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One published time, of one call or step, with what it is of."""

    chip: Chip
    engine: str
    dtype: str
    model: str
    operators: Operators
    ms: float
    source: str
    statistic: str

    @property
    def family(self) -> tuple[str, str]:
        """Whose shares of the peaks it is fitted with."""
        return self.engine, self.chip.compute_unit

    def at_peak_ms(self, growth: float) -> dict[str, float]:
        """Returns what arithmetic and memory traffic would take at the device's peaks."""
        amounts = terms_of(self.operators)
        faster = growth**self.chip.generation
        computed = sum(amounts.get(f"{kind} {self.dtype}", 0.0) for kind in PRODUCTS)
        bandwidth = self.chip.gb_per_s * faster
        moved = sum(amounts.get(kind, 0.0) for kind in KINDS)
        return {
            "computed": 1e3 * computed / (self.chip.gmacs_per_s * faster),
            "moved": 1e3 * moved / bandwidth,
            "weights": 1e3 * amounts.get("weights", 0.0) / bandwidth,
        }


@dataclass(frozen=True, slots=True)
class Shares:
    """How many times longer than at its peaks a family's devices take, for arithmetic and memory
    traffic; `growth` from one generation of NPUs to the next."""

    costs: Mapping[str, float]
    growth: float

    def ms(self, row: Row) -> float:
        """Returns the predicted time of a row."""
        at_peak = row.at_peak_ms(self.growth)
        return sum(at_peak[term] * cost for term, cost in self.costs.items())


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row, predicted from other devices alone, and with the device's own other rows too (None
    where it has no others)."""

    row: Row
    alone_ms: float
    with_own_ms: float | None


def read_rows() -> list[Row]:
    """Returns the published rows of devices whose peaks are known."""
    chips = {
        (chip.device, chip.compute_unit): chip
        for chip in (Chip(**entry) for entry in json.loads(_PEAKS.read_text())["devices"])
    }
    found: list[Row] = []
    for entry in json.loads(_ROWS.read_text())["rows"]:
        chip = chips.get((entry["device"], entry["compute_unit"]))
        if chip is not None:
            found.extend(_rows(chip, entry))
    return found


def fit(rows: Sequence[Row]) -> Shares:
    """Returns the shares that explain a family's rows best."""
    has_generations = len({row.chip.generation for row in rows}) > 1
    growths = _GROWTHS if has_generations else [_GROWTH]
    found = [Shares(_costs(rows, float(growth), _LOOSENESS), float(growth)) for growth in growths]
    return min(found, key=lambda shares: sum((shares.ms(r) / r.ms - 1) ** 2 for r in rows))


def left_out(rows: Sequence[Row]) -> list[LeftOut]:
    """Returns every row predicted without its device."""
    found = []
    for row in rows:
        family = [other for other in rows if other.family == row.family]
        others = [other for other in family if other.chip.device != row.chip.device]
        own = [r for r in family if r.chip.device == row.chip.device and r is not row]
        shares = fit(others)
        with_own = _moved(shares, own).ms(row) if own else None
        found.append(LeftOut(row, shares.ms(row), with_own))
    return found


@dataclass(frozen=True, slots=True)
class Order:
    """How many pairs of devices are in the right order.

    Attributes:
        neither: With neither device fitted.
        each: With each predicted from all others, its partner among them.
        pairs: There are.
        ties: There are more, measured within 3 %.
    """

    neither: int = 0
    each: int = 0
    pairs: int = 0
    ties: int = 0


def pair_orders(rows: Sequence[Row]) -> dict[tuple[str, str], Order]:
    """Returns for each family and model how well devices are ordered."""
    alone_ms = {id(out.row): out.alone_ms for out in left_out(rows)}
    found: dict[tuple[str, str], Order] = {}
    for first, second in combinations(rows, 2):
        if (first.family, first.model) != (second.family, second.model):
            continue
        key = (" ".join(first.family), first.model)
        order = found.get(key, Order())
        if abs(first.ms / second.ms - 1) < _TIE:
            found[key] = replace(order, ties=order.ties + 1)
            continue
        pair = {first.chip.device, second.chip.device}
        rest = [r for r in rows if r.family == first.family and r.chip.device not in pair]
        shares = fit(rest) if rest else Shares(dict.fromkeys(_PARTS, 1.0), _GROWTH)
        faster = first.ms < second.ms
        found[key] = replace(
            order,
            neither=order.neither + ((shares.ms(first) < shares.ms(second)) == faster),
            each=order.each + ((alone_ms[id(first)] < alone_ms[id(second)]) == faster),
            pairs=order.pairs + 1,
        )
    return found


def devices(rows: Sequence[Row]) -> dict[str, Device]:
    """Returns the devices as they ship, by file name; whole generations of unknown steps tell no
    time of a graph, so that what has nothing else does not ship."""
    timed = [row for row in rows if not row.model.endswith("generation")]
    outs = left_out(timed)
    found = {}
    for chip in {row.chip.file: row.chip for row in timed}.values():
        own = [row for row in timed if row.chip == chip]
        kin = [row for row in timed if row.family == own[0].family]
        alone = [out.alone_ms / out.row.ms - 1 for out in outs if out.row in kin]
        aided = [out.with_own_ms / out.row.ms - 1 for out in outs if out.row in kin
                 and out.with_own_ms is not None]  # fmt: skip
        found[chip.file] = _device(chip, own, _moved(fit(kin), own), _rms(aided or alone))
    return found


def _rows(chip: Chip, entry: Mapping[str, object]) -> Iterable[Row]:
    engine, weights = str(entry["engine"]), str(entry["weights"])
    dtype, bits, model = _DTYPES[engine], _WEIGHT_BITS[weights], _MODELS[str(entry["model"])]
    latents, batch = int(str(entry["height_px"])) // 8, int(str(entry["guidance_batch"]))
    source, statistic = str(entry["source"]), str(entry["statistic"])
    operators = unet_operators(model, latents, batch, dtype=dtype, weight_bits=bits)
    if "steps_per_s" in entry:
        ms, what = 1e3 / float(str(entry["steps_per_s"])), f"{model} step"
    elif "unet_call_ms" in entry:
        ms, what = float(str(entry["unet_call_ms"])), f"{model} UNet"
    else:  # a whole generation of unknown steps: its share of the peaks takes them in
        ms, what = 1e3 * float(str(entry["end_to_end_s"])), f"{model} generation"
    name = _ENGINES.get(engine, engine)
    yield Row(chip, name, dtype, what, operators, ms, source, statistic)
    if "text_encoder_call_ms" in entry:
        text = text_operators(dtype=dtype, weight_bits=bits)
        ms = float(str(entry["text_encoder_call_ms"]))
        yield Row(chip, name, dtype, "text encoder", text, ms, source, statistic)


def _costs(rows: Sequence[Row], growth: float, looseness: float) -> dict[str, float]:
    start = dict.fromkeys(_PARTS, 1.0)
    return fit_costs([(r.at_peak_ms(growth), r.ms) for r in rows], start, looseness=looseness)


def _moved(shares: Shares, own: Sequence[Row]) -> Shares:
    """Returns the shares moved to where a device's own rows are."""
    measured = [(row.at_peak_ms(shares.growth), row.ms) for row in own]
    return replace(shares, costs=fit_costs(measured, shares.costs, looseness=_OWN_LOOSENESS))


def _device(chip: Chip, own: Sequence[Row], shares: Shares, error: float) -> Device:
    faster = shares.growth**chip.generation
    computing = chip.gmacs_per_s * faster / shares.costs["computed"]
    moving, loading = (chip.gb_per_s * faster / shares.costs[t] for t in ("moved", "weights"))
    rates = {
        **{f"{kind} {own[0].dtype}": computing for kind in PRODUCTS},
        **dict.fromkeys(KINDS, moving),
        "weights": loading,
    }
    measured = []
    for row in own:
        parts = {t: a / rates[t] for t, a in terms_of(row.operators).items() if t in rates}
        total = sum(parts.values())
        divided = {term: round(part / total, 4) for term, part in parts.items()}
        measured.append(MeasuredGraph(row.model, round(row.ms, 2), divided))
    rounded = {term: round(rate, 2) for term, rate in rates.items()}
    return Device(
        name=chip.device,
        engine=own[0].engine,
        compute_unit=chip.compute_unit,
        source=own[0].source,
        date=_date(own[0].source),
        measured="; ".join(f"{row.model} {row.ms:.5g} ms ({row.statistic})" for row in own),
        derived=f"all rates: shares of peaks ({chip.basis}) fitted on the devices of this "
        "kind; dispatch, rows and call are assumed",
        gmacs_per_s={term: rate for term, rate in rounded.items() if " " in term},
        gb_per_s={term: rate for term, rate in rounded.items() if " " not in term},
        dispatch_us=_DISPATCH_US,
        dispatch_int8_us=_DISPATCH_US,
        row_int8_us=_ROW_INT8_US,
        call_us=_CALL_US,
        tile_rows=1,
        tile_columns=1,
        load_ms=None,
        load_gb_per_s=None,
        throttling_factor=None,
        error=round(error, 4),
        rate_uncertainty=_RATE_UNCERTAINTY,
        measured_graphs=tuple(measured),
    )


def _date(source: str) -> str:
    """Returns the month that a source names."""
    found = re.search(r"[A-Z][a-z]{2} 20\d\d", source)
    return found.group() if found else "not stated by the source"


def _rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
