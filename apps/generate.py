"""`cq-edge generate`: pictures from a bundle, offline."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.device_profile import load_profile
from apps.engines import BACKENDS, engine_for, has_coreml
from apps.pictures import check_writable, output_paths, side_by_side, write_png
from apps.plan_option import PLAN_HELP, choose_schedule
from apps.whole_number import at_least
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import BundleError, ScheduleError, UsageError
from cq_edge.forecast_share import plan_shares
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import (
    NAMES,
    NoiseScheduleConfig,
    NoiseScheduler,
    make_noise_scheduler,
)
from cq_edge.planner import Plan, best_within_ms, plan_frontier
from cq_edge.reuse_table import ReuseTable
from runtime.bundle import Bundle, open_bundle
from runtime.denoise import Context, Guidance, StepRecord, denoise
from runtime.engine import Engine
from runtime.generate import (
    decode_latents,
    encode_prompt,
    guided_by,
    needs_negative,
    noises,
)
from runtime.measure import measure_graphs
from runtime.peak_memory import peak_memory_mib
from runtime.tokenizer import without_surrogates

_LONGEST_QUOTE = 200  # characters of a cut prompt that a warning shows
_WARM_UP_STEPS = 3
_MEASURE_S = 0.5  # of a budget that measuring each graph may take, unless one run takes longer

_DESCRIPTION = """\
Makes pictures of prompts with a bundle that `cq-edge build` made. Nothing is fetched: the
bundle holds all it needs. The same command gives the same files, byte for byte."""

_EXAMPLES = """\
examples:
  cq-edge generate demo "a large red star on a blue striped background"
  cq-edge generate demo "a small green ring" --seed 7 --num-images 4 -o rings/
  cq-edge generate demo "a white cross" --plan full            every step runs the full graph
  cq-edge generate demo "a white cross" --plan full-steps:10   the 10 best places for it
  cq-edge generate demo "a white cross" --budget-ms 5000       the best picture by then
  cq-edge generate demo "a white cross" --compare-full         how much time, which picture?
  cq-edge generate demo "a white cross" --engine coreml        with the Core ML graphs"""


@dataclass(frozen=True, slots=True, eq=False)
class _Recipe:
    """How every picture of one command is made."""

    noise_scheduler: NoiseScheduler
    cache_schedule: CacheSchedule
    reuse_table: ReuseTable | None  # None where none was measured
    guidance_scale: float
    negative_prompt: str
    choices: tuple[ReuseTable, ...] = ()  # of what a budget may be spent on
    shares: NDArray[np.float32] | None = None  # of forecasts; None for the table's, if any


@dataclass(frozen=True, slots=True)
class _Job:
    """One picture to make."""

    prompt: str
    seed: int
    path: Path
    beside_path: Path | None  # for the comparison with the full graph, if asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge generate`."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a folder that `cq-edge build` made")
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw; none of a model that takes no "
        "prompts")  # fmt: skip
    add("--negative-prompt", default="", metavar="TEXT", help="what to draw away from")
    add("--steps", type=int, metavar="N", help="sampler steps (default: the bundle's)")
    add(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="how strictly to follow the prompt; 1 is unguided and takes half the time "
        "(default: the bundle's)",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the first picture of each "
        "prompt; the next ones count up (default: 0)")  # fmt: skip
    add("--num-images", type=at_least(1), default=1, metavar="N", help="pictures per prompt")
    add("--scheduler", choices=NAMES, help="the noise scheduler (default: the bundle's)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--plan",
        help=f"which steps run the full graph: {PLAN_HELP} (default: full-steps:N with the "
        "bundle's N, in proportion to --steps)",
    )
    which.add_argument(
        "--budget-ms",
        type=float,
        metavar="MS",
        help="the best plan that has the pictures done so many milliseconds each after the "
        "start; measures the graphs first, for a fraction of a second or a few runs",
    )
    add("--device-profile", type=Path, metavar="FILE", help="for --budget-ms: times that `cq-edge "
        "measure` or `plan --save-profile` wrote, instead of measuring now")  # fmt: skip
    add("-o", "--output", type=Path, metavar="PATH", help="a .png file, or a folder (default: a "
        "name made of the prompt, here)")  # fmt: skip
    add("--force", action="store_true", help="replace files that exist")
    add("--engine", choices=tuple(BACKENDS), help="which of the bundle's backends runs; off macOS, "
        "coreml is a slow reference interpreter (default: the bundle's first)")  # fmt: skip
    add("--threads", type=at_least(1), metavar="N", help="(default: one per core)")
    add("--compare-full", action="store_true", help="also run the full graph at every step from "
        "the same seed; show both times, and both pictures side by side")  # fmt: skip
    add("--json", action="store_true", help="print one line of JSON, times in milliseconds over "
        "all pictures")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Makes the pictures and returns the exit code 0.

    Raises:
        CQEdgeError: Nothing, or not everything, could be made; no file is half written.
    """
    start = perf_counter()
    bundle = _opened(args.bundle, args.engine)
    _check_prompts(args, bundle)
    profile = _profile(args, bundle)
    recipe = _recipe(bundle, args)
    jobs = _jobs(args)
    paths = [path for job in jobs for path in (job.path, job.beside_path) if path is not None]
    check_writable(paths, force=args.force)
    engine = engine_for(bundle, args.threads)
    if args.budget_ms is not None:
        given = (args.budget_ms, len(jobs), start, profile)
        recipe = _within_budget(engine, bundle, recipe, *given)
    guidance = _encode(engine, bundle, recipe, args.prompts)
    full = _every_step_full(recipe) if args.compare_full else recipe
    done = [_make(engine, bundle, recipe, full, guidance[job.prompt], job) for job in jobs]
    total_ms = (perf_counter() - start) * 1e3
    _report(args, recipe, jobs, done, total_ms)
    return 0


