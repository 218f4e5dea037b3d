"""docs/latency.md: what the latency model predicts, and what is measured."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.latency_machine import HeldOut, Point, errors_of
from benchmarks.latency_plans import Plans
from benchmarks.latency_published import LeftOut, Order
from cq_edge.latency_model import Device
from cq_edge.metrics import spearman_rho

_SHOWN = 8  # worst predictions of a machine
_HELD_OUT = """\
Timed with `--time NAME` and kept in `benchmarks/latency_data`; without it the command makes this
document again from there. Graphs: single operators; UNets of random weights, full, shallow,
transformers at the upper level or in the middle alone, 32 to 256 channels, latents of 8 to 64,
float32, int8; text encoders; decoders; where named, the demo model's own bundles, never fitted.

Held out: whole groups, so that what is predicted is of a width, a size, a kind of graph or a data
type that was not fitted. Other widths and latents: each in turn, all of its graphs. Single
operators are fitted in every row (their int8 ones not in "int8 from float32" rows that do not name
them) and never counted as points. Error: predicted over measured, less 1. In range: the share of
measured times in the prediction's 90 % range. Distance: 0 where measured graphs pin the time, 1
where they say nothing. Tile, looseness, starting rates and which operators have terms of their own
were chosen on the Zen 4 machine with these errors in sight; the Zen 5 machine was timed after. One
term was added then, a row's of int8 linear layers: without it the smallest UNet (0.09 ms) was up to
29.4 % off, and nothing else more than 20 %. int8 from float32 alone rests on one assumption: a
product of bytes runs at four times the rate of the same product in float32, which is what
processors' dot products of bytes do; what quantises activations moves bytes.
"""
_ODD_PHONES = (
    "The order of the phones' processors cannot follow from what their makers publish: the source "
    "contradicts itself. On the same page (react-native-executorch, Inference Time) and through "
    "the same library the Galaxy S24 takes 2.4 times as long as either iPhone for CRAFT "
    "(`forward_800`: 521, 221 and 220 ms), 3 times as long for Whisper-tiny's encoder (277, 93 and "
    "89 ms) and 1.05 times as long as the iPhone 17 Pro for YOLO26X-SEG (1410 and 1338 ms), yet "
    "0.89 times as long here; and the OnePlus 12, with the Galaxy's chip, takes 16.6 s. Clocks "
    "times SIMD width times threads (the peaks used here) put the iPhone 17 Pro before the Galaxy, "
    "as those other models do. The page does not say which versions each row was measured with, "
    "nor which operators of "
    "this model ran outside XNNPACK, which depends on the version that exported it."
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What was timed and predicted on one machine; no plans where none were timed."""

    points: Sequence[Point]
    held_out: Mapping[str, Sequence[HeldOut]]
    device: Device
    plans: Plans


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the document says."""

    machines: Sequence[Machine]
    published: Sequence[LeftOut]
    orders: Mapping[tuple[str, str], Order]


def machine_name() -> str:
    """Returns the processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")


def write_report(report: Report, docs: Path) -> None:
    """Writes `latency.md` and prints it."""
    lines = [
        "# Predicted and measured latency",
        "",
        "Made by `python -m benchmarks.latency_validation`. The model and its units stand in "
        "`cq_edge/latency_model.py`; the devices' rates in `cq_edge/devices/`.",
        "",
        *_HELD_OUT.splitlines(),
        "",
        *(line for machine in report.machines for line in _machine(machine)),
        *(_published(report) if report.published else ()),
    ]
    text = "\n".join(lines) + "\n"
    (docs / "latency.md").write_text(text, encoding="utf-8")
    print(text)


