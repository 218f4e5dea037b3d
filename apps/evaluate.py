"""`cq-edge evaluate`: what a bundle gains and what it loses, against the float32 graphs."""

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.ablation import GAINS, ORDER, PARTIAL, gain_cell, gains
from apps.clip_difference import clip_difference
from apps.draw_captions import TIMED_CAPTIONS, Found, draw_captions, picture_of
from apps.engines import engine_for
from apps.frontier_margin import margins
from apps.kept_pictures import KeptPictures
from apps.pictures import check_writable
from apps.prompts_file import read_prompts
from apps.quiet import quiet_toolchains
from apps.whole_number import at_least
from cq_edge.cache_schedule import CacheSchedule, Mode, paper_segment_bounds, plan_full_steps
from cq_edge.errors import UsageError
from cq_edge.latency import DeviceProfile
from cq_edge.metrics import finite_psnr_db, ssim
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.planner import Plan, best_within_loop_ms, plan_frontier
from cq_edge.reuse_table import ReuseTable
from cq_edge.scenes import Scene, scenes
from runtime.bundle import Bundle, open_bundle
from runtime.draw import Drawn, Method, planned
from runtime.engine import Engine
from runtime.measure import measure_graphs

if TYPE_CHECKING:
    from cq_edge.model.scorer import Scorer

SCENES_SEED = 30_000_001
_BEST_AT_FEW_STEPS = "dpmsolver++"
_FRONTIER_SPEEDUPS = (2.0, 3.0, 4.0, 5.18, 6.0, 8.0)

_DESCRIPTION = """\
Draws the same captions from the same seeds in every way that there is (float32 at every step,
quantised, cached, both, each with and without corrections, a uniform cache, fewer steps) and
compares speed, size and quality; then some of the captions in ours and in other ways at 2 to 8
times the speed: quality against speed-up, how far ours is ahead of the best other way, and what
each half of the correction gains. The ways take turns caption by caption, in one process unless
--processes has more draw what need not be timed.
Differences of CLIP scores have two intervals: of the mean, which a few captions that tip into
another picture decide, and, of 100 captions or more, of the mean without the 1 % of captions at
either end, which says nothing of those that tip ("trimmed").
Ctrl-C compares what was drawn until then."""

_EXAMPLES = """\
examples:
  cq-edge build -o demo
  cq-edge build --quantization none -o demo-float32
  cq-edge evaluate demo --reference demo-float32 --html report.html --json report.json
  cq-edge evaluate demo --reference demo-float32 --captions 16 --speedup 3"""