def _opened(folder: Path, engine: str | None) -> Bundle:
    """Returns the bundle for the engine that is asked for, and warns where it will be slow."""
    bundle = open_bundle(folder)
    if engine is not None:
        bundle = bundle.for_backend(BACKENDS[engine])
    if bundle.manifest.graph("denoise").backend == "coreml" and not has_coreml():
        _warn(
            "this system has no Core ML: a reference interpreter runs the graphs, many times "
            "slower than any device"
        )
    return bundle


def _check_prompts(args: argparse.Namespace, bundle: Bundle) -> None:
    """Refuses prompts where none are taken, and none where they are; leaves one that is empty."""
    manifest = bundle.manifest
    if manifest.guidance == "none":
        if args.prompts or args.negative_prompt:
            raise UsageError(f"{args.bundle} takes no prompts: its model draws what it will")
        args.prompts = [""]
    if not args.prompts:
        raise UsageError("PROMPT is missing: say what to draw")
    if manifest.guidance == "embedded" and args.negative_prompt:
        raise UsageError(
            f"--negative-prompt: {args.bundle} runs its model once a step, guided by the scale "
            "alone; say in the prompt what to draw instead"
        )


def _profile(args: argparse.Namespace, bundle: Bundle) -> DeviceProfile | None:
    """Returns the profile that was given, if any."""
    if args.device_profile is None:
        return None
    if args.budget_ms is None:
        raise UsageError("--device-profile is for --budget-ms: give that too, or leave it out")
    return load_profile(args.device_profile, bundle)


@dataclass(frozen=True, slots=True)
class _Done:
    """What one picture took, in milliseconds of the denoising loop."""

    denoise_ms: float
    full_ms: float | None = None  # with the full graph at every step, if asked for


