"""Which part of the full graph takes how long: sub-graphs cut at block borders, each timed alone.

The wheel of ExecuTorch tells nothing of single operators (it is built without the event tracer),
so the model is cut again, every part exported as a graph of its own and timed. What the parts
take together is not what the whole takes: each copies its inputs and outputs, and nothing is
fused across a border.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from apps.quiet import quiet_toolchains
from cq_edge.errors import UsageError
from runtime.bundle import Bundle
from runtime.measurement import BlockTime

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

    from cq_edge.model.split import FullUNet, Layer

_ROUNDS = 20
_BUILT_IN = "built-in"
_DTYPE = "float32"


def measure_blocks(bundle: Bundle, model: str) -> list[BlockTime]:
    """Returns the median of each part, in the order in which they run.

    Args:
        bundle: What was built of the model; says how it was quantised. Layers of four bits are
            timed at eight.
        model: As `cq-edge build` takes it; "built-in" is the demo model.

    Raises:
        UsageError: The model's latents or embeddings are not those of the bundle's graphs.
        ModelError: It cannot be loaded.
        ExportError: A part cannot become a graph.
    """
    with quiet_toolchains():
        from cq_edge.model.load import load_pipeline
        from cq_edge.model.optimize import OptimizeConfig, optimize

        pipeline = load_pipeline(None if model == _BUILT_IN else model)
        _check_same(bundle, pipeline, model)
        quantization = str(bundle.manifest.conditions.get("quantization", "int8"))
        optimized = optimize(pipeline, OptimizeConfig(prompts=("",), quantization=quantization))
        full: Any = optimized.edge["denoise"]
        with tempfile.TemporaryDirectory() as folder:
            runs, computed = _exported(full, bundle, Path(folder))
            taken = _time(runs)
    return [BlockTime(name, ms, computed[name]) for name, ms in taken.items()]


def _check_same(bundle: Bundle, pipeline: "DiffusionPipeline", model: str) -> None:
    from cq_edge.model.optimize import latents_shape
    from cq_edge.model.split import context_shapes

    specs = {spec.name: spec.shape for spec in bundle.manifest.graph("denoise").inputs}
    expected = {name: shape for name, shape in specs.items() if name != "timestep"}
    length = max((entry.max_length for entry in bundle.manifest.tokenizers), default=0)
    found = {"latents": (1, *latents_shape(pipeline)), **context_shapes(pipeline.unet, length)}
    if found != expected:
        raise UsageError(
            f"--blocks {model} takes {_listed(found)}, but the bundle was built of a model that "
            f"takes {_listed(expected)}: name that one"
        )


def _listed(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())


def _exported(
    full: "FullUNet", bundle: Bundle, folder: Path
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Returns a function per part that runs its graph once on what flows there, and what each
    part multiplies and adds."""
    from cq_edge.manifest import TensorSpec
    from exporters.graph_spec import GraphSpec
    from exporters.to_executorch import export_executorch, load_graph

    modules = _with_inputs(full, bundle)
    path = folder / "blocks.pte"
    report = export_executorch(modules, path)
    runs: dict[str, Callable[[], object]] = {}
    for name, (module, inputs) in modules.items():
        specs = tuple(TensorSpec(f"x{i}", tuple(t.shape), _DTYPE) for i, t in enumerate(inputs))
        out = TensorSpec("y", tuple(module(*inputs).shape), _DTYPE)
        graph = load_graph(path, GraphSpec(name, specs, (out,)))
        arrays = {spec.name: t.numpy() for spec, t in zip(specs, inputs, strict=True)}
        runs[name] = lambda graph=graph, arrays=arrays: graph(arrays)  # type: ignore[misc]
    return runs, {name: graph.macs for name, graph in report.graphs.items()}


def _with_inputs(
    full: "FullUNet", bundle: Bundle
) -> dict[str, tuple["nn.Module", tuple[Any, ...]]]:
    """Returns every part with what reaches it in one run of the whole."""
    import torch

    from runtime.measure import sample_inputs

    parts = dict(_parts(full))
    seen: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: object, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = [x for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)]
            seen[name] = tuple(t.clone() for t in tensors)

        return hook

    hooks = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in parts.items()]
    given = [torch.from_numpy(a.copy()) for a in sample_inputs(bundle, "denoise").values()]
    with torch.no_grad():
        full(*given)
    for hook in hooks:
        hook.remove()
    return {name: (module, seen[name]) for name, module in parts.items()}


def _parts(full: "FullUNet") -> Iterator[tuple[str, "nn.Module"]]:
    """Yields the parts that one tensor or more enter and one leaves, in the order they run."""
    yield "time", full.time
    yield "conv_in", full.conv_in
    stages: list[tuple[str, Any]] = [(f"down_{i}", stage) for i, stage in enumerate(full.down)]
    stages += [("mid", full.mid), *((f"up_{i}", stage) for i, stage in enumerate(full.up))]
    for name, stage in stages:
        for index, layer in enumerate(stage.layers):
            yield f"{name}_layer_{index}", _without_unread(layer)
        if stage.resampler is not None:
            yield f"{name}_resample", stage.resampler
    for name, layers in (("last", full.last), ("outer", full.outer)):
        for index, layer in enumerate(cast("Iterable[Layer]", layers)):
            yield f"{name}_layer_{index}", _without_unread(layer)
    yield "head", full.head


def _without_unread(layer: "Layer") -> "nn.Module":
    """Returns a layer, or its resnet alone where no attention reads the embeddings."""
    return layer if layer.attention is not None else layer.resnet


def _time(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(1 + _ROUNDS), "blocks", unit="round"):  # the first round warms up
        for name, run in runs.items():
            start = perf_counter()
            run()
            taken[name].append((perf_counter() - start) * 1e3)
    return {name: median(times[1:]) for name, times in taken.items()}
