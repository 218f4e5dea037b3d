"""A bundle of a few kilobytes, and a fake engine that "runs" it with four lines of NumPy."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cq_edge.correction import ChannelCorrection, ShallowCorrection
from cq_edge.manifest import (
    Defaults,
    GraphEntry,
    ImageSize,
    LatentShape,
    Manifest,
    ReuseTableEntry,
    TensorSpec,
    TokenizerEntry,
    write_manifest,
)
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.operators import Operator, Operators, save_operators
from cq_edge.reuse_table import ReuseTable
from cq_edge.scenes import scenes
from runtime.bundle import Bundle
from tools.demo_training.tokenizer import write_clip_vocabulary

CHANNELS, SIDE, WIDTH, STEPS, MAX_GAP = 4, 4, 8, 10, 3


def captions(count: int) -> list[str]:
    return [scene.caption() for scene in islice(scenes(3, held_out=False), count)]


class FakeEngine:
    """An `Engine` whose shallow graph, given its own step's feature, equals its full graph."""

    def __init__(self, bundle: Bundle | None = None, threads: int | None = None) -> None:
        del bundle
        self.threads = threads
        self.calls: list[str] = []
        self.loaded: set[str] = set()

    def load(self, graph: str) -> None:
        self.loaded.add(graph)

    def unload(self, graph: str) -> None:
        self.loaded.discard(graph)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.load(graph)
        self.calls.append(graph)
        for name, array in inputs.items():
            assert array.dtype == (np.int64 if name == "input_ids" else np.float32), name
        return getattr(self, f"_{graph}")(**inputs)

    def _encode(self, input_ids: NDArray[Any]) -> dict[str, NDArray[Any]]:
        waves = np.sin(input_ids[..., None] * np.arange(1, WIDTH + 1) / 7)
        return {"embeddings": waves.astype(np.float32)}

    def _denoise(
        self, latents: NDArray[Any], timestep: NDArray[Any], embeddings: NDArray[Any]
    ) -> dict[str, NDArray[Any]]:
        assert timestep.shape == (1,)
        feature = np.tanh(latents * 0.5 + embeddings.mean() + timestep[0] / 1000)
        none = ShallowCorrection(*map(ChannelCorrection.identity, (CHANNELS, 2 * CHANNELS)))
        outputs = self._denoise_shallow(latents, timestep, embeddings, feature, **none.inputs())
        return {**outputs, "cached_feature": feature}

    def _denoise_shallow(
        self,
        latents: NDArray[Any],
        timestep: NDArray[Any],
        embeddings: NDArray[Any],
        cached_feature: NDArray[Any],
        gain: NDArray[Any],
        bias: NDArray[Any],
        output_gain: NDArray[Any],
        output_bias: NDArray[Any],
    ) -> dict[str, NDArray[Any]]:
        del timestep
        corrected = gain[:, None, None] * cached_feature + bias[:, None, None]
        for half in (slice(0, CHANNELS), slice(CHANNELS, None)):
            corrected = corrected * output_gain[half, None, None] + output_bias[half, None, None]
        return {"noise_pred": 0.3 * latents + corrected + embeddings[:, :1, :1, None]}

    def _decode(self, latents: NDArray[Any]) -> dict[str, NDArray[Any]]:
        pixels = latents[:, :3].repeat(8, axis=2).repeat(8, axis=3)
        return {"image": (1 / (1 + np.exp(-pixels))).astype(np.float32)}


def reuse_table(noise_scheduler: str = "ddim", steps: int = STEPS) -> ReuseTable:
    """A table of random errors and corrections."""
    rng = np.random.default_rng(5)
    timesteps = make_noise_scheduler(noise_scheduler, steps, NoiseScheduleConfig()).timesteps
    shape = (len(timesteps), MAX_GAP + 1)
    noise_pred, feature_l1 = rng.uniform(0.1, 1.0, (2, *shape))
    gain = rng.uniform(0.9, 1.1, (*shape, CHANNELS)).astype(np.float32)
    bias = rng.uniform(-0.1, 0.1, (*shape, CHANNELS)).astype(np.float32)
    output_gain = rng.uniform(0.9, 1.1, (*shape, 2 * CHANNELS)).astype(np.float32)
    output_bias = rng.uniform(-0.1, 0.1, (*shape, 2 * CHANNELS)).astype(np.float32)
    beyond = np.arange(shape[0])[:, None] + np.arange(shape[1]) >= shape[0]
    noise_pred[:, 0] = feature_l1[:, 0] = 0
    gain[:, 0], bias[:, 0] = 1, 0
    output_gain[:, 0], output_bias[:, 0] = 1, 0
    for array in (noise_pred, feature_l1, gain, bias, output_gain, output_bias):
        array[beyond] = np.nan
    # forecasts reach two steps; both are worse than reusing, however errors add up
    skip, unguided = 40 * noise_pred[:, :3], 60 * noise_pred[:, :3]
    return ReuseTable(
        noise_scheduler=noise_scheduler,
        steps=steps,
        guidance_scale=5.0,
        base_error=0.0,
        timesteps=timesteps,
        noise_influence=np.ones(len(timesteps)),
        reuse_influence=np.ones(len(timesteps)),
        noise_pred=noise_pred,
        feature_l1=feature_l1,
        shallow=0.7 * noise_pred,
        skip=skip,
        unguided=unguided,
        feature_weight=_weights(noise_pred, 0.6),
        skip_weight=_weights(skip, 0.75),
        unguided_weight=_weights(unguided, 0.5),
        forecast_share=np.full(shape, 0.25, np.float32),
        gain=gain,
        bias=bias,
        output_gain=output_gain,
        output_bias=output_bias,
    )