def _recipe(bundle: Bundle, args: argparse.Namespace) -> _Recipe:
    defaults = bundle.manifest.defaults
    name = defaults.noise_scheduler if args.scheduler is None else args.scheduler
    steps = defaults.steps if args.steps is None else args.steps
    scale = defaults.guidance_scale if args.guidance_scale is None else args.guidance_scale
    noise_scheduler = make_noise_scheduler(name, steps, bundle.manifest.noise_schedule)

    @cache
    def reuse_table() -> ReuseTable:
        try:
            return bundle.reuse_table(name, steps)
        except BundleError as error:
            raise BundleError(f"{error} (--plan full)") from error

    if args.budget_ms is not None:
        undecided = CacheSchedule.all_full(len(noise_scheduler.timesteps))
        choices = bundle.reuse_tables(args.scheduler, args.steps)
        return _Recipe(noise_scheduler, undecided, None, scale, args.negative_prompt, choices)
    plan = args.plan
    if plan is None:
        wanted = max(1, round(defaults.full_steps * steps / defaults.steps))
        few = wanted >= len(noise_scheduler.timesteps)
        plan = "full" if few else f"full-steps:{wanted}"
    schedule = choose_schedule(plan, len(noise_scheduler.timesteps), reuse_table)
    shallow = any(mode.is_shallow for mode in schedule.modes)
    table = reuse_table() if shallow or (name, steps) in bundle.calibrated() else None
    return _with_shares(_Recipe(noise_scheduler, schedule, table, scale, args.negative_prompt))


def _with_shares(recipe: _Recipe) -> _Recipe:
    """Returns the recipe with the shares of forecasts that are best for its plan; without a table,
    or where the plan goes beyond what was measured, as it is."""
    if recipe.reuse_table is None:
        return recipe
    try:
        shares = plan_shares(recipe.reuse_table, recipe.noise_scheduler, recipe.cache_schedule)
    except ScheduleError:
        return recipe
    return replace(recipe, shares=shares)


def _every_step_full(recipe: _Recipe) -> _Recipe:
    full = CacheSchedule.all_full(len(recipe.cache_schedule))
    return _with_shares(replace(recipe, cache_schedule=full))


def _within_budget(
    engine: Engine,
    bundle: Bundle,
    recipe: _Recipe,
    budget_ms: float,
    pictures: int,
    start: float,
    profile: DeviceProfile | None,
) -> _Recipe:
    """Returns the recipe with the best plan for what is left of the budget, once it is known
    how long the graphs take here: from a profile, or measured now."""
    if profile is None:
        profile = measure_graphs(engine, bundle, at_most_s=_MEASURE_S)
    branches = bundle.manifest.branches(recipe.guidance_scale)
    noise_schedule = bundle.manifest.noise_schedule
    frontier = plan_frontier(recipe.choices, profile, branches, noise_schedule)
    spent_ms = (perf_counter() - start) * 1e3
    recipe = _planned(recipe, frontier, budget_ms, spent_ms / pictures, noise_schedule)
    spent_ms += 2 * ((perf_counter() - start) * 1e3 - spent_ms)  # as long again, for a faster plan
    return _planned(recipe, frontier, budget_ms, spent_ms / pictures, noise_schedule)


def _planned(
    recipe: _Recipe,
    frontier: Sequence[Plan],
    budget_ms: float,
    spent_ms: float,
    noise_schedule: NoiseScheduleConfig,
) -> _Recipe:
    """Returns the recipe with the best plan for what is left of a picture's budget."""
    try:
        plan = best_within_ms(frontier, budget_ms - spent_ms)
    except UsageError as error:
        raise UsageError(
            f"--budget-ms is {budget_ms:.0f}, of which loading, measuring and planning took "
            f"{spent_ms:.0f} a picture, and {error}"
        ) from error
    if plan.schedule == recipe.cache_schedule and plan.table is recipe.reuse_table:
        return recipe
    table = plan.table
    noise_scheduler = make_noise_scheduler(table.noise_scheduler, table.steps, noise_schedule)
    planned = replace(
        recipe,
        noise_scheduler=noise_scheduler,
        cache_schedule=plan.schedule,
        reuse_table=table,
    )
    return _with_shares(planned)


