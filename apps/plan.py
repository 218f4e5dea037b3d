"""`cq-edge plan`: which steps run the full graph, for a budget of time on a device."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from apps.device_profile import load_profile
from apps.engines import engine_for
from apps.predicted import DEVICE_HELP, DeviceAction, predicted_profile, predictions, report
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import NAMES, NoiseScheduleConfig
from cq_edge.planner import (
    Plan,
    best_at_speedup,
    best_within_ms,
    plan_frontier,
    plan_with_full_steps,
    too_few_to_reuse,
    with_better_end,
)
from cq_edge.reuse_table import OBJECTIVES, ReuseTable
from runtime.bundle import Bundle, open_bundle
from runtime.measure import measure_graphs

_ROWS = 12  # of the frontier that the screen shows

_DESCRIPTION = """\
Chooses which steps of a bundle run the full graph, the shallow graph, or none, which go without
the negative prompt, and which of the last run the full graph two or four times to average its
rounding: the plan of least predicted error within a budget.
Planning needs no export and no calibration, only the bundle and how long its graphs take on the
device, which is measured here unless a device profile or a device that ships is given."""

_EXAMPLES = """\
examples:
  cq-edge plan demo --budget-ms 500              the best picture within half a second
  cq-edge plan demo --speedup 3                  a loop 3 times as fast as with every step full
  cq-edge plan demo --full-steps 10 --json       10 full steps, for programs
  cq-edge plan demo --speedup 3 --save-profile here.json
  cq-edge plan demo --budget-ms 500 --device-profile here.json
  cq-edge plan demo --speedup 3 --device list      devices whose times can be predicted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge plan`."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a folder that `cq-edge build` made")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-ms", type=float, metavar="MS", help="longest time of a picture: "
        "prompts, loop and decoding")  # fmt: skip
    budget.add_argument("--speedup", type=float, metavar="X", help="least speed-up of the loop "
        "over the same graphs with every step full")  # fmt: skip
    budget.add_argument("--full-steps", type=int, metavar="N", help="how many steps are full")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--device-profile", type=Path, metavar="FILE", help="times of the bundle's "
        "graphs on a device (default: measured here, now)")  # fmt: skip
    times.add_argument("--device", action=DeviceAction, metavar="NAME", help=DEVICE_HELP)
    add("--save-profile", type=Path, metavar="FILE", help="write what was measured here")
    add("--threads", type=int, metavar="N", help="of the measurement (default: one per core)")
    add("--objective", choices=OBJECTIVES, default=OBJECTIVES[0], help="the error to minimise "
        "(default: %(default)s; feature_l1 is the paper's)")  # fmt: skip
    add("--scheduler", choices=NAMES, help="the noise scheduler (default: the best "
        "of those the bundle is calibrated for)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="sampler steps (likewise)")
    add("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the plan and returns the exit code 0.

    Raises:
        CQEdgeError: There is no such plan, or the profile is of something else.
    """
    bundle = open_bundle(args.bundle)
    tables = bundle.reuse_tables(args.scheduler, args.steps)
    profile = _predicted(args, bundle) if args.device else _profile(args, bundle)
    branches = bundle.manifest.branches(tables[0].guidance_scale)
    noise_schedule = bundle.manifest.noise_schedule
    found = plan_frontier(tables, profile, branches, noise_schedule, args.objective)
    plan = _choose(args, tables[0], found, profile, branches, noise_schedule)
    frontier = _with_plan(found, plan)
    if args.json:
        print(json.dumps(_as_json(args, plan, frontier, profile)))
    else:
        _print(plan, frontier, profile)
    return 0


def _profile(args: argparse.Namespace, bundle: Bundle) -> DeviceProfile:
    if args.device_profile is None:
        profile = measure_graphs(engine_for(bundle, args.threads), bundle)
    else:
        profile = load_profile(args.device_profile, bundle)
    if args.save_profile is not None:
        profile.save(args.save_profile)
    return profile


def _predicted(args: argparse.Namespace, bundle: Bundle) -> DeviceProfile:
    device, bundle, found = predictions(bundle, args.device)
    if not args.json:
        print(report(device, found) + "\n")
    profile = predicted_profile(device, bundle, found)
    if args.save_profile is not None:
        profile.save(args.save_profile)
    return profile


def _choose(
    args: argparse.Namespace,
    table: ReuseTable,
    frontier: Sequence[Plan],
    profile: DeviceProfile,
    branches: int,
    noise_schedule: NoiseScheduleConfig,
) -> Plan:
    device = (profile, branches, noise_schedule)
    if args.full_steps is not None:
        return plan_with_full_steps(table, args.full_steps, *device, args.objective)
    if args.budget_ms is not None:
        plan = best_within_ms(frontier, args.budget_ms)
        own_ms = profile.loop_ms(plan.schedule, branches)
        loop_ms = own_ms + args.budget_ms - plan.picture_ms
    else:
        plan = best_at_speedup(frontier, args.speedup)
        own_ms = profile.loop_ms(plan.schedule, branches)
        loop_ms = own_ms * plan.speedup / args.speedup
    return with_better_end(plan, loop_ms, *device) if args.objective == OBJECTIVES[0] else plan


def _with_plan(frontier: Sequence[Plan], plan: Plan) -> list[Plan]:
    """Returns the frontier with the plan that is chosen, which may be better than what the search
    found, and without what that beats."""
    unbeaten = [p for p in frontier if p.picture_ms < plan.picture_ms or p.error < plan.error]
    return sorted([*unbeaten, plan], key=lambda p: p.picture_ms)


def _as_json(
    args: argparse.Namespace, plan: Plan, frontier: Sequence[Plan], profile: DeviceProfile
) -> dict[str, object]:
    return {
        "bundle": str(args.bundle),
        "noise_scheduler": plan.table.noise_scheduler,
        "steps": plan.table.steps,
        "modes": plan.schedule.to_string(),
        "plan": plan.schedule.counts,
        "unguided": plan.schedule.unguided,
        "repeated": plan.schedule.repeated,
        "objective": args.objective,
        "graphs_ms": dict(profile.graphs_ms),
        "conditions": dict(profile.conditions),
        **_figures(plan),
        "frontier": [
            {
                "noise_scheduler": p.table.noise_scheduler,
                "steps": p.table.steps,
                "modes": p.schedule.to_string(),
                **_figures(p),
            }
            for p in frontier
        ],
    }


def _figures(plan: Plan) -> dict[str, float]:
    return {
        "error": plan.error,
        "picture_ms": round(plan.picture_ms, 2),
        "speedup": round(plan.speedup, 4),
    }


def _print(plan: Plan, frontier: Sequence[Plan], profile: DeviceProfile) -> None:
    times = ", ".join(f"{graph} {taken:.1f}" for graph, taken in profile.graphs_ms.items())
    print(f"ms per run: {times}\n")
    print("speed-up of the loop   picture, ms   predicted error   full  shallow  skip  unguided  "
          "repeated  noise scheduler")  # fmt: skip
    for row in _shown(plan, frontier):
        counts = row.schedule.counts
        print(
            f"{row.speedup:20.2f} {row.picture_ms:13.0f} {row.error:17.4g} {counts['full']:6} "
            f"{counts['shallow']:8} {counts['skip']:5} {row.schedule.unguided:9} "
            f"{row.schedule.repeated:9}  "
            f"{row.table.noise_scheduler} {row.table.steps}"
            f"{'  <- chosen' if row is plan else ''}"
        )
    print(
        f"\n--scheduler {plan.table.noise_scheduler} --steps {plan.table.steps} "
        f"--plan {plan.schedule.to_string()}"
    )
    few = too_few_to_reuse(len(plan.schedule))
    if few is not None:
        print(f"\nnote: {few}")


def _shown(plan: Plan, frontier: Sequence[Plan]) -> list[Plan]:
    """Returns some plans of the frontier, evenly spread, the chosen one among them."""
    stride = -(-len(frontier) // _ROWS)
    others = [p for p in frontier[::stride] if p is not plan]
    return sorted([*others, plan], key=lambda p: p.picture_ms)
