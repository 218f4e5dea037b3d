"""How far cached features and noise predictions go on as they changed last.

Runs captions that calibration never saw with the full graph at every step, and forecasts each
step's guided noise prediction, and its cached features, from steps before it that lie evenly. Then
draws the captions with every n-th step full, and others shallow or skipped whose forecasts go on
less and further than the bundle's table says:

    cq-edge build -o out/demo/bundle
    cq-edge build -o out/demo/float32 --quantization none
    python -m benchmarks.forecasts out/demo/bundle --reference out/demo/float32

writes docs/forecasts.md.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.engines import engine_for
from apps.evaluate import require_same_model
from benchmarks.full_loop import full_loop, prompt_contexts
from cq_edge.cache_schedule import CacheSchedule, Mode
from cq_edge.forecast import Forecast, Weights
from cq_edge.metrics import finite_psnr_db
from cq_edge.model.capture import MAX_SKIP
from cq_edge.reuse_table import ReuseTable
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle
from runtime.draw import Method, draw
from runtime.engine import Engine

_SCENES_SEED = 50_000_001
_ORDERS = {"taken again": 0, "line": 1, "parabola": 2}
_FIRST = 20  # the first step that every order reaches at most gaps
_FEATURE_GAPS = (1, 2, 4, 6)
_FULL_EVERY = {Mode.SHALLOW: (2, 3, 5, 7, 10), Mode.SKIP: (2, 3, 5)}
_NAMES = {Mode.SHALLOW: "shallow", Mode.SKIP: "skipped"}
_AS_FAR = {"taken again": 0.0, "half as far": 0.5, "as built": 1.0, "1.5 times": 1.5, "twice": 2.0}
Values = NDArray[np.float32]
"""(captions, T, …): of every step."""
Way = Callable[[Values, int, int], NDArray[np.float64]]
"""Of all steps' values, a step and how many steps before it the last was computed: a forecast."""