def _jobs(args: argparse.Namespace) -> list[_Job]:
    asked = [(p, args.seed + i) for p in args.prompts for i in range(args.num_images)]
    paths = output_paths(args.output, [without_surrogates(prompt) for prompt, _ in asked])
    return [
        _Job(
            prompt,
            seed,
            path,
            path.with_name(f"{path.stem}-beside-full.png") if args.compare_full else None,
        )
        for (prompt, seed), path in zip(asked, paths, strict=True)
    ]


def _encode(
    engine: Engine, bundle: Bundle, recipe: _Recipe, prompts: list[str]
) -> dict[str, Guidance]:
    """Returns each prompt's guidance, and warns of what did not fit."""
    manifest, tokenizers = bundle.manifest, bundle.tokenizers()
    scale, negative = recipe.guidance_scale, None
    if not tokenizers:
        return dict.fromkeys(prompts, guided_by(manifest, {}, None, scale))

    def told(text: str, name: str) -> Context:
        found, cut = encode_prompt(engine, tokenizers, text)
        if cut:
            length = manifest.tokenizers[0].max_length
            _warn(f"the {name} is longer than {length} tokens; this was cut: {_quote(cut)}")
        return found

    if needs_negative(manifest, recipe.negative_prompt, scale):
        negative = told(recipe.negative_prompt, "negative prompt")
    guidance = {p: guided_by(manifest, told(p, "prompt"), negative, scale) for p in prompts}
    engine.unload("encode")
    return guidance


def _make(
    engine: Engine, bundle: Bundle, recipe: _Recipe, full: _Recipe, guidance: Guidance, job: _Job
) -> _Done:
    """Makes and writes one picture, and beside it that of another recipe if it is asked for."""
    for graph in _graphs(recipe):
        engine.load(graph)
    if job.beside_path is not None:
        # the first runs of a graph are slower: they shall not count for either side
        for _ in islice(_loop(engine, bundle, recipe, guidance, job.seed), _WARM_UP_STEPS):
            pass
    loops = [_denoised(engine, bundle, recipe, guidance, job.seed, job.path.stem)]
    if job.beside_path is not None:
        title = f"{job.path.stem}, every step full"
        loops.append(_denoised(engine, bundle, full, guidance, job.seed, title))
    # at 512×512 the decoder needs as much memory as the denoiser: never both
    for graph in _graphs(recipe):
        engine.unload(graph)
    picture, *beside = [decode_latents(engine, latents) for latents, _ in loops]
    engine.unload("decode")
    parameters, record = _parameters(bundle, recipe, job), _record(bundle, recipe, job)
    write_png(picture, job.path, parameters, record)
    if job.beside_path is not None:
        write_png(side_by_side(picture, *beside), job.beside_path, parameters, record)
    return _Done(*(loop_ms for _, loop_ms in loops))


def _graphs(recipe: _Recipe) -> tuple[str, ...]:
    """Returns the graphs of a loop that compares itself with the full graph or does not."""
    shallow = any(mode.is_shallow for mode in recipe.cache_schedule.modes)
    return ("denoise", "denoise_shallow") if shallow else ("denoise",)


def _loop(
    engine: Engine, bundle: Bundle, recipe: _Recipe, guidance: Guidance, seed: int
) -> Iterator[StepRecord]:
    size = bundle.manifest.latents
    noise_scheduler = recipe.noise_scheduler
    shape = (size.channels, size.height, size.width)
    noise = noises(shape, seed)
    latents = next(noise) * np.float32(noise_scheduler.init_noise_sigma)
    given = (latents, guidance, recipe.reuse_table, noise, recipe.shares)
    return denoise(engine, noise_scheduler, recipe.cache_schedule, *given)


