"""What `measure` found: a table on the screen, and one HTML file with plots."""

import html
from collections.abc import Callable, Mapping

from apps.evaluate_report import STYLE, figure_png, html_table, image
from cq_edge.latency import DeviceProfile, GraphFigures
from runtime.measure import counted_ms
from runtime.measurement import Measurement


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


_COLUMNS: Mapping[str, Callable[[GraphFigures], str]] = {
    "p10": lambda row: _number(row.p10_ms),
    "p50": lambda row: _number(row.p50_ms),
    "p90": lambda row: _number(row.p90_ms),
    "p99": lambda row: _number(row.p99_ms),
    "runs": lambda row: str(row.runs),
    "cold": lambda row: _number(row.load_ms.get("cold")),
    "warm": lambda row: _number(row.load_ms.get("warm")),
    "MiB": lambda row: _number(row.peak_memory_mib),
}
_ANOTHER = "the medians of 95 of 100 processes lie within, with 95 % confidence, ms"
_MOST_OPERATORS, _MOST_ON_SCREEN = 40, 15  # that the report shows, and the screen
_OPERATOR_COLUMNS = ("graph", "operator", "unit", "p50 ms")
_OPERATORS_TITLES = {
    "coreml": "Operators, as Core ML's compute plan estimates them",
    "xnnpack": "Operators, as ExecuTorch's event tracer times them",
}
# multiply-adds tell parts that compute from those that move data: the latter have a low rate
_BLOCK_COLUMNS = ("part", "p50 ms", "share", "10⁶ multiply-adds", "10⁹ a second")
_BLOCKS_TITLE = "denoise, cut at block borders: each part exported and timed alone"
_NOTES = (
    "Milliseconds of a run: quantiles over all runs. Milliseconds of loading the graph "
    "in a fresh process, with its file on the disk (cold) or in the system's cache (warm). MiB: "
    "what the graph adds to a fresh process at its peak, watched in a pass of its own. Runs are in "
    "the order and company of a picture."
)


def print_table(title: str, measurement: Measurement, profile: DeviceProfile) -> None:
    """Prints the figures and the conditions."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{title}, ms", title_justify="left")
    for name in ("graph", *_COLUMNS):
        table.add_column(name, justify="left" if name == "graph" else "right", no_wrap=True)
    for graph, row in profile.figures.items():
        table.add_row(graph, *(cell(row) for cell in _COLUMNS.values()))
    console.print(table)
    if ranges := _ranges(profile):
        print(f"{_ANOTHER}: {ranges}")
    if measurement.blocks:
        blocks = Table(title=_BLOCKS_TITLE, title_justify="left")
        for name in _BLOCK_COLUMNS:
            blocks.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
        for cells in _block_rows(measurement, profile):
            blocks.add_row(*cells)
        console.print(blocks)
    if measurement.operators:
        operators = Table(title=_OPERATORS_TITLES[measurement.engine], title_justify="left")
        for name in _OPERATOR_COLUMNS:
            operators.add_column(name)
        for o in measurement.operators[:_MOST_ON_SCREEN]:
            operators.add_row(o.graph, o.kind, o.unit, f"{o.p50_ms:.4f}")
        console.print(operators)
    print(f"beside its graphs a step takes {profile.step_ms:.3f} ms")
    for key, value in profile.conditions.items():
        print(f"{key.replace('_', ' ')}: {value}")


def _ranges(profile: DeviceProfile) -> str:
    """Returns the stated spread of each graph that has one."""
    return ", ".join(
        f"{graph} {row.low_ms:.2f} to {row.high_ms:.2f}"
        for graph, row in profile.figures.items()
        if row.low_ms is not None and row.high_ms is not None
    )


def _block_rows(measurement: Measurement, profile: DeviceProfile) -> list[tuple[str, ...]]:
    """Returns each part's cells of `_BLOCK_COLUMNS`, then those of all against the whole graph."""
    blocks = measurement.blocks
    total_ms = sum(block.p50_ms for block in blocks)

    def row(name: str, ms: float, products: int) -> tuple[str, ...]:
        share, rate = f"{ms / total_ms:.1%}", products / ms / 1e6
        return name, f"{ms:.3f}", share, f"{products / 1e6:.1f}", f"{rate:.1f}"

    products = sum(block.multiply_adds for block in blocks)
    return [
        *(row(block.name, block.p50_ms, block.multiply_adds) for block in blocks),
        row("all parts", total_ms, products),
        row("the whole graph", profile.graphs_ms["denoise"], products),
    ]


