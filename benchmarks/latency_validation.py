"""Predicted against measured times: makes docs/latency.md and the device files.

    cq-edge build -o out/demo/bundle
    python -m benchmarks.latency_validation --bundles out/demo/bundle --rounds 20

Exports what is not exported yet (an hour on one core), times everything in turns on one thread, and
adds to what was timed before: run it as often as you like, on a quiet machine. `--rounds 0` makes
the documents from what there is.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from benchmarks.latency_graphs import Setting, export, settings, spec_of
from benchmarks.latency_machine import HeldOut, Point, device_of, held_out, splits
from benchmarks.latency_plans import measured_plans
from benchmarks.latency_published import devices, left_out, pair_orders, read_rows
from benchmarks.latency_report import Report, machine_name, write_report
from benchmarks.latency_timing import Run, loaded, set_threads, summary, time_rounds
from cq_edge.latency_model import DEVICES, Device
from cq_edge.operators import Operators, load_operators, save_operators
from exporters.graph_spec import GraphSpec
from exporters.program_operators import program_operators
from runtime.bundle import Bundle, open_bundle

_DEVICE = "amd-epyc-zen4-1-thread"


def main() -> None:
    """Exports, times, fits, judges, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundles", type=Path, nargs="*", default=[], help="held out whole, the first for plans")
    add("--work", type=Path, default=Path("out/latency"), help="keeps exports and times")
    add("--rounds", type=int, default=20, help="of a turn for every graph")
    add("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    graphs = _graphs(args.work, [open_bundle(path) for path in args.bundles])
    operators = _operators(args.work, graphs)
    times, loading = args.work / "times.json", args.work / "loading.json"
    if args.rounds:
        _time(graphs, args.rounds, times, loading)
    points = _points(graphs, operators, json.loads(times.read_text()))
    fitted = [point for point in points if not point.setting.kind.startswith("bundle")]
    device = device_of(fitted, json.loads(loading.read_text()), **_words(len(fitted)))
    _write_device(_DEVICE, device)
    found = {question: held_out(fitted, folds) for question, folds in splits().items()}
    plans = None
    if args.bundles:
        found["the demo model's bundles from the rest"] = _bundles(device, points)
        plans = measured_plans(open_bundle(args.bundles[0]), device, args.work, args.rounds > 0)
    rows = read_rows()
    for name, published in devices(rows).items():
        _write_device(name, published)
    write_report(Report(points, found, device, plans, left_out(rows), pair_orders(rows)), args.docs)


Graphs = Mapping[Setting, tuple[Path, GraphSpec]]


def _graphs(work: Path, bundles: Sequence[Bundle]) -> Graphs:
    """Returns the file and the contract of every graph, exporting what is not there."""
    graphs = {
        setting: (export(setting, work), spec_of(setting))
        for setting in tqdm(settings(), desc="export", unit="graph")
    }
    for bundle in bundles:
        manifest = bundle.manifest
        dtype = "float32" if manifest.conditions.get("quantization") == "none" else "int8"
        for name, entry in manifest.graphs.items():
            kind = f"bundle {bundle.folder.name}"
            setting = Setting(name, kind, (), manifest.latents.height, dtype)
            spec = GraphSpec(name, entry.inputs, entry.outputs)
            graphs[setting] = (bundle.path(entry.file), spec)
    return graphs


def _operators(work: Path, graphs: Graphs) -> dict[Setting, Operators]:
    """Returns each graph's operators, read once and kept beside the exports."""
    path = work / "operators.json"
    kept = dict(load_operators(path)["xnnpack"]) if path.exists() else {}
    for setting, (file, spec) in tqdm(graphs.items(), desc="read", unit="graph"):
        if setting.name not in kept:
            kept[setting.name] = program_operators(file)[spec.name]
    save_operators(path, {"xnnpack": kept})
    return {setting: kept[setting.name] for setting in graphs}


def _time(graphs: Graphs, rounds: int, times: Path, loading: Path) -> None:
    set_threads(1)
    runs: dict[str, Run] = {}
    loads_ms: dict[str, float] = {}
    for setting, (file, spec) in tqdm(graphs.items(), desc="load", unit="graph"):
        runs[setting.name], loads_ms[setting.name] = loaded(file, spec)
    loading.write_text(json.dumps(loads_ms))
    time_rounds(runs, rounds, times)


def _points(
    graphs: Graphs, operators: Mapping[Setting, Operators], times: Mapping[str, list[float]]
) -> list[Point]:
    return [
        Point(setting, operators[setting], *summary(times[setting.name]))
        for setting in graphs
        if setting.name in times
    ]


def _bundles(device: Device, points: Sequence[Point]) -> list[HeldOut]:
    """Returns the bundles' graphs as the device predicts them, which was fitted without them."""
    outside = [point for point in points if point.setting.kind.startswith("bundle")]
    return [HeldOut.of(point, device) for point in outside]


def _words(count: int) -> dict[str, str]:
    return {
        "name": f"{machine_name()}, 1 thread",
        "engine": "xnnpack",
        "compute_unit": "cpu",
        "source": "python -m benchmarks.latency_validation",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "measured": f"{count} graphs of random weights, in turns, medians",
        "derived": "rates, by non-negative least squares; float16 in proportion to float32",
    }


def _write_device(name: str, device: Device) -> None:
    """Writes a device as JSON: a field a line, a measured graph a line."""
    fields = asdict(device)
    graphs = fields.pop("measured_graphs")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    listed = ",\n  ".join(json.dumps(graph) for graph in graphs)
    lines.append(f'"measured_graphs": [\n  {listed}\n ]')
    DEVICES.mkdir(exist_ok=True)
    path = DEVICES / f"{name}.json"
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
    Device.load(path)  # what ships must load


if __name__ == "__main__":
    main()
