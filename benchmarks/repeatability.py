"""Do two runs of `cq-edge measure` agree, and does it notice that the machine is not quiet?

Runs the command several times, each in a process of its own, and then once more while another
process keeps one core busy:

    python -m benchmarks.repeatability out/demo/bundle --threads 1   # docs/repeatability.md
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from apps.device_profile import load_profile
from cq_edge.latency import GRAPHS, DeviceProfile, GraphFigures
from runtime.bundle import open_bundle


def main() -> None:
    """Measures, compares, writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    profiles = [_measure(args) for _ in range(args.times)]
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        disturbed = _measure(args)
    finally:
        busy.kill()
        busy.wait()
    text = "\n".join(_lines(profiles, disturbed)) + "\n"
    (args.docs / "repeatability.md").write_text(text, encoding="utf-8")
    print(text)


def _measure(args: argparse.Namespace) -> DeviceProfile:
    """Returns what the command finds in a process of its own."""
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "device.json"
        command = [sys.executable, "-m", "apps.cli", "measure", str(args.bundle), "--timing-only"]
        subprocess.run([*command, *threads, "-o", str(path)], check=True)
        return load_profile(path, open_bundle(args.bundle))


def _lines(profiles: Sequence[DeviceProfile], disturbed: DeviceProfile) -> list[str]:
    graphs = " | ".join(f"{graph}, ms" for graph in GRAPHS)
    head = [f"| run | {graphs} | fixed work, ms | the machine was |",
            "| --- |" + " --- |" * (len(GRAPHS) + 2)]  # fmt: skip
    rows = [_row(str(number), profile) for number, profile in enumerate(profiles, 1)]
    pairs = list(combinations(profiles, 2))

    def agreeing(low: str, high: str) -> str:
        cells = (_agreeing([(one.figures[g], other.figures[g]) for one, other in pairs], low, high)
                 for g in GRAPHS)  # fmt: skip
        return " | ".join(f"{cell} of {len(pairs)}" for cell in cells)

    said = profiles[0].conditions
    return [
        *head,
        *rows,
        _row("with a busy process", disturbed),
        f"| pairs of runs that agree | {agreeing('low_ms', 'high_ms')} | | |",
        f"| medians within p10 to p90 | {agreeing('p10_ms', 'p90_ms')} | | |",
        "",
        "Median (the stated spread: where the medians of 95 of 100 processes lie, with 95 % "
        "confidence; p10 to p90 of all runs). Fixed work: what sines take that `measure` computes "
        "after every round (in the slowest process over in the fastest), which tells the "
        "processor's clock. Two runs agree where each one's median lies within the other's "
        f"stated spread. Conditions: {said['processor']}, {said['cores']} cores, {said['engine']}, "
        f"{said['threads']} threads, {said['rounds']} rounds in {said['processes']} processes a "
        "run.",
    ]


def _row(name: str, profile: DeviceProfile) -> str:
    cells = [
        f"{r.p50_ms:.2f} ({r.low_ms:.2f}–{r.high_ms:.2f}; {r.p10_ms:.2f}–{r.p90_ms:.2f})"
        for r in (profile.figures[graph] for graph in GRAPHS)
    ]
    said = profile.conditions
    work = f"{said['work_ms']:.3f} ({said['work_drift']:.3f} times)"
    return f"| {name} | {' | '.join(cells)} | {work} | {said['noise']} |"


def _agreeing(pairs: Sequence[tuple[GraphFigures, GraphFigures]], low: str, high: str) -> int:
    """Returns how many pairs have each one's median between the other's figures of these names."""

    def within(one: GraphFigures, other: GraphFigures) -> bool:
        return bool(getattr(other, low) <= one.p50_ms <= getattr(other, high))

    return sum(within(one, other) and within(other, one) for one, other in pairs)


if __name__ == "__main__":
    main()