def main() -> None:
    """Runs the captions, forecasts, writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="the float32 bundle")
    parser.add_argument("--captions", type=int, default=16, help="each with its own seed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    bundle = open_bundle(args.bundle)
    captions = [s.caption() for s in islice(scenes(_SCENES_SEED, held_out=True), args.captions)]
    reference = open_bundle(args.reference)
    require_same_model(reference, bundle)
    # both before either loads a graph: graphs keep the thread pool they were loaded with
    engine, exact = (engine_for(b, args.threads) for b in (bundle, reference))
    predictions, features, sigmas = _run(engine, bundle, captions)
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    text = "\n".join(
        [
            *_table(
                "noise prediction",
                predictions,
                _ways(sigmas, table.skip_weight),
                range(1, MAX_SKIP + 1),
                table.reuse_influence**2,
            ),
            "",
            *_table(
                "cached feature",
                features,
                _ways(sigmas, table.feature_weight),
                _FEATURE_GAPS,
                np.ones(len(sigmas)),
            ),
            "",
            "Mean squared error of forecasting every step so many steps after the last computed "
            "one, as a share of taking that one again; computed steps lie evenly. Noise "
            "predictions are guided, and weighted by what an error does to the final latents. "
            "*Fitted* is the runtime's: the last change goes on as far as calibration, on other "
            "captions, found best for each three steps of the float graphs in their own loop (of "
            "features, less where it is over more than a tenth of that, and nowhere further than a "
            "line). What quantised layers "
            f"round goes on with it, and counts here. {len(captions)} held-out captions and "
            f"seeds, {defaults.noise_scheduler.upper()} {defaults.steps} steps, guidance "
            f"{defaults.guidance_scale:g}, {bundle.manifest.conditions['quantization']}, UNet "
            f"{bundle.manifest.conditions['unet_compression']:.2f} times smaller than float32.",
            "",
            *_in_loops(
                Method(reference, exact, table.steps, _full(table), None),
                Method(bundle, engine, table.steps, _full(table), None),
                table,
                captions,
            ),
            "",
            "PSNR in dB, against float32's pictures with every step full, of the same captions and "
            "seeds with every n-th step full and the others shallow or skipped. Forecasts of "
            "cached features, or of predictions, go on by so much of what the table says; features "
            "are then corrected as built. Full steps are not averaged with forecasts.",
            "",
        ]
    )
    (args.docs / "forecasts.md").write_text(text, encoding="utf-8")
    print(text)


def _run(
    engine: Engine, bundle: Bundle, captions: Sequence[str]
) -> tuple[Values, Values, NDArray[np.float64]]:
    """Returns every step's guided noise predictions and the branches' features, and its sigma."""
    loop = full_loop(engine, bundle)
    predictions, features = [], []
    for number, caption in enumerate(tqdm(captions, desc="captions")):
        visits = list(loop.run(number, prompt_contexts(engine, bundle, caption)))
        predictions.append([visit.noise_pred.numpy() for visit in visits])
        features.append([np.concatenate([f.numpy() for f in visit.features]) for visit in visits])
    return np.array(predictions), np.array(features), np.array(loop.noise_scheduler.sigmas)


def _full(table: ReuseTable) -> CacheSchedule:
    return CacheSchedule.all_full(len(table.timesteps))


def _in_loops(
    float32: Method, full: Method, table: ReuseTable, captions: Sequence[str]
) -> list[str]:
    """Returns a table of how near schedules that reuse draw, by how far forecasts go on.

    Args:
        float32: What draws the pictures to compare with.
        full: The bundle's, every step full.
        table: Of its forecasts and corrections.
        captions: Each drawn with its own seed.
    """
    rows = [(mode, n) for mode, counts in _FULL_EVERY.items() for n in counts]
    ways = [_reusing(full, table, mode, n, far) for mode, n in rows for far in _AS_FAR.values()]
    found = []
    for seed, caption in enumerate(tqdm(captions, desc="loops")):
        expected = draw(float32, caption, seed).picture
        found.append([finite_psnr_db(expected, draw(w, caption, seed).picture) for w in ways])
    lines = ["| forecasts go on | " + " | ".join(_AS_FAR) + " |",
             "| --- |" + " ---: |" * len(_AS_FAR)]  # fmt: skip
    means = np.mean(found, axis=0).reshape(len(rows), len(_AS_FAR))
    for (mode, n), row in zip(rows, means, strict=True):
        cells = " | ".join(f"{x:.1f}" for x in row)
        lines.append(f"| one of {n} full, others {_NAMES[mode]} | {cells} |")
    return lines


def _reusing(full: Method, table: ReuseTable, mode: Mode, every: int, far: float) -> Method:
    """Returns a method with one step of so many full and the others in a mode, whose forecasts go
    on by so much of what the table says, and no mean with forecasts."""
    cached = table.without_corrections(cache=False)
    column = "skip_weight" if mode is Mode.SKIP else "feature_weight"
    weights = (getattr(table, column) * far).astype(np.float32)
    modes = [mode if step % every else Mode.FULL for step in range(len(table.timesteps))]
    scaled = replace(cached, **{column: weights})
    return replace(full, schedule=CacheSchedule(tuple(modes)), table=scaled)


def _ways(sigmas: NDArray[np.float64], weights: Weights) -> Mapping[str, Way]:
    """Returns the ways to forecast: polynomials over sigma, and the runtime's."""

    def polynomial(order: int) -> Way:
        def forecast(values: Values, step: int, gap: int) -> NDArray[np.float64]:
            points = _even(step, gap, order + 1)
            shares = _lagrange(sigmas[points], sigmas[step])
            found: NDArray[np.float64] = np.einsum("p,np...->n...", shares, values[:, points])
            return found

        return forecast

    def fitted(values: Values, step: int, gap: int) -> NDArray[np.float64]:
        forecast = Forecast()
        for point in reversed(_even(step, gap, 2)):
            forecast = forecast.after(point, values[:, point].astype(np.float64))
        found: NDArray[np.float64] = forecast.at(step, weights)
        return found

    return {**{name: polynomial(order) for name, order in _ORDERS.items()}, "fitted": fitted}


def _even(step: int, gap: int, count: int) -> list[int]:
    """Returns the last computed steps before one, the newest first."""
    return [step - gap - n * (gap + 1) for n in range(count)]


def _table(
    what: str,
    values: Values,
    ways: Mapping[str, Way],
    gaps: Sequence[int],
    influence: NDArray[np.float64],
) -> list[str]:
    lines = [f"| {what} | " + " | ".join(f"gap {gap}" for gap in gaps) + " |",
             "| --- |" + " ---: |" * len(gaps)]  # fmt: skip
    errors = {
        name: np.array([_error(values, way, gap, influence) for gap in gaps])
        for name, way in ways.items()
    }
    again = errors["taken again"]
    for name, found in errors.items():
        lines.append(f"| {name} | " + " | ".join(f"{x:.3f}" for x in found / again) + " |")
    return lines


def _error(values: Values, way: Way, gap: int, influence: NDArray[np.float64]) -> float:
    """Returns what forecasting each step from `gap` steps before errs by, weighted."""
    total = 0.0
    for step in range(_FIRST, len(influence)):
        off = way(values, step, gap) - values[:, step]
        total += float(influence[step]) * float(np.square(off).mean())
    return total


def _lagrange(known: NDArray[np.float64], wanted: float) -> NDArray[np.float64]:
    """Returns the weights of values at known places in the polynomial's value at another."""
    others = [np.delete(known, i) for i in range(len(known))]
    return np.array([np.prod((wanted - o) / (x - o)) for x, o in zip(known, others, strict=True)])


if __name__ == "__main__":
    main()
