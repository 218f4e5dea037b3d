"""Predicted against measured times: makes docs/latency.md and the device files.

    python -m benchmarks.latency_validation                    # from what was timed before
    python -m benchmarks.latency_validation --time amd-epyc-zen5-1-thread --rounds 20 \
        --bundles out/evaluate/bundle out/evaluate/float32     # times this machine first

Timing exports what is not exported yet (half an hour on one core), runs everything in turns on one
thread, and adds to what was timed before on the machine of that name: run it as often as you like.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from benchmarks.latency_data import Timings, keep_operators, known_operators, timed_devices
from benchmarks.latency_machine import HeldOut, Point, device_of, fit_loading, held_out, splits
from benchmarks.latency_plans import Plans, predicted_plans, time_plans
from benchmarks.latency_published import devices, left_out, pair_orders, read_rows
from benchmarks.latency_report import Machine, Report, machine_name, write_report
from benchmarks.latency_setting import Setting
from cq_edge.latency import GRAPHS
from cq_edge.latency_model import DEVICES, Device
from exporters.graph_spec import GraphSpec
from runtime.bundle import Bundle, open_bundle


def main() -> None:
    """Times if asked to, fits, judges, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--time", metavar="NAME", help="time this machine; its device file gets this name")
    add("--machine", default=machine_name(), help="what to call it (default: %(default)s)")
    add("--bundles", type=Path, nargs="*", default=[], help="held out whole, the first for plans")
    add("--work", type=Path, default=Path("out/latency"), help="keeps exports")
    add("--rounds", type=int, default=20, help="of a turn for every graph")
    add("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if args.time:
        _time(args)
    machines = [_machine(name) for name in timed_devices()]
    rows = read_rows()
    for name, published in devices(rows).items():
        _write_device(name, published)
    write_report(Report(machines, left_out(rows), pair_orders(rows)), args.docs)


def _time(args: argparse.Namespace) -> None:
    """Adds turns of every graph to what was timed on this machine."""
    from benchmarks.latency_timing import Run, loaded, set_threads, time_round

    timings = Timings.load_or_new(args.time, f"{args.machine}, 1 thread")
    timings.date = datetime.now(UTC).strftime("%Y-%m-%d")
    bundles = [open_bundle(path) for path in args.bundles]
    graphs = _graphs(args.work, bundles)
    _keep_operators(graphs, timings)
    set_threads(1)
    runs: dict[str, Run] = {}
    for setting, (file, spec) in tqdm(graphs.items(), desc="load", unit="graph"):
        runs[setting.name], timings.loads_ms[setting.name] = loaded(file, spec)
    for _ in tqdm(range(args.rounds), desc="time", unit="round"):
        for name, ms in time_round(runs).items():
            timings.turns_ms.setdefault(name, []).append(ms)
        timings.save(args.time)
    if bundles:
        timings.plans_ms = time_plans(bundles[0])
        timings.plans_of = [setting.name for setting in _bundle_graphs(bundles[0])]
        timings.save(args.time)


Graphs = Mapping[Setting, tuple[Path, GraphSpec]]


def _graphs(work: Path, bundles: Sequence[Bundle]) -> Graphs:
    """Returns the file and the contract of every graph, exporting what is not there."""
    from benchmarks.latency_graphs import export, settings, spec_of

    work.mkdir(parents=True, exist_ok=True)
    exported = {
        setting: (export(setting, work), spec_of(setting))
        for setting in tqdm(settings(), desc="export", unit="graph")
    }
    return exported | {s: g for bundle in bundles for s, g in _bundle_graphs(bundle).items()}


def _bundle_graphs(bundle: Bundle) -> Graphs:
    manifest = bundle.manifest
    dtype = "float32" if manifest.conditions.get("quantization") == "none" else "int8"
    return {
        Setting(name, f"bundle {bundle.folder.name}", (), manifest.latents.height, dtype): (
            bundle.path(entry.file),
            GraphSpec(name, entry.inputs, entry.outputs),
        )
        for name, entry in manifest.graphs.items()
    }


def _keep_operators(graphs: Graphs, timings: Timings) -> None:
    """Reads the operators of graphs that were never read, and of bundles; forgets what was timed
    of a bundle that was built anew since."""
    from exporters.program_operators import program_operators

    known, found = known_operators(), {}
    for setting, (file, spec) in tqdm(graphs.items(), desc="read", unit="graph"):
        if setting.is_of_bundle or setting.name not in known:
            found[setting.name] = program_operators(file)[spec.name]
            if found[setting.name] != known.get(setting.name):
                timings.turns_ms.pop(setting.name, None)
    keep_operators(found)


def _machine(name: str) -> Machine:
    """Returns what is to be said of a machine that was timed, its device file written."""
    timings = Timings.load(name)
    points = timings.points()
    fitted = [point for point in points if not point.setting.is_of_bundle]
    loading = (timings.load_ms, timings.load_gb_per_s)
    if timings.loads_ms:
        whole = [point for point in fitted if point.setting.graph != "operator"]
        loading = fit_loading(whole, timings.loads_ms)
    device = device_of(fitted, loading, **_words(timings, len(fitted)))
    _write_device(name, device)
    questions = splits(operators=any(point.setting.graph == "operator" for point in points))
    found = {question: held_out(fitted, folds) for question, folds in questions.items()}
    outside = [point for point in points if point.setting.is_of_bundle]
    if outside:
        # the device was fitted without them
        found["the demo model's bundles from the rest"] = [HeldOut.of(p, device) for p in outside]
    return Machine(points, found, device, _plans(timings, points, device))


def _plans(timings: Timings, points: Sequence[Point], device: Device) -> Plans:
    if not timings.plans_ms:
        return []
    graphs = {
        point.setting.graph: device.predict(point.operators).ms
        for point in points
        if point.setting.name in timings.plans_of
    }
    return predicted_plans(timings.plans_ms, {graph: graphs[graph] for graph in GRAPHS})


def _words(timings: Timings, count: int) -> dict[str, str]:
    return {
        "name": timings.machine,
        "engine": "xnnpack",
        "compute_unit": "cpu",
        "source": "python -m benchmarks.latency_validation",
        "date": timings.date,
        "measured": f"{count} graphs of random weights, in turns, medians",
        "derived": "rates, by non-negative least squares; float16 and int4 follow float32",
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
