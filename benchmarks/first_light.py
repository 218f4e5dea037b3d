"""README's pictures and table: the float32 graph at every step against the bundle's own plan.

Builds both bundles of the demo model, then lets them take turns on the same prompts and seeds,
in one process, for each number of threads:

    python -m benchmarks.first_light            # writes docs/first_light.png and .md
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from apps import cli
from apps.plan_option import choose_schedule
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.metrics import psnr_db
from runtime.bundle import Bundle, open_bundle
from runtime.conditions import processor
from runtime.draw import Method, draw, planned
from runtime.executorch_engine import ExecuTorchEngine
from tools.demo import PROMPTS

_GAP_PX = 4
_HEAD = (
    "| threads | | denoising loop, ms: median (min–max) | speed-up: median (min–max) | "
    "graphs, MB | PSNR to float32, dB |",
    "| --- | --- | --- | --- | --- | --- |",
)


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """A way of making pictures and its name in the table."""

    name: str
    method: Method


def main() -> None:
    """Builds, measures, draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15, help="of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--work", type=Path, default=Path("out/first_light"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument(
        "--no-build", action="store_true", help="take the bundles of an earlier run"
    )
    args = parser.parse_args()
    if not args.no_build:
        _build(args.work)
    rows = [row for threads in args.threads for row in _measure(args, threads)]
    conditions = _conditions(open_bundle(args.work / "int8"), args.runs)
    table = "\n".join([*_HEAD, *rows, "", conditions]) + "\n"
    (args.docs / "first_light.md").write_text(table, encoding="utf-8")
    print(table)


def _measure(args: argparse.Namespace, threads: int) -> list[str]:
    """Returns the table's rows for a number of threads, and draws the pictures."""
    contenders = _contenders(args.work, threads)
    pictures = [[draw(c.method, prompt, 0).picture for prompt in PROMPTS] for c in contenders]
    times = _alternate(contenders, args.runs)
    _write_picture(pictures, args.docs / "first_light.png")
    return _rows(contenders, times, pictures, threads)


def _build(work: Path) -> None:
    for name, quantization in (("float32", "none"), ("int8", "int8")):
        arguments = ["build", "-o", str(work / name), "--quantization", quantization, "--force"]
        if cli.main(arguments) != 0:
            raise SystemExit(1)


def _contenders(work: Path, threads: int) -> list[Contender]:
    """Returns float32 full, int8 full and int8 with the bundle's plan, in this order."""
    float32, int8 = (open_bundle(work / name) for name in ("float32", "int8"))
    defaults = int8.manifest.defaults
    table = int8.reuse_table(defaults.noise_scheduler, defaults.steps)
    total = len(table.timesteps)
    full = CacheSchedule.all_full(total)
    schedule = choose_schedule(f"full-steps:{defaults.full_steps}", total, lambda: table)
    slow, fast = ExecuTorchEngine(float32, threads), ExecuTorchEngine(int8, threads)
    steps = defaults.steps
    return [
        Contender("float32, every step full", Method(float32, slow, steps, full, None)),
        Contender("int8, every step full", Method(int8, fast, steps, full, None)),
        Contender(
            f"int8, {defaults.full_steps} of {total} steps full",
            planned(int8, fast, table, schedule),
        ),
    ]


def _alternate(contenders: list[Contender], runs: int) -> list[list[float]]:
    """Returns the loop's milliseconds per contender and run, the contenders taking turns."""
    times: list[list[float]] = [[] for _ in contenders]
    for run in tqdm(range(runs), desc="runs"):
        for contender, taken in zip(contenders, times, strict=True):
            taken.append(draw(contender.method, PROMPTS[run % len(PROMPTS)], run).loop_ms)
    return times


def _rows(
    contenders: list[Contender],
    times: list[list[float]],
    pictures: list[list[NDArray[np.uint8]]],
    threads: int,
) -> list[str]:
    """Returns a row per contender; the first is what the others are compared with."""
    lines = []
    for index, (contender, taken) in enumerate(zip(contenders, times, strict=True)):
        ratios = [reference / own for reference, own in zip(times[0], taken, strict=True)]
        pairs = zip(pictures[0], pictures[index], strict=True)
        psnr = "–" if index == 0 else f"{np.mean([psnr_db(a, b) for a, b in pairs]):.1f}"
        graphs = contender.method.bundle.manifest.files["graphs.pte"].bytes / 1e6
        lines.append(
            f"| {threads} | {contender.name} | "
            f"{median(taken):.0f} ({min(taken):.0f}–{max(taken):.0f}) | "
            f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | {graphs:.2f} | {psnr} |"
        )
    return lines


def _conditions(bundle: Bundle, runs: int) -> str:
    defaults, side = bundle.manifest.defaults, bundle.manifest.image_px.height
    return (
        f"Conditions: {processor()}, ExecuTorch XNNPACK, demo model, {side}×{side} px, "
        f"{defaults.noise_scheduler.upper()} {defaults.steps} steps, guidance "
        f"{defaults.guidance_scale:g}, {runs} runs of each side in turns in one process. "
        "The float32 graphs have the same rewrites."
    )


def _write_picture(pictures: list[list[NDArray[np.uint8]]], path: Path) -> None:
    """Writes a grid: a column per prompt, float32 above the bundle's plan."""
    rows = [np.concatenate(list(_apart(row, 1)), 1) for row in (pictures[0], pictures[-1])]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(_apart(rows, 0)), 0)).save(path)


def _apart(parts: list[NDArray[np.uint8]], axis: int) -> list[NDArray[np.uint8]]:
    """Returns the parts with white gaps between them along an axis."""
    shape = list(parts[0].shape)
    shape[axis] = _GAP_PX
    gap = np.full(shape, 255, np.uint8)
    return [piece for part in parts for piece in (part, gap)][:-1]


if __name__ == "__main__":
    main()
