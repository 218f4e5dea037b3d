"""`cq-edge measure`: how long a bundle's graphs take on a device, and how sure that is."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from apps.android_runs import measure_android
from apps.apple_runs import measure_ios, measure_operators
from apps.block_times import measure_blocks
from apps.engines import BACKENDS, ENGINES, has_coreml
from apps.local_runs import measure_here
from apps.measure_report import html_report, print_table
from apps.pictures import check_writable
from apps.replacing import write_whole
from apps.whole_number import at_least
from cq_edge.errors import UsageError
from runtime.bundle import Bundle, open_bundle
from runtime.conditions import machine_conditions
from runtime.event_trace import traced_operators
from runtime.measurement import Measurement

_EXIT_INTERRUPTED = 130
_DEVICES = ("here", "android", "ios")

_DESCRIPTION = """\
Times every graph of a bundle: percentiles over runs in the order and company of a picture, in
several processes over a minute, since all runs of one can be slower than those of the next;
loading with the file on the disk and in the cache, peak memory in a process of its own, and,
with --sustain, whether the device gets slower when it works for long. Says whether the machine
was quiet. What -o writes is a device profile: `plan` and `generate` plan from it, with no
export. Ctrl-C stops, and keeps what was measured."""

_EXAMPLES = """\
examples:
  cq-edge measure demo                                    a table on the screen
  cq-edge measure demo -o here.json --html here.html      for programs, and with plots
  cq-edge measure demo --sustain 60                       and a minute without a pause
  cq-edge plan demo --budget-ms 500 --device-profile here.json
  cq-edge measure demo --device android --runner ./executor_runner -o phone.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge measure`."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a folder that `cq-edge build` made")
    add("-o", "--output", type=Path, metavar="FILE", help="write the device profile (JSON)")
    add("--html", type=Path, metavar="FILE", help="write a report with plots, in one file")
    add("--force", action="store_true", help="replace files that exist")
    add("--json", action="store_true", help="print the device profile as one line of JSON")
    add("--engine", choices=tuple(BACKENDS), help="which of the bundle's backends is measured "
        "(default: the bundle's first)")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="(default: one per core)")
    add("--rounds", type=at_least(1), metavar="N", help="rounds of runs; each holds 2 of encode, "
        "4 of denoise, 4 of denoise_shallow, 1 of decode; on this machine twelve processes share "
        "them (default: 120, or as many as fit 20 seconds a graph)")  # fmt: skip
    add("--quick", action="store_true", help="start the processes at once one after the other, not "
        "seven seconds apart: the stated spread then leaves out what the machine does over a "
        "minute")  # fmt: skip
    add("--sustain", type=_seconds, default=0.0, metavar="S", help="then run the full graph for "
        "S seconds and say how much slower it got")  # fmt: skip
    add("--blocks", metavar="MODEL", help="also time the parts of the full graph, each exported "
        "alone from the model the bundle was built of: a folder, hub id, or built-in")  # fmt: skip
    add("--operators", action="store_true", help="also time single operators, where ExecuTorch was "
        "built with its event tracer (the wheel is not)")  # fmt: skip
    add("--timing-only", action="store_true", help="leave out loading times and peak memory, which "
        "take fresh processes")  # fmt: skip
    add("--device", choices=_DEVICES, default=_DEVICES[0], help="where to measure (default: "
        "%(default)s; android: a phone, over adb; ios: an iPhone or iPad, from a Mac)")  # fmt: skip
    add("--runner", type=Path, metavar="PATH", help="for android: ExecuTorch's executor_runner, "
        "built for the phone (docs/measure.md)")  # fmt: skip
    add("--serial", metavar="SERIAL", help="for android: which phone, of several")
    add("--team", metavar="ID", help="for ios: the Apple development team that signs coremltools' "
        "runner app")  # fmt: skip
    add("--timeout", type=_seconds, default=600.0, metavar="S", help="for android: longest time "
        "of one run of the runner, in seconds (default: 600)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measures, reports, and returns 0, or 130 if Ctrl-C ended it before its time.

    Raises:
        CQEdgeError: There is nothing to measure, or the device failed.
    """
    outputs = [path for path in (args.output, args.html) if path is not None]
    check_writable(outputs, force=args.force)
    bundle = open_bundle(args.bundle)
    if args.engine is not None:
        bundle = bundle.for_backend(BACKENDS[args.engine])
    measurement = _measurement(args, bundle)
    try:
        if args.device == "android":
            measure_android(args, bundle, measurement)
        elif args.device == "ios":
            measure_ios(args, bundle, measurement)
        else:
            if args.operators:  # first: refused where there is no event tracer
                measurement.operators.extend(traced_operators(bundle, args.threads))
            measure_here(args, bundle, measurement, ENGINES[measurement.engine])
            if args.blocks is not None:
                measurement.blocks.extend(measure_blocks(bundle, args.blocks))
            if measurement.engine == "coreml":
                measure_operators(bundle, measurement)
    except KeyboardInterrupt:
        measurement.interrupted = True
        if not measurement.is_profile:
            raise  # not every graph has run: there is nothing to report
    _report(args, bundle, measurement)
    return _EXIT_INTERRUPTED if measurement.interrupted else 0


def _measurement(args: argparse.Namespace, bundle: Bundle) -> Measurement:
    """Returns the empty measurement, or refuses what cannot be measured here."""
    backend = bundle.manifest.graph("denoise").backend
    _check_options(args)
    _check_engine(args, bundle, backend)
    sizes = ", ".join(
        f"{name} {bundle.manifest.files[name].bytes / 2**20:.2f} MiB"
        for name in bundle.graph_files()
    )
    here = machine_conditions(backend, args.threads) if args.device == "here" else {}
    return Measurement(backend, bundle.graphs_sha256(), {"files": sizes, **here})


def _check_options(args: argparse.Namespace) -> None:
    if args.device != "android" and (args.runner is not None or args.serial is not None):
        raise UsageError("--runner and --serial are for --device android")
    if args.blocks is not None and args.device != "here":
        raise UsageError("--blocks is for this machine: leave --device out")
    if args.operators and args.device != "here":
        raise UsageError("--operators is for this machine: leave --device out")
    if args.quick and args.device != "here":
        raise UsageError("--quick is for this machine: leave --device out")
    if args.device != "ios" and args.team is not None:
        raise UsageError("--team is for --device ios")
    if args.device == "android" and args.runner is None:
        raise UsageError(
            "--device android needs --runner PATH: ExecuTorch's executor_runner, built for the "
            "phone"
        )
    if args.device == "ios" and not has_coreml():
        raise UsageError(
            "--device ios needs a Mac with Xcode, to which the iPhone or iPad is connected: this "
            "system is none; copy the bundle there and measure from there"
        )
    if args.device == "ios" and args.team is None:
        raise UsageError("--device ios needs --team ID: the Apple development team that signs "
                         "coremltools' runner app")  # fmt: skip
    if args.device == "ios" and args.sustain:
        raise UsageError("--sustain is not for --device ios: coremltools runs no longer than asked")


def _check_engine(args: argparse.Namespace, bundle: Bundle, backend: str) -> None:
    """Refuses graphs of an engine that the device does not have."""
    needs = {"android": "xnnpack", "ios": "coreml"}.get(args.device)
    if needs is not None and backend != needs:
        other = {"xnnpack": "executorch", "coreml": "coreml"}[needs]
        cure = f"give --engine {other}" if needs in bundle.manifest.backends else (
            f"build one with --backend {other}")  # fmt: skip
        raise UsageError(
            f"{args.bundle} has {backend} graphs, and --device {args.device} measures {needs} "
            f"graphs: {cure}"
        )
    if args.blocks is not None and backend != "xnnpack":
        raise UsageError("--blocks is for xnnpack graphs: Core ML tells of its operators itself")
    if args.operators and backend != "xnnpack":
        raise UsageError("--operators is for xnnpack graphs: Core ML tells of them anyway")
    if args.device == "here" and backend == "coreml" and not has_coreml():
        raise UsageError(
            f"{args.bundle} has coreml graphs, and this system has no Core ML: the times of the "
            "reference interpreter say nothing of a device; measure on macOS, or give --engine "
            "executorch where the bundle has such graphs"
        )


def _report(args: argparse.Namespace, bundle: Bundle, measurement: Measurement) -> None:
    profile = measurement.profile()
    title = f"{bundle.manifest.name}, {measurement.engine}"
    if args.output is not None:
        write_whole(args.output, json.dumps(profile.as_json(), indent=2) + "\n")
    if args.html is not None:
        write_whole(args.html, html_report(title, measurement, profile))
    if args.json:
        print(json.dumps(profile.as_json()))
    else:
        print_table(title, measurement, profile)
    warn = partial(print, "cq-edge: warning:", file=sys.stderr)
    if profile.noise is not None:
        warn(f"the machine was {profile.noise}: measure again when it is quiet")
    if measurement.interrupted:
        warn("interrupted: this is what was measured until then")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below a million")
    return seconds
