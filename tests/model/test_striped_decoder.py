"""The striped decoder against diffusers' own, and the memory that it takes once exported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from cq_edge.model import striped_decoder
from cq_edge.model.graphs import decode_graph
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.striped_decoder import StripedDecoder
from exporters.to_executorch import export_executorch

SIDE = 64  # of the latents
# runs a decoder twice and prints by how many MiB the process's peak grew
_RUN = """
import sys, torch
from runtime.executorch_engine import extension_library
from runtime.peak_memory import peak_memory_mib
library = extension_library()
method = library._load_program(sys.argv[1]).load_method("decode")
latents, before = torch.zeros(1, 4, 64, 64), peak_memory_mib()
method([latents])
print(peak_memory_mib() - before)
"""


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striped_decoder, "LARGE", 1)


def _vae(channels: tuple[int, ...]) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    ).eval()


@torch.no_grad()
def test_a_decoder_in_stripes_gives_the_picture_of_the_whole_one() -> None:
    graph = decode_graph(_vae((8, 16, 16)))
    striped = rewrite_for_xnnpack(graph)
    assert isinstance(striped.decoder, StripedDecoder)
    latents = torch.randn(1, 4, 16, 24)
    torch.testing.assert_close(striped(latents), graph(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_exported_decoder_needs_less_memory_in_stripes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    striped = _growth(tmp_path / "striped.pte")
    monkeypatch.setattr(striped_decoder, "LARGE", 1 << 62)
    assert striped < 0.7 * _growth(tmp_path / "whole.pte")


def _growth(path: Path) -> float:
    graph = rewrite_for_xnnpack(decode_graph(_vae((64,) * 2))).eval().requires_grad_(False)
    export_executorch({"decode": (graph, (torch.zeros(1, 4, SIDE, SIDE),))}, path)
    command = [sys.executable, "-c", _RUN, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
