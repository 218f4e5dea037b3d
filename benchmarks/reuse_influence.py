"""What skipping at different places of the loop does to the final latents, and what is predicted.

Runs plans that are full but for a few skipped steps, on captions that calibration never saw, with
the float32 graphs, so that nothing but reuse errs:

    make evaluate
    python -m benchmarks.reuse_influence out/evaluate/float32    # writes docs/reuse_influence.md

What `cq_edge.influence` takes the spread of the data to be was fitted to such runs.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.engines import engine_for
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.reuse_table import ReuseTable
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle
from runtime.draw import Method, draw

_SCENES_SEED = 60_000_001
_FIRST_SEED = 7_000
_PLACES = 8


def main() -> None:
    """Runs the plans and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of float32 graphs")
    parser.add_argument("--captions", type=int, default=8, help="each with its own seed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    bundle = open_bundle(args.bundle)
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    plans = skipping_plans(len(table.timesteps), table.skip.shape[1] - 1)
    captions = [s.caption() for s in islice(scenes(_SCENES_SEED, held_out=True), args.captions)]
    measured = _measure(bundle, table, args.threads, list(plans.values()), captions)
    errors = table.reuse_errors()
    predicted = np.sqrt([errors.parts(plan).reuse for plan in plans.values()])
    text = _table(list(plans), predicted, measured, bundle)
    (args.docs / "reuse_influence.md").write_text(text, encoding="utf-8")
    print(text)


def skipping_plans(total: int, longest: int) -> dict[str, CacheSchedule]:
    """Returns plans of so many steps by what they skip: the longest run there is at places that lie
    evenly, and every other step of the first and the second half."""
    plans = {}
    for start in np.linspace(2, total - longest - 1, _PLACES).astype(int):
        named = f"steps {start} to {start + longest - 1}"
        plans[named] = _skipping(total, range(start, start + longest))
    for half in np.array_split(np.arange(2, total - 1, 2), 2):
        plans[f"every other step, {half[0]} to {half[-1]}"] = _skipping(total, half.tolist())
    return plans


def _skipping(total: int, steps: Sequence[int]) -> CacheSchedule:
    return CacheSchedule.from_string("".join("FK"[step in steps] for step in range(total)))


def _measure(
    bundle: Bundle,
    table: ReuseTable,
    threads: int | None,
    plans: Sequence[CacheSchedule],
    captions: Sequence[str],
) -> NDArray[np.float64]:
    """Returns (P, N): the root mean square of what each plan changes in each caption's final
    latents."""
    engine = engine_for(bundle, threads)
    every = CacheSchedule.all_full(len(table.timesteps))
    moved = np.zeros((len(plans), len(captions)))
    for column, caption in enumerate(tqdm(captions, desc="captions")):
        every_full, *found = (
            draw(Method(bundle, engine, table.steps, plan, table), caption, _FIRST_SEED + column)
            for plan in (every, *plans)
        )
        changes = [drawn.latents - every_full.latents for drawn in found]
        moved[:, column] = [np.sqrt(np.square(change).mean()) for change in changes]
    return moved


def _table(
    names: Sequence[str],
    predicted: NDArray[np.float64],
    measured: NDArray[np.float64],
    bundle: Bundle,
) -> str:
    lines = [
        "| skipped | predicted | typical | least | most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    typical = np.exp(np.log(measured).mean(axis=1))
    for name, expected, middle, row in zip(names, predicted, typical, measured, strict=True):
        cells = " | ".join(f"{1e3 * x:.2f}" for x in (expected, middle, row.min(), row.max()))
        lines.append(f"| {name} | {cells} |")
    defaults = bundle.manifest.defaults
    return "\n".join(
        [
            *lines,
            "",
            "What skipping a few steps, all others full, changes in the final latents: the root "
            "mean square, in thousandths. Predicted is the table's error of reuse without the part "
            "of it that counts as noise; typical is the geometric mean over "
            f"{measured.shape[1]} held-out captions and seeds. {defaults.noise_scheduler} at "
            f"{defaults.steps} steps, guidance {defaults.guidance_scale:g}, float32 graphs.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
