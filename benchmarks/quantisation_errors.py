"""What of a quantised full graph's error corrections by channel could take away, and several runs.

Runs captions that calibration never saw with the float32 graph at every step, and the quantised
graphs on the same latents, and on latents moved apart as in steps that are full several times. A
gain and an offset of each channel of the guided noise prediction are fitted at every step on half
of the captions, and tried on the other half:

    make evaluate
    python -m benchmarks.quantisation_errors --reference out/evaluate/float32
        out/evaluate/bundle out/evaluate/small       # writes docs/quantisation_errors.md
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from apps.engines import engine_for
from benchmarks.full_loop import full_graph, full_loop, prompt_contexts
from cq_edge.model.trajectory import FullGraph, Loop, Prompt, Visit
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle
from runtime.denoise import moved_apart

_SCENES_SEED = 60_000_001
_PARTS = 3
Runs = NDArray[np.float64]
"""(captions, T, 4, h, w): the guided noise prediction at every step."""
Repeats = NDArray[np.float64]
"""(captions, T, 3, 4, h, w): of one run, and the means of two and of four."""


def main() -> None:
    """Runs the captions and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--captions", type=int, default=24, help="each with its own seed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    reference, *bundles = map(open_bundle, [args.reference, *args.bundles])
    captions = [s.caption() for s in islice(scenes(_SCENES_SEED, held_out=True), args.captions)]
    exact, quantised = _run(reference, bundles, captions, args.threads)
    text = _table(exact, dict(zip(args.bundles, zip(bundles, quantised, strict=True), strict=True)))
    (args.docs / "quantisation_errors.md").write_text(text, encoding="utf-8")
    print(text)


def _run(
    reference: Bundle, bundles: Sequence[Bundle], captions: Sequence[str], threads: int | None
) -> tuple[Runs, list[Repeats]]:
    """Returns the float32 predictions, and each bundle's on the same latents."""
    engine = engine_for(reference, threads)
    graphs = [full_graph(engine_for(bundle, threads), bundle) for bundle in bundles]
    loop = full_loop(engine, reference)
    exact: list[list[NDArray[np.float64]]] = []
    found: list[list[list[NDArray[np.float64]]]] = [[] for _ in graphs]
    for number, caption in enumerate(tqdm(captions, desc="captions")):
        prompt = prompt_contexts(engine, reference, caption)
        exact.append([])
        for runs in found:
            runs.append([])
        for visit in loop.run(number, prompt):
            exact[-1].append(visit.noise_pred[0].double().numpy())
            for graph, runs in zip(graphs, found, strict=True):
                runs[-1].append(_repeated(graph, loop, visit, prompt))
    return np.array(exact), [np.array(runs) for runs in found]


def _repeated(graph: FullGraph, loop: Loop, visit: Visit, prompt: Prompt) -> NDArray[np.float64]:
    """Returns (3, 4, h, w): a step's guided noise prediction, and the means of several runs'."""
    moved = map(torch.from_numpy, moved_apart(visit.seen.numpy(), visit.step, 4))
    once, *runs = (
        loop.guided([graph(x, visit.timestep, *given)[0] for given in loop.branches(prompt)])
        for x in (visit.seen, *moved)
    )
    of_two, of_four = (torch.stack(several).mean(dim=0) for several in (runs[:2], runs))
    return torch.cat([once, of_two, of_four]).double().numpy()


def _table(exact: Runs, quantised: dict[Path, tuple[Bundle, Repeats]]) -> str:
    lines = [
        "| bundle | smaller than float32 | steps | error, dB | left by offsets | by both "
        "| like the step before's | left by two runs | by four |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for path, (bundle, repeats) in quantised.items():
        smaller = float(bundle.manifest.conditions["unet_compression"])
        for steps in np.array_split(np.arange(exact.shape[1]), _PARTS):
            right, wrong = exact[:, steps], repeats[:, steps, 0]
            error, *several = np.square(repeats[:, steps] - right[:, :, None]).mean((0, 1, 3, 4, 5))
            left = [_left(right, wrong, gains=gains) / error for gains in (False, True)]
            error_db = 10 * np.log10(np.square(right).mean() / error)
            lines.append(
                f"| {path.name} | {smaller:.2f} | {steps[0] + 1} to {steps[-1] + 1} | "
                f"{error_db:.1f} | {left[0]:.1%} | {left[1]:.1%} | {_alike(wrong - right):.2f} | "
                f"{several[0] / error:.0%} | {several[1] / error:.0%} |"
            )
    return "\n".join(
        [
            *lines,
            "",
            "The guided noise prediction of the quantised full graph against float32's on the same "
            "latents: signal over error, and the share of the error's power that is left when an "
            "offset, or a gain and an offset, of each channel at each step are taken from the "
            f"other half of {len(exact)} held-out captions and seeds. Above 100 %: what was fitted "
            "does not carry over. Then the correlation of the error with that of the step before, "
            "and the share of its power that the mean of several runs leaves, as a plan's repeated "
            f"steps have it (D, Q). torch {torch.__version__}.",
            "",
        ]
    )


def _alike(errors: Runs) -> float:
    """Returns the mean correlation of a step's errors with those of the step before."""
    before, after = errors[:, :-1], errors[:, 1:]
    pixels = (0, 2, 3, 4)
    power = np.square(before).sum(axis=pixels) * np.square(after).sum(axis=pixels)
    return float(((before * after).sum(axis=pixels) / np.sqrt(power)).mean())


def _left(right: Runs, wrong: Runs, *, gains: bool) -> float:
    """Returns the mean squared error that a correction leaves, each half's fitted on the other."""
    halves = [slice(0, len(right) // 2), slice(len(right) // 2, None)]
    left = []
    for fitted, tried in (halves, halves[::-1]):
        x, y = (np.moveaxis(runs[fitted], 0, 2) for runs in (wrong, right))  # (T, 4, N, h, w)
        means = [v.mean(axis=(2, 3, 4), keepdims=True) for v in (x, y)]
        x, y = x - means[0], y - means[1]
        gain = (x * y).sum(axis=(2, 3, 4)) / np.square(x).sum(axis=(2, 3, 4))
        gain = gain if gains else np.ones_like(gain)
        offset = means[1][..., 0, 0, 0] - gain * means[0][..., 0, 0, 0]
        found = gain[..., None, None] * wrong[tried] + offset[..., None, None]
        left.append(np.square(found - right[tried]).mean())
    return float(np.mean(left))


if __name__ == "__main__":
    main()