@dataclass(slots=True)
class Variant:
    """A way of making pictures, and what came of it: a picture per caption, and the times of those
    that this process drew, in every way in turns."""

    name: str
    method: Method
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    loop_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Side:
    """A bundle with all that plans are made from."""

    bundle: Bundle
    profile: DeviceProfile
    tables: tuple[ReuseTable, ...]
    frontier: tuple[Plan, ...]
    make: Callable[[int, CacheSchedule, ReuseTable | None], Method]

    @property
    def table(self) -> ReuseTable:
        """Of the bundle's own noise scheduler and steps."""
        return self.tables[0]

    def plan(self, plan: Plan, *, cache: bool = True, quantisation: bool = True) -> Method:
        """Returns how a plan is run, with the halves of the correction that it is to have."""
        table = plan.table.without_corrections(cache=not cache, quantisation=not quantisation)
        method = self.make(table.steps, plan.schedule, table)
        return replace(method, noise_scheduler=table.noise_scheduler)

    @property
    def full(self) -> CacheSchedule:
        """Every step full."""
        return CacheSchedule.all_full(len(self.table.timesteps))

    def loop_ms(self, schedule: CacheSchedule) -> float:
        """The loop's predicted milliseconds, with guidance."""
        return self.profile.loop_ms(schedule, 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge evaluate`."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a folder that `cq-edge build` made")
    add("--reference", type=Path, required=True, metavar="DIR", help="the same model's bundle "
        "built with --quantization none")  # fmt: skip
    add("--speedup", type=float, default=5.18, metavar="X", help="of the loop over float32 at "
        "every step, that `ours` is planned for (default: %(default)s)")  # fmt: skip
    add("--captions", type=int, default=256, metavar="N", help="(default: %(default)s)")
    add("--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: captions of "
        "the demo world that no training saw)")  # fmt: skip
    add("--scorer", metavar="CLIP", help="a CLIP model's folder or hub id (default: the demo's)")
    add("--frontier-captions", type=int, default=32, metavar="N", help="captions for the frontier "
        "of quality against speed-up, each drawn in all ways at six speeds; 0 leaves it out "
        "(default: %(default)s)")  # fmt: skip
    add("--only", action="append", metavar="NAME", help="of the ways to draw, beside float32; "
        "repeatable (default: all). One way takes a quarter of the time, which is worth spending "
        "on more captions")  # fmt: skip
    add("--keep", type=Path, metavar="DIR", help="keep the captions' pictures there and draw none "
        f"of them again, but the first {TIMED_CAPTIONS} captions' for the time they take (a plan "
        "that differs, as this run's times may have it, draws its own)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="(default: one per core)")
    add("--processes", type=at_least(1), default=1, metavar="N", help="that draw, with one "
        f"thread each, what need not be timed: all but the first {TIMED_CAPTIONS} captions of the "
        "table, and of the frontier; all are timed and drawn in one by default")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the table for programs")
    add("--html", type=Path, metavar="FILE", help="write a report with pictures, in one file")
    add("--force", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    """Draws, compares, reports, and returns the exit code 0.

    Raises:
        CQEdgeError: The bundles do not belong together, or something could not be drawn.
    """
    outputs = [path for path in (args.json, args.html) if path is not None]
    check_writable(outputs, force=args.force)
    if args.captions < 2:
        raise UsageError(f"--captions is {args.captions}: a comparison needs 2 or more")
    with quiet_toolchains():
        from cq_edge.model.scorer import DEMO_SCORER, Scorer

        scorer = Scorer.load(args.scorer or DEMO_SCORER)
    kept = None if args.keep is None else KeptPictures(args.keep)
    bundles = [open_bundle(folder) for folder in (args.reference, args.bundle)]
    require_same_model(*bundles)
    # both before either loads a graph: graphs keep the thread pool they were loaded with
    engines = [engine_for(bundle, args.threads) for bundle in bundles]
    profiles = _profiles(bundles, engines)
    reference, ours = map(_side, bundles, engines, profiles)
    captions, world = _captions(args)
    variants = _chosen(_variants(reference, ours, args.speedup), args.only)
    drawn = _draw_all(variants, captions, kept, args.processes)
    interrupted = drawn < len(captions)
    captions, world = captions[:drawn], None if world is None else world[:drawn]
    rows = _rows(variants, captions, world, scorer)
    along = captions[: 0 if interrupted else args.frontier_captions]
    drawn_along, frontier = _frontier(reference, ours, along, scorer, kept, args.processes)
    conditions = {
        **_conditions(args, ours),
        "captions": drawn,
        "timed_captions": len(variants[0].loop_ms),
        "frontier_captions": drawn_along,
        "interrupted": interrupted or drawn_along < len(along),
    }
    ablation = gains(_qualities(rows, variants, variants[0]))
    report = {"variants": rows, "ablation": ablation, **frontier, "conditions": conditions}
    _print(rows)
    _print_ablation([*ablation, *frontier["frontier_ablation"]])
    _print_margins(frontier["frontier_margins_db"])
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.html is not None:
        from apps.evaluate_report import html_report

        args.html.write_text(html_report(report, captions, variants), encoding="utf-8")
    return 0


def _profiles(bundles: Sequence[Bundle], engines: Sequence[Engine]) -> list[DeviceProfile]:
    """Returns each side's times, measured in turns: of every graph the least of the turns'
    medians, so that what disturbs one turn does not favour the other side."""
    pairs = list(zip(bundles, engines, strict=True))
    turns = [[measure_graphs(e, b, rounds=10, at_most_s=2.0) for b, e in pairs] for _ in range(3)]
    return [
        replace(
            found[0],
            graphs_ms={g: min(p.graphs_ms[g] for p in found) for g in found[0].graphs_ms},
            step_ms=min(p.step_ms for p in found),
        )
        for found in zip(*turns, strict=True)
    ]


def _side(bundle: Bundle, engine: Engine, profile: DeviceProfile) -> Side:
    def make(steps: int, schedule: CacheSchedule, table: ReuseTable | None) -> Method:
        if table is not None and table.forecast_share.any():  # it has the quantisation half
            return planned(bundle, engine, table, schedule)
        return Method(bundle, engine, steps, schedule, table)

    tables = bundle.reuse_tables()
    frontier = plan_frontier(tables, profile, 2, bundle.manifest.noise_schedule)
    return Side(bundle, profile, tables, frontier, make)


def require_same_model(reference: Bundle, ours: Bundle) -> None:
    """Refuses a reference that is quantised, or of another model than ours.

    Raises:
        UsageError: It is.
    """
    if reference.manifest.conditions.get("quantization") != "none":
        raise UsageError(
            f"{reference.folder} is quantised: a reference is built with --quantization none"
        )
    for name in ("name", "defaults", "latents"):
        found, expected = getattr(reference.manifest, name), getattr(ours.manifest, name)
        if found != expected:
            raise UsageError(
                f"{reference.folder} and {ours.folder} differ in {name} ({found} and {expected}): "
                "build both from the same model with the same options"
            )


def _captions(args: argparse.Namespace) -> tuple[list[str], list[Scene] | None]:
    """Returns the captions, and the scenes they describe if they are the demo world's."""
    if args.prompts is None:
        world = list(islice(scenes(SCENES_SEED, held_out=True), args.captions))
        return [scene.caption() for scene in world], world
    captions = list(read_prompts(args.prompts)[: args.captions])
    if len(captions) < 2:
        raise UsageError(f"--prompts {args.prompts} holds {len(captions)} prompts: give 2 or more")
    return captions, None


def _variants(reference: Side, ours: Side, speedup: float) -> list[Variant]:
    """Returns every way in the order of the table; the first is what all are compared with.

    All but the first three are planned for the same time of the loop; `cached only` is the plan of
    ours, no step run several times.
    """
    steps, table = ours.table.steps, ours.table
    budget_ms = reference.loop_ms(reference.full) / speedup
    plan = _planned(ours, budget_ms)
    return [
        Variant("float32", reference.make(steps, reference.full, None)),
        Variant("quantised only", ours.make(steps, ours.full, None)),
        Variant("quantised, corrected", ours.make(steps, ours.full, table)),
        Variant("cached only", reference.plan(_same(plan, reference))),
        *_planned_ways(ours, plan, budget_ms),
    ]


def _planned_ways(ours: Side, plan: Plan, budget_ms: float) -> list[Variant]:
    """Returns a plan and all that is compared with it at equal time of the loop."""
    steps, table, paper = ours.table.steps, ours.table, _papers(ours, budget_ms)
    bare, cached = table.without_corrections(), table.without_corrections(cache=False)
    return [
        Variant("naive", ours.make(steps, paper, bare)),
        Variant("naive, cache half", ours.make(steps, paper, cached)),
        Variant("naive, corrected", ours.make(steps, paper, table)),
        Variant("ours, no correction", ours.plan(plan, cache=False, quantisation=False)),
        Variant("ours, cache half alone", ours.plan(plan, quantisation=False)),
        Variant("ours, quantisation alone", ours.plan(plan, cache=False)),
        Variant("ours", ours.plan(plan)),
        Variant("uniform cache", _uniform(ours, budget_ms)),
        *(
            Variant(f"fewer steps, {name}", _fewer_steps(ours, budget_ms, name))
            for name in _few_steps_by(ours)
        ),
    ]


def _chosen(variants: Sequence[Variant], only: Sequence[str] | None) -> list[Variant]:
    """Returns the first way, which all are compared with, and the named ones.

    Raises:
        UsageError: There is no way of such a name.
    """
    names = [variant.name for variant in variants]
    for name in only or ():
        if name not in names:
            raise UsageError(f"--only {name}: choose {', '.join(names)}")
    return [v for v in variants if only is None or v.name in (names[0], *only)]


def _planned(side: Side, budget_ms: float) -> Plan:
    """Returns the plan of least error whose loop keeps a budget, or the fastest."""
    noise_schedule = side.bundle.manifest.noise_schedule
    return best_within_loop_ms(side.frontier, budget_ms, side.profile, 2, noise_schedule)


def _same(plan: Plan, side: Side) -> Plan:
    """Returns the plan with the corrections of another side's graphs, which need no step to run
    several times.

    Raises:
        UsageError: The side was not calibrated for its noise scheduler and steps.
    """
    asked = (plan.table.noise_scheduler, plan.table.steps)
    found = [table for table in side.tables if (table.noise_scheduler, table.steps) == asked]
    if not found:
        raise UsageError(
            f"{side.bundle.folder} is not calibrated for {asked[0]} at {asked[1]} steps: build it "
            "with the same --also"
        )
    once = tuple(Mode.FULL if mode.runs > 1 else mode for mode in plan.schedule.modes)
    return replace(plan, table=found[0], schedule=CacheSchedule(once))


def _papers(side: Side, budget_ms: float) -> CacheSchedule:
    """Returns the paper's schedule (full and shallow steps by the features' distance, in segments
    of bounded length) whose loop keeps a budget, or the fastest."""
    errors = side.table.errors("feature_l1")
    total, longest = errors.shape

    def schedule(full_steps: int) -> CacheSchedule:
        shortest, most = paper_segment_bounds(total, full_steps)
        most = min(most, longest)
        return plan_full_steps(errors, full_steps, min_segment=shortest, max_segment=most)

    choices = [schedule(count) for count in range(total, -(-total // longest) - 1, -1)]
    return next((c for c in choices if side.loop_ms(c) <= budget_ms), choices[-1])


def _uniform(side: Side, budget_ms: float) -> Method:
    """Returns DeepCache's schedule (every n-th step full, uncorrected) that keeps a budget."""
    total = len(side.table.timesteps)
    choices = [CacheSchedule.uniform(total, n) for n in range(1, side.table.max_gap + 2)]
    fits = [choice for choice in choices if side.loop_ms(choice) <= budget_ms]
    schedule = fits[0] if fits else choices[-1]
    return side.make(side.table.steps, schedule, side.table.without_corrections())


def _few_steps_by(side: Side) -> tuple[str, ...]:
    """Returns the noise schedulers to spend a budget on full steps with: the bundle's, and the
    one that is best at few steps."""
    return tuple(dict.fromkeys([side.table.noise_scheduler, _BEST_AT_FEW_STEPS]))


def _fewer_steps(side: Side, budget_ms: float, name: str) -> Method:
    """Returns full steps alone, as many as keep a budget."""
    manifest = side.bundle.manifest

    def schedule(steps: int) -> CacheSchedule:
        made = make_noise_scheduler(name, steps, manifest.noise_schedule)
        return CacheSchedule.all_full(len(made.timesteps))

    counts = range(side.table.steps, 1, -1)
    steps = next((n for n in counts if side.loop_ms(schedule(n)) <= budget_ms), 1)
    return replace(side.make(steps, schedule(steps), None), noise_scheduler=name)


def _draw_all(
    variants: Sequence[Variant],
    captions: Sequence[str],
    kept: KeptPictures | None,
    processes: int,
) -> int:
    """Draws every caption in every way, and returns how many there are: Ctrl-C ends it with what
    was drawn, where that can be compared."""
    done = 0
    drawn = draw_captions([v.method for v in variants], captions, kept, processes)
    try:
        for found in tqdm(drawn, desc="draw", total=len(captions), unit="caption"):
            _take(variants, found)
            done += 1
    except KeyboardInterrupt:
        if done < 2:
            raise
    return done


def _take(variants: Sequence[Variant], found: Sequence[Found]) -> None:
    """Adds a caption's pictures to every way, and its times where all of them have some."""
    timed = all(isinstance(one, Drawn) for one in found)
    for variant, one in zip(variants, found, strict=True):
        variant.pictures.append(picture_of(one))
        if timed and isinstance(one, Drawn):
            variant.loop_ms.append(one.loop_ms)
            variant.total_ms.append(one.total_ms)


def _rows(
    variants: Sequence[Variant],
    captions: Sequence[str],
    world: Sequence[Scene] | None,
    scorer: "Scorer",
) -> list[dict[str, Any]]:
    """Returns a row per variant; the first is what all are compared with."""
    reference = variants[0]
    expected = scorer.clip_scores(np.stack(reference.pictures), captions)
    judged = tqdm(variants, desc="score", unit="way")
    return [_row(v, reference, expected, captions, world, scorer) for v in judged]


def _row(
    variant: Variant,
    reference: Variant,
    reference_scores: NDArray[np.float64],
    captions: Sequence[str],
    world: Sequence[Scene] | None,
    scorer: "Scorer",
) -> dict[str, Any]:
    pictures = np.stack(variant.pictures)
    scores = scorer.clip_scores(pictures, captions)
    accuracy = None if world is None else scorer.attribute_accuracy(pictures, world)["all"]
    return {
        "name": variant.name,
        "loop_speedup": _ratio(reference.loop_ms, variant.loop_ms),
        "end_to_end_speedup": _ratio(reference.total_ms, variant.total_ms),
        "compression": variant.method.bundle.manifest.conditions.get("unet_compression"),
        "clip": float(scores.mean()),
        **clip_difference(scores - reference_scores),
        "attribute_accuracy": accuracy,
        "psnr_db": float(_psnrs_db(variant, reference).mean()),
        "ssim": float(np.mean([*map(ssim, reference.pictures, variant.pictures)])),
        "plan": {
            "noise_scheduler": variant.method.noise_scheduler
            or variant.method.bundle.manifest.defaults.noise_scheduler,
            "steps": variant.method.steps,
            "modes": variant.method.schedule.to_string(),
            **variant.method.schedule.counts,
            "unguided": variant.method.schedule.unguided,
            "repeated": variant.method.schedule.repeated,
        },
    }


def _psnrs_db(variant: Variant, reference: Variant) -> NDArray[np.float64]:
    """Returns (N,) of every caption's picture."""
    pairs = zip(reference.pictures, variant.pictures, strict=True)
    return np.array([finite_psnr_db(expected, found) for expected, found in pairs])


def _ratio(reference_ms: Sequence[float], own_ms: Sequence[float]) -> float:
    """Returns the median over captions of how many times faster."""
    return median(a / b for a, b in zip(reference_ms, own_ms, strict=True))


def _frontier(
    reference: Side,
    ours: Side,
    captions: Sequence[str],
    scorer: "Scorer",
    kept: KeptPictures | None,
    processes: int,
) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Returns how many of the captions were drawn, and of the report what lies along the frontier:
    quality against speed-up (all that is compared at equal time, at six speeds), the `margins` of
    the PSNR in dB over the other ways but those of the ablation alone, and `gains`."""
    whole = reference.loop_ms(reference.full)
    base = Variant("float32", reference.make(ours.table.steps, reference.full, None))
    budgets = [whole / speedup for speedup in _FRONTIER_SPEEDUPS]
    by_budget = [_planned_ways(ours, _planned(ours, ms), ms) for ms in budgets if captions[1:]]
    points = [variant for ways in by_budget for variant in ways]
    try:
        drawn = _draw_all([base, *points], captions, kept, processes) if points else 0
    except KeyboardInterrupt:  # before there was anything to compare
        drawn = 0
    if not drawn:
        return 0, {"frontier": [], "frontier_margins_db": [], "frontier_ablation": []}
    rows = _rows([base, *points], captions[:drawn], None, scorer)[1:]
    left = iter(rows)
    found = [_qualities([*islice(left, len(ways))], ways, base) for ways in by_budget]
    curves = {name: [at[name] for at in found] for name in found[0] if name not in PARTIAL}
    return drawn, {
        "frontier": rows,
        "frontier_margins_db": margins(curves.pop("ours"), curves),
        "frontier_ablation": [row for at in found for row in gains(at)],
    }


def _qualities(
    rows: Sequence[dict[str, Any]], variants: Sequence[Variant], reference: Variant
) -> dict[str, tuple[float, NDArray[np.float64]]]:
    """Returns by name the speed-up of a row and the PSNR in dB of every caption."""
    return {
        variant.name: (row["loop_speedup"], _psnrs_db(variant, reference))
        for row, variant in zip(rows, variants, strict=True)
    }


def _conditions(args: argparse.Namespace, side: Side) -> dict[str, Any]:
    defaults = side.bundle.manifest.defaults
    return {
        "bundle": str(args.bundle),
        "noise_scheduler": defaults.noise_scheduler,
        "steps": defaults.steps,
        "guidance_scale": defaults.guidance_scale,
        "threads": args.threads or "one per core",
        "processes": args.processes,
        "engine": side.profile.engine,
        "machine": platform.machine(),
        "confidence": "95 %, paired bootstrap",
        **side.bundle.manifest.conditions,
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':24} {'full':>4} {'loop':>6} {'whole':>6} {'size':>5} {'CLIP':>6} "
          f"{'delta':>6} {'95 % interval':>16} {'trimmed':>16} {'attr':>6} {'PSNR':>5} "
          f"{'SSIM':>5}")  # fmt: skip
    for row in rows:
        low, high = row["clip_delta_ci"]
        trimmed = row["clip_delta_trimmed_ci"]
        typical = "–" if trimmed is None else f"{trimmed[0]:+.3f} to {trimmed[1]:+.3f}"
        size = "–" if row["compression"] is None else f"{row['compression']:.2f}"
        attributes = row["attribute_accuracy"]
        shown = "–" if attributes is None else f"{attributes:.1%}"
        print(
            f"{row['name']:24} {row['plan']['full']:4} {row['loop_speedup']:5.2f}x "
            f"{row['end_to_end_speedup']:5.2f}x {size:>5} {row['clip']:6.2f} "
            f"{row['clip_delta']:+6.3f} {f'{low:+.3f} to {high:+.3f}':>16} "
            f"{typical:>16} {shown:>6} "
            f"{row['psnr_db']:5.1f} {row['ssim']:5.3f}"
        )


def _print_ablation(ablation: Sequence[dict[str, Any]]) -> None:
    """Prints what each half of the correction gains."""
    if not ablation:
        return
    titles = " ".join(f"{title:>25}" for title in GAINS.values())
    print(f"\n{'PSNR gained, dB':27} {titles}  captions")
    for row in ablation:
        cells = " ".join(f"{gain_cell(row, gain):>25}" for gain in GAINS)
        print(f"{row['schedule']:20} {row['loop_speedup']:5.2f}x {cells}  {row['captions']:8}")
    print(ORDER)


def _print_margins(margins_db: Sequence[dict[str, Any]]) -> None:
    """Prints where along the frontier `ours` is least ahead, or most behind."""
    if not margins_db:
        return
    least = min(margins_db, key=lambda row: row["difference"])
    low, high = least["difference_ci"]
    print(f"\nalong the frontier, {margins_db[0]['loop_speedup']:.2f}x to "
          f"{margins_db[-1]['loop_speedup']:.2f}x, the PSNR of ours less that of the best other "
          f"is least at {least['loop_speedup']:.2f}x: {least['difference']:+.2f} dB "
          f"({low:+.2f} to {high:+.2f}), {least['next']}")  # fmt: skip
