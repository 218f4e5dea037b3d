"""What models of published size take: to build, to draw with, and a step of either graph.

Each part runs `cq-edge` in a process of its own, because a peak of memory is a process's, and
writes what it found into docs/full_size.json at once; the section of docs/benchmarks.md is made
of that file. A build calibrates on one prompt and few steps: its peak is the usual one, its time
is not, and nothing is said of pictures.

    python -m tools.random_pipeline sd15 out/models/sd15
    python -m benchmarks.full_size out/models/sd15                    # everything, in order
    python -m benchmarks.full_size out/models/sd15 measure --rounds 3 # one part anew
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apps.replacing import write_whole
from benchmarks.page_section import write_section
from cq_edge.latency import GRAPHS
from runtime.bundle import open_bundle
from runtime.conditions import cores, processor

_PROMPT = "a photo of a brown dog running on a beach at sunset"
_SCHEDULER, _MAX_GAP = "ddim", 3  # as many measured pairs as so few steps allow
Part = Callable[[argparse.Namespace], dict[str, Any]]


def main() -> None:
    """Runs the parts asked for and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="a diffusers folder; its name is the row's")
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--quantization", default="int8", help="int8 or none (default: %(default)s)")
    add("--steps", type=int, default=4, help="of calibration (default: %(default)s)")
    add("--rounds", type=int, default=3, help="of measuring (default: %(default)s)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--work", type=Path, default=Path("out/full_size"), help="gets the bundles")
    add("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}: choose from {', '.join(PARTS)}")
    for name in args.parts or PARTS:
        _take_down(args, name, PARTS[name](args))
    text = page(json.loads(_results(args).read_text(encoding="utf-8")))
    write_section(args.docs / "benchmarks.md", "full size", text)
    print(text)


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the section, of what the parts found by model."""
    head = (
        "| model | UNet weights, MB | smaller than float32 | peak of the build, GiB | build, min | "
        "peak of a picture, GiB | full step, ms | shallow step, ms | shallow / full |"
    )
    lines = ["## Full size", "", head, "| --- |" + " ---: |" * 8]
    lines += [_row(name, found) for name, found in results.items()]
    return "\n".join([*lines, "", *(_said(name, found) for name, found in results.items())])


def _build(args: argparse.Namespace) -> dict[str, Any]:
    prompts = args.work / "prompts.txt"
    write_whole(prompts, f"{_PROMPT}\n")
    words = ["--steps", str(args.steps), "--scheduler", _SCHEDULER, "--max-gap", str(_MAX_GAP)]
    words += ["--prompts", str(prompts), "--quantization", args.quantization, "--force"]
    found = _run("build", str(args.model), "-o", str(_bundle(args)), *words)
    del found["bundle"]
    limits = {"prompts": 1, "steps": args.steps, "max_gap": _MAX_GAP}
    return {**found, **limits, "processor": processor(), "cores": cores()}


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    picture = args.work / f"{_name(args)}.png"
    words = ["--threads", str(args.threads), "-o", str(picture), "--force"]
    found = _run("generate", str(_bundle(args)), _PROMPT, *words)
    del found["images"]
    size = open_bundle(_bundle(args), verify=False).manifest.image_px
    return {**found, "image_px": [size.width, size.height]}


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    words = ["--threads", str(args.threads), "--rounds", str(args.rounds)]
    return _run("measure", str(_bundle(args)), *words)


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    found = _run("verify", str(_bundle(args)))
    del found["bundle"]
    return found


PARTS: Mapping[str, Part] = {
    "build": _build,
    "generate": _generate,
    "measure": _measure,
    "verify": _verify,
}


def _run(*words: str) -> dict[str, Any]:
    """Returns the JSON object that a subcommand prints last; its progress is shown."""
    command = [sys.executable, "-m", "apps.cli", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _take_down(args: argparse.Namespace, part: str, found: Mapping[str, Any]) -> None:
    path = _results(args)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.setdefault(_name(args), {})[part] = found
    write_whole(path, json.dumps(results, indent=2) + "\n")


def _row(name: str, found: Mapping[str, Any]) -> str:
    build, drawn, measured = (found.get(part) for part in ("build", "generate", "measure"))
    cells = ["–"] * 8
    if build is not None:
        compression = build["unet_compression"]
        cells[0] = f"{build['unet_float32_bytes'] / compression / 1e6:.0f}"
        cells[1] = f"{compression:.2f}"
        cells[2] = f"{build['peak_memory_mib'] / 1024:.2f}"
        cells[3] = f"{build['seconds'] / 60:.0f}"
    if drawn is not None:
        cells[4] = f"{drawn['peak_memory_mib'] / 1024:.2f}"
    if measured is not None:
        full, shallow = (measured["graphs"][g] for g in ("denoise", "denoise_shallow"))
        cells[5:7] = [_spread(full), _spread(shallow)]
        cells[7] = f"{shallow['p50_ms'] / full['p50_ms']:.1%}"
    return f"| {name} | {' | '.join(cells)} |"


def _spread(figures: Mapping[str, float]) -> str:
    return f"{figures['p50_ms']:.0f} ({figures['p10_ms']:.0f}–{figures['p90_ms']:.0f})"


def _said(name: str, found: Mapping[str, Any]) -> str:
    """Returns what the figures of a row were measured under, and what else was found."""
    sentences = [f"- {name}:"]
    build, drawn, measured = (found.get(part) for part in ("build", "generate", "measure"))
    if build is not None:
        stages = ", ".join(
            f"{stage} {taken['seconds']:.0f} s ({taken['peak_memory_mib'] / 1024:.1f} GiB)"
            for stage, taken in build["stages"].items()
        )
        sentences.append(
            f"built on {build['cores']} core of {build['processor']}, calibrated on "
            f"{build['prompts']} prompt, {build['steps']} steps, gaps to {build['max_gap']}; "
            f"stages, with the peak by their end: {stages}."
        )
    if drawn is not None:
        width, height = drawn["image_px"]
        sentences.append(f"A picture is {width}×{height} px.")
    if measured is not None:
        said = measured["conditions"]
        loaded = ", ".join(
            f"{g} {measured['graphs'][g]['peak_memory_mib'] / 1024:.2f}" for g in GRAPHS
        )
        sentences.append(
            f"Steps: median (p10–p90) of {said['rounds']} rounds, batch 1, {said['threads']} "
            f"thread, {said['engine']}; the machine: {said['noise']}. Peak of "
            f"loading and running one graph, GiB: {loaded}."
        )
    if found.get("verify", {}).get("good"):
        sentences.append("`cq-edge verify` finds it good.")
    return " ".join(sentences)


def _name(args: argparse.Namespace) -> str:
    return f"{args.model.name}, {'float32' if args.quantization == 'none' else args.quantization}"


def _bundle(args: argparse.Namespace) -> Path:
    folder: Path = args.work / f"{args.model.name}_{args.quantization}"
    return folder


def _results(args: argparse.Namespace) -> Path:
    path: Path = args.docs / "full_size.json"
    return path


if __name__ == "__main__":
    main()