def _machine(machine: Machine) -> Iterable[str]:
    device, points = machine.device, machine.points
    times = [point.ms for point in points]
    yield f"## {device.name}"
    yield ""
    yield (
        f"{device.engine}, {device.date}; processor time of the one thread. {len(points)} graphs "
        f"of {min(times):.2g} to {max(times):.0f} ms, each the median of its "
        f"turns{_spread(points)}."
    )
    yield ""
    yield "| held out | points | median error | worst | in range | distance, median |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for question, found in machine.held_out.items():
        if found:
            yield _row(question, found)
    yield ""
    yield f"The {_SHOWN} worst of all these predictions:"
    yield ""
    yield "| held out | graph | measured, ms | turns' spread | predicted, ms (90 %) | error |"
    yield "| --- | --- | --- | --- | --- | --- |"
    everything = [(question, h) for question, found in machine.held_out.items() for h in found]
    for question, h in sorted(everything, key=lambda pair: -abs(pair[1].error))[:_SHOWN]:
        yield (
            f"| {question} | {h.point.setting.name} | {h.point.ms:.2f} | "
            f"{'not kept' if h.point.spread is None else f'{h.point.spread:.0%}'} | "
            f"{h.predicted_ms:.2f} ({h.low_ms:.2f} to {h.high_ms:.2f}) | {h.error:+.1%} |"
        )
    yield ""
    yield "Rates fitted on all but the bundles:"
    yield ""
    yield "| unit | rate |"
    yield "| --- | --- |"
    for term, rate in device.gmacs_per_s.items():
        yield f"| {term} | {rate:.4g}·10⁹ multiply-adds/s |"
    for term, rate in device.gb_per_s.items():
        yield f"| {term} | {rate:.4g} GB/s |"
    yield f"| dispatch | {device.dispatch_us:.3g} µs |"
    yield f"| dispatch, int8 | {device.dispatch_int8_us:.3g} µs |"
    yield f"| row, int8 | {device.row_int8_us:.3g} µs |"
    yield f"| call | {device.call_us:.3g} µs |"
    yield ""
    yield from _plans(machine.plans)


def _spread(points: Sequence[Point]) -> str:
    spreads = [point.spread for point in points if point.spread is not None]
    if not spreads:
        return ""
    return (
        f"; the turns' interquartile range is {np.median(spreads):.1%} of that (median over the "
        f"graphs; worst {max(spreads):.0%})"
    )


def _row(question: str, found: Sequence[HeldOut]) -> str:
    errors = errors_of(found)
    inside = np.mean([h.is_in_range for h in found])
    distance = np.median([h.distance for h in found])
    return (
        f"| {question} | {len(found)} | {np.median(errors):.1%} | {errors.max():.1%} | "
        f"{inside:.0%} | {distance:.2f} |"
    )


def _plans(plans: Plans) -> Iterable[str]:
    if not plans:
        return
    predicted = np.array([row[1] for row in plans])
    measured = np.array([row[2] for row in plans])
    rho = spearman_rho(predicted, measured)
    errors = np.abs(predicted / measured - 1)
    yield (
        f"Plans: {len(plans)} random ones of the demo model's bundle (half of them with "
        "skip steps), a picture by each, predicted from the rates above (fitted without the "
        "bundle) and "
        f"measured, medians of runs in turns: Spearman's rho {rho:.3f}, "
        f"median error {np.median(errors):.1%}, worst {errors.max():.1%}; pictures of "
        f"{measured.min():.0f} to {measured.max():.0f} ms."
    )
    yield ""


def _published(report: Report) -> Iterable[str]:
    yield "## Devices that others measured"
    yield ""
    yield (
        "Each row is predicted without its device, from the shares of peak arithmetic and memory "
        "bandwidth that the others of its kind reach (`benchmarks/published_devices.json` holds "
        "the peaks), and once more with the device's own other rows. Steps are guided: the UNet "
        "at batch 2. Generations are whole pictures of steps that are not published: only their "
        "proportions mean something."
    )
    yield ""
    yield "| device | engine, unit | what | measured, ms | others, ms | error | own rows too |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for out in report.published:
        row = out.row
        own = "" if out.with_own_ms is None else f"{out.with_own_ms / row.ms - 1:+.0%}"
        yield (
            f"| {row.chip.device} | {row.engine}, {row.chip.compute_unit} | {row.model} | "
            f"{_ms(row.ms)} | {_ms(out.alone_ms)} | {out.alone_ms / row.ms - 1:+.0%} | {own} |"
        )
    yield ""
    errors = [abs(out.alone_ms / out.row.ms - 1) for out in report.published]
    yield (
        f"Median error {np.median(errors):.0%}, worst {max(errors):.0%}. How many pairs of devices "
        "are in the right order, with neither of them fitted, and with each predicted as above "
        "(an odd device then pulls its own predictors the wrong way); within 3 % is a tie. "
        "Of Qualcomm's three, two left out leave one: that a newer NPU is faster is assumed there. "
        "How far a share may differ between arithmetic and memory was chosen on these rows."
    )
    yield ""
    yield "| engine, unit | what | neither fitted | each from all others | ties |"
    yield "| --- | --- | --- | --- | --- |"
    for (family, model), order in report.orders.items():
        yield (
            f"| {family} | {model} | {order.neither} of {order.pairs} | "
            f"{order.each} of {order.pairs} | {order.ties} |"
        )
    yield ""
    yield _ODD_PHONES


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
