r"""How many points of CLIP score a bundle's plan costs, over tens of thousands of captions.

What `cq-edge evaluate` finds over some hundred captions has an interval wider than what it is to
show. Here the bundle draws more of the same captions and seeds, with the plan that an evaluation
ran, in a process per core, and the exported float32 graphs draw the same. That takes hours: scores
are added to a file, a line for some captions, and the next run, of another plan or on another
machine too, goes on after the last caption that the file has. The interval is then that of all its
runs; each run has its own beside it.

    python -m benchmarks.clip_interval out/evaluate/bundle --reference out/evaluate/float32 \
        --evaluation docs/evaluation.json --scores out/clip_scores.jsonl --captions 10000 \
        --json out/clip_scores.json

With `--device cuda` the model itself draws float32's pictures, in torch, in batches.

Where float32's mean over the captions is known of an earlier run, whatever its plan, `--ours-alone`
draws the bundle's pictures alone, in a third of the time. `--known` then tells how far their mean
is from that one. Captions with both scores still decide the interval's width, which narrows with
the root of the captions:

    python -m benchmarks.clip_interval out/evaluate/bundle --reference out/evaluate/float32 \
        --evaluation docs/evaluation.json --scores docs/clip_scores.jsonl --captions 15232 \
        --ours-alone --known docs/clip_interval.json --json docs/clip_scores.json

`--float32-of FILE` draws the bundle's pictures alone, too, and takes float32's scores from the runs
of another plan in FILE, as far as they go: both scores are then known without drawing float32.
"""

import argparse
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from itertools import count, islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from apps.clip_difference import clip_difference
from apps.draw_captions import find_or_draw, picture_of
from apps.engines import engine_for
from apps.evaluate import SCENES_SEED, require_same_model
from apps.in_processes import in_processes
from apps.kept_pictures import KeptPictures
from apps.model_options import DEMO_NAME
from cq_edge import __version__
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import UsageError
from cq_edge.metrics import finite_psnr_db
from cq_edge.model.graphs import DecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.scorer import Scorer
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle
from runtime.conditions import cores, machine_conditions
from runtime.draw import Method, planned
from runtime.generate import initial_latents

_CHUNK = 16
"""Captions that a process draws at a time."""
_NOT_DRAWN = "not drawn"


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Captions, whose seeds count on from the first one's, with float32's pictures of them where
    torch draws those."""

    first_seed: int
    captions: list[str]
    pictures: NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """(N,) of captions: both CLIP scores, and in dB how near ours is to float32's picture; NaN
    what is not known, as float32 was not drawn."""

    float32: NDArray[np.float64]
    ours: NDArray[np.float64]
    psnr_db: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence["_Scores"]) -> "_Scores":
        """Returns all captions' scores, in order."""
        given = ([getattr(part, f.name) for part in parts] for f in fields(cls))
        return cls(*(np.concatenate([np.zeros(0), *arrays]) for arrays in given))


