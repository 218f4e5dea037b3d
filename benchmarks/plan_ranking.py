"""How well a plan's predicted error ranks the error it is then found to have.

Draws random plans of mixed length, runs each from seeds and captions that calibration never saw,
and compares the final latents with those of the float32 graphs with every step full:

    cq-edge build -o demo
    cq-edge build --quantization none -o demo-float32
    python -m benchmarks.plan_ranking demo --reference demo-float32    # writes docs/plan_ranking.*
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.engines import engine_for
from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.metrics import spearman_rho
from cq_edge.planner import predicted_errors
from cq_edge.reuse_table import OBJECTIVES, ReuseTable
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle
from runtime.draw import Method, draw

_SCENES_SEED, _FIRST_SEED, _PLANS_SEED = 50_000_001, 2_000, 1
"""Nothing was fitted to these captions, seeds and plans, but to others."""


@dataclass(frozen=True, slots=True, eq=False)
class _Panel:
    """Some plans, with what an objective predicts of them and what was measured.

    `predicted` is (P,), `measured` (P, N) of N captions.
    """

    plans: str
    objective: str
    predicted: NDArray[np.float64]
    measured: NDArray[np.float64]

    @property
    def typical(self) -> NDArray[np.float64]:
        """Returns (P,) geometric means over the captions, which is averaging decibels."""
        means: NDArray[np.float64] = np.exp(np.log(self.measured).mean(axis=1))
        return means

    @property
    def rho(self) -> float:
        """Spearman's rho with the typical error."""
        return spearman_rho(self.predicted, self.typical)

    @property
    def rho_of_mean(self) -> float:
        """Spearman's rho with the mean error, which the captions that a plan tips over decide."""
        return spearman_rho(self.predicted, self.measured.mean(axis=1))


def main() -> None:
    """Draws plans, runs them, writes the correlation and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--plans", type=int, default=60, help="with skip steps and without")
    parser.add_argument("--captions", type=int, default=12, help="each with its own seed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    bundle, reference = open_bundle(args.bundle), open_bundle(args.reference)
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    rng = np.random.default_rng(_PLANS_SEED)
    reusing = [random_plan(rng, table) for _ in range(args.plans)]
    plans = [*reusing, *(with_skips(rng, plan, table) for plan in reusing)]
    captions = [s.caption() for s in islice(scenes(_SCENES_SEED, held_out=True), args.captions)]
    measured = _measure(reference, bundle, args.threads, table, plans, captions)
    half = len(reusing)
    panels = [
        _Panel("full and shallow", name, _predicted(bundle, table, name, reusing), measured[:half])
        for name in OBJECTIVES
    ]
    skipping = _predicted(bundle, table, OBJECTIVES[0], plans[half:])
    panels.append(_Panel("full, shallow and skip", OBJECTIVES[0], skipping, measured[half:]))
    counts = np.array([plan.counts["full"] for plan in reusing])
    _plot(panels, counts, args.docs / "plan_ranking.png")
    _save(plans, [*panels[0].predicted, *panels[-1].predicted], measured, args.docs)
    text = _table(panels, counts, args.captions, bundle)
    (args.docs / "plan_ranking.md").write_text(text, encoding="utf-8")
    print(text)


def random_plan(rng: np.random.Generator, table: ReuseTable) -> CacheSchedule:
    """Returns a plan with a random number of full steps at random places that the table covers."""
    total = len(table.timesteps)
    while True:
        fewest = -(-total // (table.max_gap + 1))
        count = int(rng.integers(fewest, total))
        full = {0, *rng.choice(np.arange(1, total), count - 1, replace=False).tolist()}
        plan = CacheSchedule.from_string("".join("F" if i in full else "S" for i in range(total)))
        if plan.max_gap <= table.max_gap:
            return plan


def with_skips(rng: np.random.Generator, plan: CacheSchedule, table: ReuseTable) -> CacheSchedule:
    """Returns a plan with a random share of its shallow steps skipped, as far as the table goes."""
    share, skipped, modes = rng.random(), 0, []
    for mode in plan.modes:
        skips = mode is Mode.SHALLOW and skipped < table.skip.shape[1] - 1 and rng.random() < share
        modes.append(Mode.SKIP if skips else mode)
        skipped = skipped + 1 if skips else 0
    return CacheSchedule(tuple(modes))


def _predicted(
    bundle: Bundle, table: ReuseTable, objective: str, plans: Sequence[CacheSchedule]
) -> NDArray[np.float64]:
    schedule = bundle.manifest.noise_schedule
    return np.array(predicted_errors(table, schedule, plans, objective))


def _measure(
    reference: Bundle,
    bundle: Bundle,
    threads: int | None,
    table: ReuseTable,
    plans: list[CacheSchedule],
    captions: list[str],
) -> NDArray[np.float64]:
    """Returns (P, N): each plan's mean squared error of the final latents of each caption."""
    steps, errors = table.steps, np.zeros((len(plans), len(captions)))
    exact, engine = (engine_for(side, threads) for side in (reference, bundle))
    full = Method(reference, exact, steps, CacheSchedule.all_full(len(table.timesteps)), None)
    for column, caption in enumerate(tqdm(captions, desc="captions")):
        seed = _FIRST_SEED + column
        expected = draw(full, caption, seed).latents
        for index, plan in enumerate(tqdm(plans, desc="plans", leave=False)):
            found = draw(Method(bundle, engine, steps, plan, table), caption, seed).latents
            errors[index, column] = float(np.square(found - expected).mean())
    return errors


