"""How skip steps should forecast the noise prediction: reuse, a line or a parabola, and over what.

Runs captions that calibration never saw with the full graph at every step, and forecasts each
guided noise prediction from the ones before it:

    cq-edge build -o out/demo/bundle
    python -m benchmarks.forecasts out/demo/bundle     # writes docs/forecasts.md
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.engines import engine_for
from benchmarks.full_loop import full_loop, prompt_contexts
from cq_edge.model.capture import MAX_SKIP
from cq_edge.noise_scheduler import NoiseScheduler
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle

_SCENES_SEED = 50_000_001
_ORDERS = {"reuse": 0, "line": 1, "parabola": 2, "cubic": 3}
_FIRST = 10  # the first step that every order reaches at every gap without PNDM's twin steps
_LAST = 2  # steps in which the noise prediction bends: a line overshoots


def main() -> None:
    """Runs the captions, forecasts, writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--captions", type=int, default=16, help="each with its own seed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    captions = [s.caption() for s in islice(scenes(_SCENES_SEED, held_out=True), args.captions)]
    engine = engine_for(bundle, args.threads)
    loop = full_loop(engine, bundle)
    runs = [
        [
            v.noise_pred.double().numpy()
            for v in loop.run(number, prompt_contexts(engine, bundle, caption))
        ]
        for number, caption in enumerate(tqdm(captions, desc="captions"))
    ]
    predictions = np.stack([np.concatenate(run) for run in runs])
    text = _table(predictions, loop.noise_scheduler, table.reuse_influence**2, bundle)
    (args.docs / "forecasts.md").write_text(text, encoding="utf-8")
    print(text)


def _table(
    runs: NDArray[np.float64],
    noise_scheduler: NoiseScheduler,
    influence: NDArray[np.float64],
    bundle: Bundle,
) -> str:
    axes = {"timestep": noise_scheduler.timesteps.astype(np.float64),
            "sigma": np.array(noise_scheduler.sigmas)}  # fmt: skip
    gaps = range(1, MAX_SKIP + 1)
    shown = [*(f"gap {gap}" for gap in gaps), f"gap 1, last {_LAST} steps"]
    lines = ["| forecast | over | " + " | ".join(shown) + " |",
             "| --- | --- |" + " --- |" * len(shown)]  # fmt: skip
    end = len(influence) - _LAST
    for name, order in _ORDERS.items():
        for axis, values in axes.items() if order else [("–", axes["sigma"])]:
            run = (runs, values, influence, order)
            errors = [_error(*run, gap, range(_FIRST, end)) for gap in gaps]
            errors.append(_error(*run, 1, range(end, len(influence))))
            cells = " | ".join(f"{1e3 * error:.3f}" for error in errors)
            lines.append(f"| {name} | {axis} | {cells} |")
    defaults = bundle.manifest.defaults
    return "\n".join(
        [
            *lines,
            "",
            "A thousandth of the error of forecasting every step so many steps after the last "
            "computed one: mean squared error of the guided noise prediction times the step's "
            f"influence, summed over the steps, the last {_LAST} apart. {len(runs)} held-out "
            f"captions and seeds, {defaults.noise_scheduler.upper()} {defaults.steps} steps, "
            f"guidance {defaults.guidance_scale:g}. The runtime takes the line over sigma, "
            "followed as far as calibration found best for each pair of steps.",
            "",
        ]
    )


def _error(
    runs: NDArray[np.float64],
    axis: NDArray[np.float64],
    influence: NDArray[np.float64],
    order: int,
    gap: int,
    steps: range,
) -> float:
    """Returns what forecasting each of some steps from `gap` steps before adds to the error."""
    total = 0.0
    for step in steps:
        points = range(step - gap - order, step - gap + 1)
        weights = _lagrange(axis[list(points)], axis[step])
        forecast = np.einsum("p,np...->n...", weights, runs[:, list(points)])
        total += influence[step] * float(np.square(forecast - runs[:, step]).mean())
    return total


def _lagrange(known: NDArray[np.float64], wanted: float) -> NDArray[np.float64]:
    """Returns the weights of values at known places in the polynomial's value at another."""
    others = [np.delete(known, i) for i in range(len(known))]
    return np.array([np.prod((wanted - o) / (x - o)) for x, o in zip(known, others, strict=True)])


if __name__ == "__main__":
    main()