def _denoised(
    engine: Engine, bundle: Bundle, recipe: _Recipe, guidance: Guidance, seed: int, title: str
) -> tuple[NDArray[np.float32], float]:
    """Returns a loop's last latents and its milliseconds."""
    records = _loop(engine, bundle, recipe, guidance, seed)
    elapsed_ms, latents = 0.0, None
    for record in tqdm(records, title, len(recipe.cache_schedule.modes), unit="step"):
        elapsed_ms, latents = elapsed_ms + record.elapsed_ms, record.latents
    if latents is None or not np.isfinite(latents).all():
        raise BundleError(
            f"seed {seed}: the loop's latents are not finite numbers: the guidance scale "
            f"({recipe.guidance_scale:g}) is too large, or the bundle's graphs are broken"
        )
    return latents, elapsed_ms


def _record(bundle: Bundle, recipe: _Recipe, job: _Job) -> dict[str, object]:
    """Returns all that decides the picture, and nothing that changes from run to run."""
    return {
        "prompt": job.prompt,
        "negative_prompt": recipe.negative_prompt,
        "seed": job.seed,
        "steps": recipe.noise_scheduler.steps,
        "guidance_scale": recipe.guidance_scale,
        "noise_scheduler": recipe.noise_scheduler.name,
        "plan": recipe.cache_schedule.to_string(),
        "bundle": bundle.manifest.name,
        "cq_edge_version": bundle.manifest.cq_edge_version,
    }


def _parameters(bundle: Bundle, recipe: _Recipe, job: _Job) -> str:
    """Returns the same for people, in the form that picture viewers of the field read."""
    negative, size = recipe.negative_prompt, bundle.manifest.image_px
    lines = [job.prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    lines.append(
        f"Steps: {recipe.noise_scheduler.steps}, Sampler: {recipe.noise_scheduler.name}, "
        f"CFG scale: {recipe.guidance_scale:g}, Seed: {job.seed}, "
        f"Size: {size.width}x{size.height}, Model: {bundle.manifest.name}, "
        f"Plan: {recipe.cache_schedule.to_string()}"
    )
    return without_surrogates("\n".join(lines))


def _report(
    args: argparse.Namespace, recipe: _Recipe, jobs: list[_Job], done: list[_Done], total_ms: float
) -> None:
    counts = recipe.cache_schedule.counts
    ours_ms = sum(each.denoise_ms for each in done)
    full_ms = sum(each.full_ms for each in done if each.full_ms is not None)
    beside = [str(job.beside_path) for job in jobs if job.beside_path is not None]
    if not args.json:
        schedule = recipe.cache_schedule
        plan = [f"{count} {mode}" for mode, count in counts.items() if count]
        plan += [f"{schedule.unguided} of them unguided"] if schedule.unguided else []
        plan += [f"{schedule.repeated} of them repeated"] if schedule.repeated else []
        print(f"plan: {', '.join(plan)} ({schedule.to_string()})")
        for job, each in zip(jobs, done, strict=True):
            print(f"{job.path}  seed {job.seed}, denoised in {each.denoise_ms:.0f} ms")
        if beside:
            print(
                f"denoising: {ours_ms:.0f} ms; the full graph at every step: {full_ms:.0f} ms, "
                f"{full_ms / ours_ms:.2f} times as long"
            )
            print(f"side by side: {', '.join(beside)}")
        return
    result: dict[str, object] = {
        "images": [str(job.path) for job in jobs],
        "seed": args.seed,
        "plan": counts,
        "unguided": recipe.cache_schedule.unguided,
        "repeated": recipe.cache_schedule.repeated,
        "steps": recipe.noise_scheduler.steps,
        "denoise_ms": round(ours_ms, 3),
        "total_ms": round(total_ms, 3),
        "peak_memory_mib": round(peak_memory_mib(), 1),
    }
    if beside:
        result["compare_full"] = {
            "images": beside,
            "denoise_ms": round(full_ms, 3),
            "speedup": round(full_ms / ours_ms, 3),
        }
    print(json.dumps(result))


def _quote(cut: str) -> str:
    if len(cut) <= _LONGEST_QUOTE:
        return f'"{cut}"'
    return f'"{cut[:_LONGEST_QUOTE]}…" ({len(cut)} characters)'


def _warn(sentence: str) -> None:
    print(f"cq-edge: warning: {sentence}", file=sys.stderr)