def main() -> None:
    """Draws both sides until all captions or the time are done, prints and writes the interval."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--evaluation", type=Path, required=True, help="whose plan `ours` is run")
    parser.add_argument("--scores", type=Path, required=True, metavar="FILE", help="JSON lines to "
        "go on with, made where there is none")  # fmt: skip
    parser.add_argument("--captions", type=int, default=10_000, help="that FILE is to have then")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep pictures there and draw "
        "none of them again, as `evaluate` does")  # fmt: skip
    parser.add_argument("--known", type=Path, metavar="FILE", help="the result of a run over the "
        "same captions, whose mean of float32 ours is compared with")  # fmt: skip
    parser.add_argument("--at-most-s", type=float, default=float("inf"), help="then stop")
    by = parser.add_mutually_exclusive_group()
    by.add_argument("--device", help="of torch, to draw float32's pictures there")
    by.add_argument("--ours-alone", action="store_true", help="do not draw float32's")
    by.add_argument("--float32-of", type=Path, metavar="FILE", help="do not draw them, and take "
        "their scores from another plan's --scores, as far as those go")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256, help="captions at once on --device")
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--json", type=Path, help="write the result for programs")
    args = parser.parse_args()
    bundle, reference = open_bundle(args.bundle), open_bundle(args.reference)
    if bundle.manifest.name != DEMO_NAME:
        raise UsageError(
            f"{args.bundle} is of {bundle.manifest.name}: only the demo model is drawn"
        )
    require_same_model(reference, bundle)
    plan, first = _plan(args.evaluation), _count(_read(args.scores))
    if first < args.captions:
        run, chunks = _run(args, bundle, reference, plan), _chunks(bundle, first, args)
        drawn = _drawn(chunks, args, plan)
        if args.float32_of is not None:
            drawn = _compared(drawn, first, _float32_of(args.float32_of, run))
        with (
            suppress(KeyboardInterrupt),
            closing(drawn),
            closing(tqdm(total=args.captions, initial=first, unit="caption")) as bar,
        ):
            for scores in _added(args.scores, run, first, drawn):
                bar.update(len(scores.ours))
    runs = _read(args.scores)
    result = _result(runs)
    if args.known is not None:
        known = json.loads(args.known.read_text(encoding="utf-8"))
        ours = np.concatenate([scores.ours for _, scores in runs])
        result["known"] = _against_known(ours, result, known["captions"], known["clip_float32"])
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _plan(evaluation: Path) -> dict[str, Any]:
    variants = json.loads(evaluation.read_text(encoding="utf-8"))["variants"]
    plan: dict[str, Any] = next(v["plan"] for v in variants if v["name"] == "ours")
    return plan


def _chunks(bundle: Bundle, first: int, args: argparse.Namespace) -> Iterator[_Chunk]:
    """Yields the captions from the first one on, with torch's pictures if it is to draw them."""
    world = islice(scenes(SCENES_SEED, held_out=True), first, args.captions)
    captions = (scene.caption() for scene in world)
    if args.device is not None:
        yield from _float32(bundle, captions, first, torch.device(args.device), args.batch)
        return
    for seed in count(first, _CHUNK):
        told = list(islice(captions, _CHUNK))
        if not told:
            return
        yield _Chunk(seed, told)


def _drawn(
    chunks: Iterator[_Chunk], args: argparse.Namespace, plan: dict[str, Any]
) -> Generator[_Scores, None, None]:
    """Yields what is found, chunk by chunk in order, until the time is over."""
    until = monotonic() + args.at_most_s
    alone = args.device is not None or args.ours_alone or args.float32_of is not None
    reference = None if alone else args.reference
    started = (args.bundle, reference, plan, args.keep)
    _Process(*started)  # says here what is missing
    with closing(in_processes(_compare, chunks, args.processes, _begin, *started)) as compared:
        for found in compared:
            yield found
            if monotonic() > until:
                return


def _float32_of(file: Path, here: dict[str, Any]) -> NDArray[np.float64]:
    """Returns (N,) scores of float32's pictures in a file; NaN where they were not drawn.

    Raises:
        UsageError: There is no such file, or they are not what the run here would draw.
    """
    runs = _read(file)
    if not runs:
        raise UsageError(f"{file} has no scores")
    for run, _ in runs:
        for name in ("float32", "guidance_scale", "engine"):
            if run[name] not in (here[name], _NOT_DRAWN):
                raise UsageError(
                    f"float32's scores in {file} differ in {name} ({run[name]}, here {here[name]})"
                )
    return _Scores.joined([scores for _, scores in runs]).float32


def _compared(
    drawn: Iterable[_Scores], first: int, float32: NDArray[np.float64]
) -> Generator[_Scores, None, None]:
    """Yields what was drawn from caption `first` on, with float32's scores where all are known."""
    for scores in drawn:
        known = float32[first : first + len(scores.ours)]
        first += len(scores.ours)
        yield replace(scores, float32=known) if len(known) == len(scores.ours) else scores