def html_report(title: str, measurement: Measurement, profile: DeviceProfile) -> str:
    """Returns the report; plots are inside it."""
    conditions = "".join(
        f"<tr><td>{html.escape(key.replace('_', ' '))}</td>"
        f"<td style='text-align: left'>{html.escape(str(value))}</td></tr>"
        for key, value in profile.conditions.items()
    )
    noisy = "" if profile.noise is None else f"<p><b>{html.escape(profile.noise)}</b>"
    parts = [
        f"<!doctype html><meta charset=utf-8><title>cq-edge measure: {html.escape(title)}</title>",
        f"<style>{STYLE}</style><h1>cq-edge measure: {html.escape(title)}</h1>{noisy}",
        _table(profile),
        f"<p>{_ANOTHER}: {_ranges(profile) or 'unknown, since one alone ran'}",
        f"<p><small>{html.escape(_NOTES)}</small>",
        "<h2>Every run</h2>",
        image(_plot_runs(measurement)),
    ]
    if measurement.sustained:
        parts += ["<h2>Without a pause</h2>", image(_plot_sustained(measurement))]
    if measurement.blocks:
        cells = "".join(
            f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
            for row in _block_rows(measurement, profile)
        )
        head = f"<tr>{''.join(f'<th>{name}' for name in _BLOCK_COLUMNS)}</tr>"
        parts += [f"<h2>{_BLOCKS_TITLE}</h2><table>{head}{cells}</table>"]
    if measurement.operators:
        parts += [
            f"<h2>{_OPERATORS_TITLES[measurement.engine]}</h2>",
            _operators(measurement),
        ]
    parts += ["<h2>Conditions</h2>", f"<table>{conditions}</table>"]
    return "\n".join(parts) + "\n"


def _table(profile: DeviceProfile) -> str:
    rows = profile.figures.items()
    cells = ([graph, *(cell(row) for cell in _COLUMNS.values())] for graph, row in rows)
    return html_table(("graph", *_COLUMNS), cells)


def _operators(measurement: Measurement) -> str:
    rows = "".join(
        f"<tr><td>{o.graph}</td><td>{html.escape(o.kind)}</td><td>{html.escape(o.unit)}</td>"
        f"<td>{o.p50_ms:.4f}</td></tr>"
        for o in measurement.operators[:_MOST_OPERATORS]
    )
    head = "".join(f"<th>{name}" for name in _OPERATOR_COLUMNS)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _plot_runs(measurement: Measurement) -> bytes:
    """Returns a PNG: what each run took, run by run, and the share of runs below a time."""
    from matplotlib.figure import Figure

    times = counted_ms(measurement.runs)
    figure = Figure(figsize=(3.2 * len(times), 5.5), layout="constrained")
    axes = figure.subplots(2, len(times))
    for (above, below), (graph, taken) in zip(axes.T, times.items(), strict=True):
        above.plot(taken, ".", markersize=3)
        above.set(title=graph, xlabel="run", ylabel="ms", ylim=(0, None))
        shares = [(i + 1) / len(taken) for i in range(len(taken))]
        below.step(sorted(taken), shares, where="post")
        below.set(xlabel="ms", ylabel="share of runs", ylim=(0, 1))
        below.grid(alpha=0.3)
    return figure_png(figure)


def _plot_sustained(measurement: Measurement) -> bytes:
    """Returns a PNG: what the full graph took over the seconds of the sustained run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*measurement.sustained, strict=True), ".", markersize=3)
    axis.set(xlabel="s", ylabel="ms of denoise", ylim=(0, None))
    axis.grid(alpha=0.3)
    return figure_png(figure)