def _weights(errors: NDArray[np.float64], weight: float) -> NDArray[np.float32]:
    """A forecast's weights: one everywhere."""
    steps, columns = errors.shape
    return np.full((steps, columns + 1, columns), weight, np.float32)


def graph_entries() -> dict[str, GraphEntry]:
    """Every graph in graphs.pte, with the shapes of DESIGN section 5."""
    ids = TensorSpec("input_ids", (1, 77), "int64")
    embeddings = TensorSpec("embeddings", (1, 77, WIDTH), "float32")
    latents = TensorSpec("latents", (1, 4, SIDE, SIDE), "float32")
    timestep = TensorSpec("timestep", (1,), "float32")
    feature = TensorSpec("cached_feature", (1, CHANNELS, SIDE, SIDE), "float32")
    gain = TensorSpec("gain", (CHANNELS,), "float32")
    bias = TensorSpec("bias", (CHANNELS,), "float32")
    output_gain = TensorSpec("output_gain", (2 * CHANNELS,), "float32")
    output_bias = TensorSpec("output_bias", (2 * CHANNELS,), "float32")
    noise_pred = TensorSpec("noise_pred", (1, 4, SIDE, SIDE), "float32")
    image = TensorSpec("image", (1, 3, 8 * SIDE, 8 * SIDE), "float32")
    seen = (latents, timestep, embeddings)
    reused = (feature, gain, bias, output_gain, output_bias)
    return {
        "encode": _entry("encode", (ids,), (embeddings,)),
        "denoise": _entry("denoise", seen, (noise_pred, feature)),
        "denoise_shallow": _entry("denoise_shallow", (*seen, *reused), (noise_pred,)),
        "decode": _entry("decode", (latents,), (image,)),
    }


def _entry(
    name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> GraphEntry:
    return GraphEntry(
        file="graphs.pte",
        method=name,
        backend="xnnpack",
        inputs=inputs,
        outputs=outputs,
        parity_db=60.0,
        parity_floor_db=25.0,
        delegated_macs_share=1.0,
        delegated_ops_share=1.0,
    )


def manifest(quantization: str = "int8") -> Manifest:
    """Of a bundle whose default is DDIM at 10 steps, 4 of them full."""
    return Manifest(
        name="tiny",
        cq_edge_version="0.1.0",
        latents=LatentShape(channels=4, height=SIDE, width=SIDE),
        image_px=ImageSize(height=8 * SIDE, width=8 * SIDE),
        graphs=graph_entries(),
        noise_schedule=NoiseScheduleConfig(),
        defaults=Defaults(noise_scheduler="ddim", steps=STEPS, guidance_scale=5.0, full_steps=4),
        tokenizers=(TokenizerEntry("tokenizer/vocab.json", "tokenizer/merges.txt"),),
        reuse_tables=(ReuseTableEntry("reuse_ddim_10.npz", "ddim", STEPS),),
        conditions={"quantization": quantization, "unet_compression": 3.9},
    )


def write_bundle(
    folder: Path,
    graphs_pte: bytes = b"no program: the engine is fake",
    quantization: str = "int8",
) -> Path:
    """Writes a bundle that opens; its graphs are `graphs_pte`."""
    folder.mkdir()
    (folder / "graphs.pte").write_bytes(graphs_pte)
    write_clip_vocabulary(captions(500), folder / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink()
    reuse_table().save(folder / "reuse_ddim_10.npz")
    save_operators(folder / "operators.json", {"xnnpack": operators()})
    write_manifest(folder, manifest(quantization))
    return folder


def operators() -> dict[str, Operators]:
    """A matrix product for each graph; the full one has ten times the shallow one's."""
    rows = {"encode": 10, "denoise": 100, "denoise_shallow": 10, "decode": 50}
    return {
        graph: (Operator("linear", "float32", 1, count, 1000, 1000, 4000, 4_000_000, 4000),)
        for graph, count in rows.items()
    }