@torch.no_grad()
def _float32(
    bundle: Bundle, captions: Iterator[str], first: int, device: torch.device, batch: int
) -> Iterator[_Chunk]:
    """Yields the demo model's own pictures of the captions, every step full, from seed `first`."""
    torch.backends.cudnn.allow_tf32 = False  # which rounds to 11 bits
    defaults, size = bundle.manifest.defaults, bundle.manifest.latents
    pipeline = load_pipeline().to(device)
    decode = DecodeGraph(pipeline.vae)
    noise_scheduler = make_noise_scheduler(
        defaults.noise_scheduler, defaults.steps, bundle.manifest.noise_schedule
    )
    (tokenizer,) = bundle.tokenizers()

    def embeddings(texts: list[str]) -> torch.Tensor:
        ids = np.concatenate([tokenizer.encode(text)[0] for text in texts])
        hidden: torch.Tensor = pipeline.text_encoder(torch.from_numpy(ids).to(device))[0]
        return hidden

    nothing = embeddings([""])
    for seed in count(first, batch):
        told = list(islice(captions, batch))
        if not told:
            return
        seeds = range(seed, seed + len(told))
        both = torch.cat([nothing.expand(len(told), -1, -1), embeddings(told)])
        shape = (size.channels, size.height, size.width)
        starts = [initial_latents(shape, s, noise_scheduler.init_noise_sigma) for s in seeds]
        latents, history = torch.from_numpy(np.concatenate(starts)).to(device), ()
        for step, timestep in enumerate(noise_scheduler.timesteps):
            seen = noise_scheduler.model_input(latents, step).repeat(2, 1, 1, 1)
            predicted = pipeline.unet(seen, float(timestep), encoder_hidden_states=both)
            negative, prompt = predicted.sample.chunk(2)
            guided = negative + defaults.guidance_scale * (prompt - negative)
            latents, history = noise_scheduler.advance(latents, guided, step, history)
        levels = (decode(latents) * 255).round().to(torch.uint8)
        pictures = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        for start in range(0, len(told), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield _Chunk(seed + start, told[part], pictures[part])


class _Process:
    """What a process draws and judges with."""

    def __init__(
        self, folder: Path, reference: Path | None, plan: dict[str, Any], keep: Path | None
    ) -> None:
        bundle = open_bundle(folder)
        table = bundle.reuse_table(plan["noise_scheduler"], plan["steps"])
        schedule = CacheSchedule.from_string(plan["modes"])
        self._ours = planned(bundle, engine_for(bundle, 1), table, schedule)
        self._float32 = None if reference is None else _every_step_full(open_bundle(reference))
        self._scorer = Scorer.load()
        self._kept = None if keep is None else KeptPictures(keep)

    def compare(self, chunk: _Chunk) -> _Scores:
        """Draws a chunk's captions, float32's too where torch did not and there is a reference,
        and compares."""
        ours, float32 = self._pictures(self._ours, chunk), chunk.pictures
        if float32 is None and self._float32 is not None:
            float32 = self._pictures(self._float32, chunk)
        if float32 is None:
            nothing = np.full(len(ours), np.nan)
            return _Scores(nothing, self._scorer.clip_scores(ours, chunk.captions), nothing)
        return _Scores(
            self._scorer.clip_scores(float32, chunk.captions),
            self._scorer.clip_scores(ours, chunk.captions),
            np.array([finite_psnr_db(*pair) for pair in zip(float32, ours, strict=True)]),
        )

    def _pictures(self, method: Method, chunk: _Chunk) -> NDArray[np.uint8]:
        prompts = enumerate(chunk.captions, start=chunk.first_seed)
        found = (find_or_draw(method, caption, seed, self._kept) for seed, caption in prompts)
        return np.stack([*map(picture_of, found)])


def _every_step_full(bundle: Bundle) -> Method:
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    full = CacheSchedule.all_full(len(table.timesteps))
    return Method(bundle, engine_for(bundle, 1), defaults.steps, full, None)


_process: _Process


def _begin(folder: Path, reference: Path | None, plan: dict[str, Any], keep: Path | None) -> None:
    global _process
    torch.set_num_threads(1)
    _process = _Process(folder, reference, plan, keep)


def _compare(chunk: _Chunk) -> _Scores:
    return _process.compare(chunk)


def _added(
    file: Path, run: dict[str, Any], first: int, found: Iterable[_Scores]
) -> Iterator[_Scores]:
    """Adds a run's scores to a file as they come, from caption `first` on, and yields them."""
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        for number, scores in enumerate(found):
            if number == 0:
                print("\n" * torn + json.dumps({"run": run}), file=lines)
            arrays = {f.name: getattr(scores, f.name) for f in fields(scores)}
            drawn = {k: x.round(3).tolist() for k, x in arrays.items() if np.isfinite(x).all()}
            print(json.dumps({"first": first} | drawn), file=lines, flush=True)
            first += len(scores.ours)
            yield scores


def _read(file: Path) -> list[tuple[dict[str, Any], _Scores]]:
    """Returns each run of a file with what it found; nothing where there is no file. A line that a
    killed run left torn counts for nothing.

    Raises:
        UsageError: A line's captions do not follow those before it.
    """
    runs: list[tuple[dict[str, Any], list[_Scores]]] = []
    captions = 0
    for number, line in enumerate(file.read_text("utf-8").splitlines() if file.exists() else (), 1):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if "run" in found:
            runs.append((found["run"], []))
            continue
        if found.pop("first") != captions or not runs:
            raise UsageError(
                f"{file}, line {number}: captions from {captions} on are missing or stand twice"
            )
        nothing = np.full(len(found["ours"]), np.nan)
        scores = _Scores(*(np.array(found.get(f.name, nothing)) for f in fields(_Scores)))
        captions += len(scores.ours)
        runs[-1][1].append(scores)
    return [(run, _Scores.joined(parts)) for run, parts in runs if parts]


def _count(runs: Sequence[tuple[dict[str, Any], _Scores]]) -> int:
    """Returns how many captions there are."""
    return sum(len(scores.ours) for _, scores in runs)


def _result(runs: Sequence[tuple[dict[str, Any], _Scores]]) -> dict[str, Any]:
    """Returns the interval over all captions, and over those of each run.

    Raises:
        UsageError: There are none.
    """
    if not runs:
        raise UsageError("no caption was drawn: there is no interval")
    everything = _interval(_Scores.joined([scores for _, scores in runs]))
    return everything | {"runs": [_interval(scores) | run for run, scores in runs]}


def _interval(scores: _Scores) -> dict[str, Any]:
    """Returns what the captions with both scores tell; of others ours' mean alone."""
    both = np.isfinite(scores.float32)
    if not both.any():
        return {"captions": len(scores.ours), "clip_ours": float(scores.ours.mean())}
    float32, ours = scores.float32[both], scores.ours[both]
    psnr_db = float(scores.psnr_db[both].mean())
    return {
        "captions": len(ours),
        "clip_float32": float(float32.mean()),
        "clip_ours": float(ours.mean()),
        **clip_difference(ours - float32),
        "clip_delta_sd": float((ours - float32).std()),
        **({"psnr_db": psnr_db} if np.isfinite(psnr_db) else {}),
    }


def _against_known(
    ours: NDArray[np.float64], result: dict[str, Any], captions: int, clip_float32: float
) -> dict[str, Any]:
    """Returns how far ours' mean over so many captions is from float32's, known of another run.

    The mean of the differences is the difference of the means, whoever drew float32; what the
    differences scatter by is that of the captions with both scores, which the result tells.

    Raises:
        UsageError: There are fewer captions, or none has both scores.
    """
    if len(ours) < captions:
        raise UsageError(
            f"{len(ours)} captions are drawn, and float32's mean is known over {captions}: run "
            "this again to draw the rest"
        )
    if "clip_delta" not in result:
        raise UsageError("no caption has both scores: nothing tells how they scatter")
    clip_ours = float(ours[:captions].mean())
    delta, narrower = clip_ours - clip_float32, (result["captions"] / captions) ** 0.5
    return {
        "captions": captions,
        "clip_float32": clip_float32,
        "clip_ours": clip_ours,
        "clip_delta": delta,
        "clip_delta_ci": [
            delta + narrower * (end - result["clip_delta"]) for end in result["clip_delta_ci"]
        ],
        "captions_with_both": result["captions"],
    }


def _run(
    args: argparse.Namespace, bundle: Bundle, reference: Bundle, plan: dict[str, Any]
) -> dict[str, Any]:
    """Returns what a run's scores follow from."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    by_torch = f"the model in torch {torch.__version__} on {device}"
    by_graphs = f"graphs {reference.graphs_sha256()}"
    drawn_by = by_torch if args.device is not None else by_graphs
    if args.ours_alone:
        drawn_by = _NOT_DRAWN
    return {
        "plan": plan,
        "ours": f"graphs {bundle.graphs_sha256()}",
        "float32": drawn_by,
        "cq_edge": __version__,
        **bundle.manifest.conditions,
        "guidance_scale": bundle.manifest.defaults.guidance_scale,
        **machine_conditions(bundle.manifest.graph("denoise").backend, 1),
        "processes": args.processes,
        **({} if args.float32_of is None else {"float32_of": str(args.float32_of)}),
        "confidence": "95 %, paired bootstrap",
    }


if __name__ == "__main__":
    main()
