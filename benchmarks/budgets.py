"""Do plans made from a measured profile keep their budgets?

Runs `cq-edge measure`, plans for five budgets from the profile it wrote, then draws pictures by
the five plans in turns and compares how long they took with the budget:

    python -m benchmarks.budgets out/demo/bundle --threads 1       # writes docs/budgets.md
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from apps import cli
from apps.device_profile import load_profile
from apps.engines import engine_for
from cq_edge.latency import DeviceProfile
from cq_edge.planner import Plan, best_within_ms, plan_frontier
from runtime.bundle import Bundle, open_bundle
from runtime.conditions import cores
from runtime.draw import Method, draw
from runtime.noise import NoiseWatch
from tools.demo import PROMPTS

_BUDGETS = 5
_MOST_OVER = 1.10


def main() -> None:
    """Measures, plans, draws, writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=9, help="of each plan (default: %(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    bundle = open_bundle(args.bundle)
    profile = _measure(args, bundle)
    noise_schedule = bundle.manifest.noise_schedule
    frontier = plan_frontier(bundle.reuse_tables(), profile, 2, noise_schedule)
    times = sorted(plan.picture_ms for plan in frontier)
    budgets = np.geomspace(1.1 * times[0], times[-1], _BUDGETS).tolist()
    plans = [best_within_ms(frontier, budget_ms) for budget_ms in budgets]
    watch = NoiseWatch(args.threads or cores())
    taken = _draw(bundle, plans, args, watch)
    lines = [
        "| budget, ms | plan: full, shallow, skip, repeated | predicted, ms | measured, ms: median "
        "(p10–p90) | over the budget | over the prediction | within 10 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(*row) for row in zip(budgets, plans, taken, strict=True)),
        "",
        _conditions(bundle, profile, watch.noise().verdict, args.runs),
    ]
    text = "\n".join(lines) + "\n"
    (args.docs / "budgets.md").write_text(text, encoding="utf-8")
    print(text)


def _measure(args: argparse.Namespace, bundle: Bundle) -> DeviceProfile:
    """Returns the profile that the command writes."""
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "device.json"
        words = ["measure", str(args.bundle), *threads, "--timing-only", "-o", str(path)]
        if cli.main(words) != 0:
            raise SystemExit(1)
        return load_profile(path, bundle)


def _draw(
    bundle: Bundle, plans: list[Plan], args: argparse.Namespace, watch: NoiseWatch
) -> list[list[float]]:
    """Returns the milliseconds of whole pictures per plan and run, the plans taking turns."""
    engine = engine_for(bundle, args.threads)
    taken: list[list[float]] = [[] for _ in plans]
    for run in tqdm(range(1 + args.runs), desc="runs"):  # the first warms up
        for plan, times in zip(plans, taken, strict=True):
            table = plan.table
            method = Method(
                bundle, engine, table.steps, plan.schedule, table, table.noise_scheduler
            )
            drawn = draw(method, PROMPTS[run % len(PROMPTS)], run)
            times.append(drawn.total_ms)
            watch.tick()
    return [times[1:] for times in taken]


def _row(budget_ms: float, plan: Plan, taken: list[float]) -> str:
    p10, p90 = np.percentile(taken, (10, 90))
    counts = plan.schedule.counts
    over = median(taken) / budget_ms
    return (
        f"| {budget_ms:.1f} | {plan.table.noise_scheduler} {plan.table.steps}: "
        f"{counts['full']}, {counts['shallow']}, {counts['skip']}, {plan.schedule.repeated} | "
        f"{plan.picture_ms:.1f} | "
        f"{median(taken):.1f} ({p10:.1f}–{p90:.1f}) | {over - 1:+.1%} | "
        f"{median(taken) / plan.picture_ms - 1:+.1%} | {'yes' if over <= _MOST_OVER else 'NO'} |"
    )


def _conditions(bundle: Bundle, profile: DeviceProfile, verdict: str, runs: int) -> str:
    said = profile.conditions
    return (
        f"Conditions: {bundle.manifest.name}, {said['processor']}, {said['cores']} cores, "
        f"{said['engine']}, {said['threads']} threads, {runs} pictures of each plan in turns in "
        f"one process after the measurement. The machine while measuring: {said['noise']}; while "
        f"drawing: {verdict}."
    )


if __name__ == "__main__":
    main()