def _table(
    panels: Sequence[_Panel], counts: NDArray[np.int64], captions: int, bundle: Bundle
) -> str:
    lines = [
        "| plans | predicted error | Spearman's rho with the typical error | with the mean error |",
        "| --- | --- | --- | --- |",
        *(
            f"| {panel.plans} | `{panel.objective}` | {panel.rho:.3f} | {panel.rho_of_mean:.3f} |"
            for panel in panels
        ),
    ]
    defaults = bundle.manifest.defaults
    lines += [
        "",
        f"{len(counts)} random plans of each kind with {counts.min()} to {counts.max()} full "
        f"steps, {captions} held-out captions and seeds each, {defaults.noise_scheduler.upper()} "
        f"{defaults.steps} steps, guidance {defaults.guidance_scale:g}. Measured: mean squared "
        "error of the final latents against the float32 graphs, every step full; typical is the "
        "geometric mean over the captions (the mean of their decibels), which the few captions "
        "that a plan tips into another picture do not decide. `noise_pred` is our objective, "
        "`feature_l1` the paper's.",
        "",
        "![Predicted against measured error](plan_ranking.png)",
    ]
    return "\n".join(lines) + "\n"


def _save(
    plans: Sequence[CacheSchedule],
    predicted: Sequence[float],
    measured: NDArray[np.float64],
    docs: Path,
) -> None:
    """Writes each plan's prediction and what was measured of it, caption by caption."""
    rows = [
        {"modes": plan.to_string(), "predicted": float(error), "measured": found.tolist()}
        for plan, error, found in zip(plans, predicted, measured, strict=True)
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (docs / "plan_ranking.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _plot(panels: Sequence[_Panel], counts: NDArray[np.int64], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4))
    for axis, panel in zip(axes, panels, strict=True):
        dots = axis.scatter(panel.predicted, panel.typical, c=counts, s=18)
        title = f"{panel.plans}\n{panel.objective}: rho {panel.rho:.3f}"
        axis.set(xscale="log", yscale="log", xlabel="predicted error", title=title)
        axis.tick_params(axis="x", which="minor", labelrotation=90)
    axes[0].set(ylabel="typical error of the final latents")
    figure.colorbar(dots, ax=axes, label="full steps")
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
