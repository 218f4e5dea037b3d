"""The project and its rivals on the same UNet, noise, embeddings, steps, guidance and threads.

Every contender runs in a process of its own; they take turns, loop by loop. Embeddings are made
and latents decoded once for all, in float32, so that the UNets alone differ. A contender that
cannot be installed, converted or run is a row with its reason.

    pip install -r benchmarks/rivals-requirements.txt     # into an environment that has cq-edge
    cq-edge build -o out/evaluate/bundle --compression 4.1
    cq-edge build -o out/evaluate/float32 --quantization none
    python -m benchmarks.rivals                           # writes docs/benchmarks.md and .json
    python -m benchmarks.rivals --only cq-edge OpenVINO   # those whose names begin so

For a model of Stable Diffusion's size, cut the loops short and load one at a time:

    python -m benchmarks.rivals --name sd15 --model sd15 --bundle sd15-int8 --float32 none
        --noise-scheduler ddim --steps 4 --first-steps 2 --whole-steps 50 --plan uniform:5
        --calibration-captions 1 --rounds 2 --one-at-a-time --work out/rivals/sd15
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.page_section import write_section
from benchmarks.rivals.alternate import Result, prepare_all, take_turns
from benchmarks.rivals.busy import BusyCores
from benchmarks.rivals.contenders import CONTENDERS, REFERENCE
from benchmarks.rivals.plan_for_speedup import plan_for_speedup
from benchmarks.rivals.processes import Place
from benchmarks.rivals.quality import Decoder, Quality, compare
from benchmarks.rivals.table import markdown, rows
from benchmarks.rivals.task import FloatArray, Task
from cq_edge.errors import CQEdgeError, UsageError
from cq_edge.model.load import DEMO_MODEL
from cq_edge.model.scorer import DEMO_SCORER, Scorer
from cq_edge.scenes import scenes
from runtime.conditions import processor

_SCENES_SEED = 50_000_001
_BUNDLES = Path("out/evaluate")


def main() -> None:
    """Prepares, measures, compares, writes."""
    args = _parser().parse_args()
    names = _chosen(args.only)
    if args.cores is not None:
        os.sched_setaffinity(0, args.cores)  # the contenders inherit it
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=args.prepared)
    task = _task(args)
    place = Place(args.work / "task.json", args.work, args.threads, args.at_most_s)
    task.write(place.task)
    results = prepare_all(place, names)
    if args.prepare_only:
        return
    busy, steps = BusyCores(), args.first_steps or len(task.timesteps)
    take_turns(place, results, args.rounds, steps, keep=not args.one_at_a_time)
    conditions = _conditions(args, task, steps, busy.others())
    total = len(task.whole_timesteps)
    qualities = _qualities(results, task, args.scorer, whole=steps == total)
    report = {"conditions": conditions, "rows": rows(results, qualities, total)}
    text = markdown(report)
    args.docs.mkdir(parents=True, exist_ok=True)
    path = args.docs / f"rivals_{args.name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_section(args.docs / "benchmarks.md", args.name, text)
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rivals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--name", default="demo", help="of the section (default: %(default)s)")
    add("--model", type=Path, default=DEMO_MODEL, help="a diffusers folder (default: the demo's)")
    add("--bundle", type=_folder, default=_BUNDLES / "bundle", help="its int8 bundle, or none")
    add("--float32", type=_folder, default=_BUNDLES / "float32", help="its float32 one, or none")
    add("--plan", help="of both bundles, as of `cq-edge generate` (default: for the speed-ups)")
    add("--speedup", type=float, default=5.18, metavar="X", help="of the int8 bundle's planned "
        "loop over the float32 one's, every step full (default: %(default)s)")  # fmt: skip
    add("--float32-speedup", type=float, default=1.6, metavar="X", help="of the float32 bundle's, "
        "likewise (default: %(default)s)")  # fmt: skip
    add("--noise-scheduler", choices=["pndm", "ddim"], default="pndm", help="(default: "
        "%(default)s)")  # fmt: skip
    add("--steps", type=int, default=50, help="of the noise scheduler (default: %(default)s)")
    add("--first-steps", type=int, metavar="N", help="run so many and predict the loop from them")
    add("--whole-steps", type=int, metavar="N", help="predict a loop of so many steps")
    add("--guidance", type=float, default=3.5, help="(default: %(default)s)")
    add("--calibration-captions", type=int, default=6, metavar="N", help="whose loops the rivals "
        "calibrate 8-bit activations by (default: %(default)s)")  # fmt: skip
    add("--rounds", type=int, default=10, help="loops of each (default: %(default)s)")
    add("--threads", type=int, default=1, help="of each (default: %(default)s)")
    add("--cores", type=int, nargs="+", metavar="C", help="to run on (default: all)")
    add("--scorer", type=_folder, default=DEMO_SCORER, help="a CLIP model, or none")
    add("--only", nargs="+", metavar="NAME", help="contenders of these names, or whose "
        "names begin so")  # fmt: skip
    add("--one-at-a-time", action="store_true", help="never have two models in memory")
    add("--prepare-only", action="store_true", help="convert the models and stop")
    add("--prepared", action="store_true", help="keep what --work holds of an earlier run")
    add("--at-most-s", type=float, default=900.0, help="to prepare, load or run a contender once "
        "(default: %(default)s)")  # fmt: skip
    add("--work", type=Path, default=Path("out/rivals"), help="a new folder for converted models "
        "and logs (default: %(default)s)")  # fmt: skip
    add("--docs", type=Path, default=Path("docs"))
    return parser


def _folder(text: str) -> Path | None:
    return None if text == "none" else Path(text)


def _chosen(wanted: Sequence[str] | None) -> list[str]:
    """Returns the contenders of these names, or whose names begin so, and the reference."""
    found = {REFERENCE}
    for text in wanted or [""]:
        matching = {text} if text in CONTENDERS else {n for n in CONTENDERS if n.startswith(text)}
        if not matching:
            raise UsageError(f"no contender's name begins with {text!r}: {'; '.join(CONTENDERS)}")
        found |= matching
    return [name for name in CONTENDERS if name in found]


def _task(args: argparse.Namespace) -> Task:
    world = scenes(_SCENES_SEED, held_out=True)
    prompts = tuple(scene.caption() for scene in islice(world, args.rounds))
    others = tuple(scene.caption() for scene in islice(world, args.calibration_captions))
    embeddings = args.work / "embeddings.npz"
    _embed(args.model, (*prompts, *others), embeddings)
    plan = float32_plan = args.plan or "full"
    if args.plan is None and None not in (args.float32, args.bundle):
        side = (args.noise_scheduler, args.steps, args.threads)
        plan = plan_for_speedup(args.float32, args.bundle, args.speedup, *side)
        float32_plan = plan_for_speedup(args.float32, args.float32, args.float32_speedup, *side)
    return Task(
        pipeline=args.model,
        float32=args.float32,
        bundle=args.bundle,
        plan=plan,
        float32_plan=float32_plan,
        prompts=prompts,
        calibration_prompts=others,
        calibration_steps=args.first_steps or args.steps,
        noise_scheduler=args.noise_scheduler,
        steps=args.steps,
        whole_steps=args.whole_steps or args.steps,
        guidance=args.guidance,
        threads=args.threads,
        embeddings=embeddings,
    )


def _embed(model: Path, prompts: Sequence[str], path: Path) -> None:
    """Writes the embeddings of the prompts and of the empty one."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(model / "tokenizer"))
    encoder = CLIPTextModel.from_pretrained(str(model / "text_encoder"), dtype=torch.float32).eval()

    def embed(texts: Sequence[str]) -> FloatArray:
        ids = tokenizer(
            list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            found: FloatArray = encoder(ids).last_hidden_state.numpy()
        return found

    np.savez(path, prompts=embed(prompts), negative=embed([""]))


def _qualities(
    results: Sequence[Result], task: Task, scorer_folder: Path | None, *, whole: bool
) -> dict[str, Quality]:
    """Returns how close each is to the reference; pictures are looked at if loops were whole."""
    reference = next(r for r in results if r.name == REFERENCE)
    if reference.failure is not None:
        return {}
    scorer = Scorer.load(scorer_folder) if whole and scorer_folder is not None else None
    decoder = Decoder(task.pipeline / "vae") if whole else None
    expected = None if decoder is None else decoder.pictures(reference.latents)
    found = {}
    for result in results:
        if result is reference or result.failure is not None or not result.latents:
            continue
        pictures = None
        if decoder is not None and expected is not None:
            pictures = expected, decoder.pictures(result.latents)
        found[result.name] = compare(
            reference.latents, result.latents, pictures, task.prompts, scorer
        )
    return found


def _conditions(
    args: argparse.Namespace, task: Task, steps: int, other_cores: float
) -> dict[str, Any]:
    shape = "×".join(str(size) for size in task.latents(0).shape[1:])
    return {
        "processor": processor(),
        "threads": args.threads,
        "cores": args.cores,
        "other_cores_busy": other_cores,
        "model": f"{args.name} model",
        "latents": shape,
        "noise_scheduler": task.noise_scheduler,
        "steps": task.whole_steps,
        "steps_of_loop": len(task.whole_timesteps),
        "steps_run": steps,
        "guidance": task.guidance,
        "plan": task.plan,
        "float32_plan": task.float32_plan,
        "rounds": args.rounds,
        "calibration_captions": args.calibration_captions,
        "kept_loaded": not args.one_at_a_time,
        "prompts": asdict(task)["prompts"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    try:
        main()
    except CQEdgeError as error:
        raise SystemExit(f"error: {error}") from error
