"""The evaluation as one HTML file: table, frontier, and the same captions drawn in every way."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from apps.ablation import GAINS, ORDER, PARTIAL, gain_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from apps.evaluate import Variant

_SHOWN = 12  # captions of the contact sheet
_COLUMNS = {
    "loop_speedup": "loop speed-up",
    "end_to_end_speedup": "end-to-end speed-up",
    "compression": "UNet compression",
    "clip": "CLIP score",
    "clip_delta": "difference",
    "clip_delta_ci": "95 % interval",
    "clip_delta_trimmed": "trimmed difference",
    "clip_delta_trimmed_ci": "its 95 % interval",
    "attribute_accuracy": "attribute accuracy",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: right }
tr { border-bottom: 1px solid #ddd } td:first-child, th:first-child { text-align: left }
img { max-width: 100% } .pictures img { width: 96px; display: block } small { color: #555 }
"""


def html_report(
    report: Mapping[str, Any], captions: Sequence[str], variants: "Sequence[Variant]"
) -> str:
    """Returns the report; pictures and plot are inside it."""
    conditions = ", ".join(f"{key} {value}" for key, value in report["conditions"].items())
    parts = [
        "<!doctype html><meta charset=utf-8><title>cq-edge evaluate</title>",
        f"<style>{STYLE}</style><h1>cq-edge evaluate</h1>",
        f"<p><small>{html.escape(conditions)}</small>",
        _table(report["variants"]),
        _ablation([*report["ablation"], *report["frontier_ablation"]]),
    ]
    if report["frontier"]:
        parts += ["<h2>Quality against speed-up</h2>", image(frontier_plot(report["frontier"]))]
        parts += [_margins(report["frontier_margins_db"])]
    parts += ["<h2>The same captions and seeds</h2>", _sheet(captions, variants)]
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = (
        [row["name"], str(row["plan"]["full"]), *(_cell(row[key]) for key in _COLUMNS)]
        for row in rows
    )
    return html_table(("", "full steps", *_COLUMNS.values()), cells)


def _ablation(ablation: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of what each half gains, or nothing where the ways were not all drawn."""
    if not ablation:
        return ""
    titles = ("schedule", "loop speed-up", "captions", *GAINS.values())
    cells = (
        (
            row["schedule"],
            f"{row['loop_speedup']:.2f}",
            str(row["captions"]),
            *(gain_cell(row, gain) for gain in GAINS),
        )
        for row in ablation
    )
    title = "<h2>What each half of the correction gains, dB of PSNR</h2>"
    return title + html_table(titles, cells) + f"<p><small>{html.escape(ORDER)}</small>"


def _margins(margins_db: Sequence[Mapping[str, Any]]) -> str:
    titles = ("best other way", "loop speed-up", "PSNR of ours − its, dB", "95 % interval")
    cells = (
        (
            row["next"],
            f"{row['loop_speedup']:.2f}",
            f"{row['difference']:+.2f}",
            _cell(row["difference_ci"]),
        )
        for row in margins_db
    )
    return html_table(titles, cells)


def html_table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table of cells that are plain text."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = [f"<table><tr>{head}</tr>"]
    for cells in rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value[0]:+.2f} to {value[1]:+.2f}"


def frontier_plot(frontier: Sequence[Mapping[str, Any]]) -> bytes:
    """Returns a PNG: the PSNR and the change in CLIP score over the measured speed-up, of every
    way but those that are drawn for the ablation alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    quality = (("psnr_db", "PSNR to float32, dB"), ("clip_delta", "CLIP score − float32's"))
    for axis, (key, title) in zip(axes, quality, strict=True):
        for name in dict.fromkeys(row["name"] for row in frontier):
            if name in PARTIAL:
                continue
            points = sorted((r["loop_speedup"], r[key]) for r in frontier if r["name"] == name)
            front = 3 if name == "ours" else 2
            axis.plot(*zip(*points, strict=True), marker="o", label=name, zorder=front)
        axis.set(xlabel="loop speed-up over float32 at every step", ylabel=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    # few steps lose tens of points, others hundredths
    axes[1].set_yscale("symlog", linthresh=0.2)
    axes[1].set_yticks([-50, -10, -1, -0.1, 0, 0.1], minor=False)
    axes[1].yaxis.set_major_formatter("{x:g}")
    return figure_png(figure)


def _sheet(captions: Sequence[str], variants: "Sequence[Variant]") -> str:
    shown = range(min(_SHOWN, len(captions)))
    lines = ["<table class=pictures>"]
    for variant in variants:
        pictures = "".join(
            f'<td title="{html.escape(captions[i])}">{image(_png(variant.pictures[i]))}</td>'
            for i in shown
        )
        lines.append(f"<tr><td>{html.escape(variant.name)}</td>{pictures}</tr>")
    captioned = "".join(f"<td><small>{html.escape(captions[i])}</small></td>" for i in shown)
    return "\n".join([*lines, f"<tr><td></td>{captioned}</tr></table>"])


def _png(picture: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="png")
    return stream.getvalue()


def figure_png(figure: "Figure") -> bytes:
    """Returns a plot as a PNG; needs no screen."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def image(png: bytes) -> str:
    """Returns the tag of a picture that lies in the page itself."""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'
