"""Where to cut the demo model's UNet: what cheaper and dearer shallow graphs take and err by.

Compares the default cut with one layer more and with one that leaves the last transformer out,
whose contribution is then cached beside the feature:

    python -m benchmarks.shallow_cuts          # writes docs/shallow_cuts.md
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apps.quiet import quiet_toolchains
from cq_edge.manifest import TensorSpec
from cq_edge.model.load import load_pipeline
from cq_edge.model.prompts import embed_prompts, scene_prompts
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import FullUNet, Layer, ShallowUNet, split_unet
from cq_edge.model.trajectory import Loop, mean_square
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from exporters.graph_spec import GraphSpec
from exporters.to_executorch import export_executorch, load_graph
from runtime.conditions import processor

_GAPS, _GUIDANCE, _STEPS = (1, 2, 4), 3.5, 50
_ROUNDS, _RUNS = 60, 5


class NoTransformer(nn.Module):
    """The default cut without its transformer: what that added is cached, and added again."""

    def __init__(self, shallow: ShallowUNet) -> None:
        super().__init__()
        self.time, self.conv_in, self.head = shallow.time, shallow.conv_in, shallow.head
        self.resnet = cast("Layer", shallow.outer[0]).resnet

    def forward(self, latents: Tensor, timestep: Tensor, feature: Tensor, added: Tensor) -> Tensor:
        """Returns the (B, 4, h, w) noise prediction.

        Args:
            latents: (B, 4, h, w).
            timestep: (1,).
            feature: (B, C, h, w), the cached feature.
            added: (B, C', h, w), what the transformer added at the anchor.
        """
        joined = torch.cat([feature, self.conv_in(latents)], dim=1)
        predicted: Tensor = self.head(self.resnet(joined, self.time(timestep)) + added)
        return predicted


@dataclass(slots=True)
class _Cut:
    """A way to cut: its full graph, and its shallow one with what it takes beside an anchor's
    tensors."""

    name: str
    full: FullUNet
    shallow: nn.Module
    correction: tuple[Tensor, ...] | None

    def inputs(
        self, latents: Tensor, timestep: Tensor, context: Tensor, feature: Tensor, added: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns what the shallow graph takes."""
        if self.correction is None:
            return latents, timestep, feature, added
        return latents, timestep, context, feature, *self.correction


def main() -> None:
    """Measures, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    with quiet_toolchains():
        cuts = _cuts()
        errors = {cut.name: _errors(cut, args.prompts) for cut in cuts}
        taken_ms = _times(cuts)
    full_ms = taken_ms.pop("full")
    lines = [
        "| shallow graph | ms, int8 | of a full step | "
        + " | ".join(f"error, gap {gap}" for gap in _GAPS)
        + " |",
        "| --- " * (3 + len(_GAPS)) + "|",
        *(
            f"| {name} | {ms:.2f} | {ms / full_ms:.1%} | "
            + " | ".join(f"{errors[name][gap]:.4f}" for gap in _GAPS)
            + " |"
            for name, ms in taken_ms.items()
        ),
        "",
        f"Error: root of the mean squared error of the guided noise prediction, float32, mean over "
        f"all steps of {args.prompts} prompts; PNDM {_STEPS} steps, guidance {_GUIDANCE:g}, "
        f"uncorrected. Times: medians of {_ROUNDS * _RUNS} runs in turns, one process, "
        f"{processor()}, {torch.get_num_threads()} threads asked for.",
    ]
    text = "\n".join(lines) + "\n"
    (args.docs / "shallow_cuts.md").write_text(text, encoding="utf-8")
    print(text)


def _cuts() -> list[_Cut]:
    unet = load_pipeline(None).unet
    (full, shallow), (wider, deeper) = (split_unet(unet, layers) for layers in (1, 2))
    return [
        _Cut("1 layer (the default)", full, shallow, _nothing(shallow)),
        _Cut("1 layer without its transformer", full, NoTransformer(shallow).eval(), None),
        _Cut("2 layers", wider, deeper, _nothing(deeper)),
    ]


def _nothing(shallow: ShallowUNet) -> tuple[Tensor, ...]:
    """Returns corrections that change nothing."""
    counts = (shallow.feature_channels, shallow.consumed_channels)
    return tuple(x for n in counts for x in (torch.ones(n), torch.zeros(n)))


@torch.no_grad()
def _errors(cut: _Cut, prompts: int) -> dict[int, float]:
    """Returns by gap what reusing an anchor's tensors makes the guided prediction wrong by."""
    pipeline = load_pipeline(None)
    layer, added = cast("Layer", cut.full.outer[0]), _Added()
    hooks = [
        layer.resnet.register_forward_hook(lambda *a: added.before(a[2])),
        layer.register_forward_hook(lambda *a: added.after(a[2])),
    ]
    config = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    unet = pipeline.unet.config
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    loop = Loop(cut.full, make_noise_scheduler("pndm", _STEPS, config), shape, _GUIDANCE)
    squares: dict[int, list[float]] = {gap: [] for gap in _GAPS}
    embedded = embed_prompts(pipeline, scene_prompts(prompts), _GUIDANCE)
    for number, prompt in enumerate(tqdm(embedded, desc=cut.name, unit="prompt")):
        anchors: list[list[tuple[Tensor, Tensor]]] = []
        for visit in loop.run(number, prompt):
            anchors.append(list(zip(visit.features, added.taken(), strict=True)))
            for gap in (g for g in _GAPS if g <= visit.step):
                reused = loop.guided(
                    [
                        cut.shallow(*cut.inputs(visit.seen, visit.timestep, context, *tensors))
                        for (context,), tensors in zip(prompt, anchors[-1 - gap], strict=True)
                    ]
                )
                added.taken()
                squares[gap].append(mean_square(reused - visit.noise_pred))
    for hook in hooks:
        hook.remove()
    return {gap: (sum(found) / len(found)) ** 0.5 for gap, found in squares.items()}


class _Added:
    """What the last layer's transformer added, branch by branch."""

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._found: list[Tensor] = []

    def before(self, hidden: Tensor) -> None:
        self._before = hidden

    def after(self, hidden: Tensor) -> None:
        if self._before is not None:
            self._found.append(hidden - self._before)

    def taken(self) -> list[Tensor]:
        """Returns what was added since it was last asked."""
        found, self._found = self._found, []
        return found


@torch.no_grad()
def _times(cuts: list[_Cut]) -> dict[str, float]:
    """Returns the median ms of each cut's int8 graph, and of the full graph."""
    full = cuts[0].full
    x, t, e = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 128)
    modules: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    channels = cast("ShallowUNet", cuts[0].shallow).consumed_channels // 2
    added = torch.randn(1, channels, 16, 16)
    for index, cut in enumerate(cuts):
        feature = cut.full(x, t, e)[1]
        modules[f"cut_{index}"] = (cut.shallow, cut.inputs(x, t, e, feature, added))
    modules["full"] = (full, (x, t, e))
    edge = quantize_for_xnnpack(
        rewrite_for_xnnpack(nn.ModuleList([module for module, _ in modules.values()]))
    )
    ready: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        name: (module, inputs)
        for module, (name, (_, inputs)) in zip(edge, modules.items(), strict=True)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cuts.pte"
        export_executorch(ready, path)
        runs = {name: _run(path, name, *given) for name, given in ready.items()}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in tqdm(range(_ROUNDS), desc="time", unit="round"):
            for name, run in runs.items():
                run()
                for _ in range(_RUNS):
                    start = perf_counter()
                    run()
                    taken[name].append((perf_counter() - start) * 1e3)
    names = [*(cut.name for cut in cuts), "full"]
    return {name: median(times) for name, times in zip(names, taken.values(), strict=True)}


def _run(
    path: Path, name: str, module: nn.Module, inputs: tuple[Tensor, ...]
) -> Callable[[], object]:
    specs = tuple(TensorSpec(f"x{i}", tuple(x.shape), "float32") for i, x in enumerate(inputs))
    found = module(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    outs = tuple(TensorSpec(f"y{i}", tuple(y.shape), "float32") for i, y in enumerate(outputs))
    graph = load_graph(path, GraphSpec(name, specs, outs))
    arrays = {spec.name: x.numpy() for spec, x in zip(specs, inputs, strict=True)}
    return lambda: graph(arrays)


if __name__ == "__main__":
    main()
