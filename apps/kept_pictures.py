"""Pictures that an evaluation drew, kept for the next one: float32's are most of its work."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.pictures import check_writable, write_png
from cq_edge import __version__
from cq_edge.reuse_table import RUN_COLUMNS
from runtime.conditions import library
from runtime.draw import Method


class KeptPictures:
    """A folder of PNG files, those of one method in a folder below it.

    A method's folder is named after what its pictures follow from: graphs and prompts' words,
    noise schedule, steps and their modes, corrections and forecasts, the versions of cq-edge and of
    the engine. What was drawn in another way is never taken for it.

    Attributes:
        folder: Which it is.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the folder, which need not exist.

        Raises:
            CQEdgeError: It cannot be made or written.
        """
        check_writable([folder / "picture.png"], force=True)
        self.folder = folder
        self._names: dict[Method, str] = {}

    def find(self, method: Method, caption: str, seed: int) -> NDArray[np.uint8] | None:
        """Returns the (H, W, 3) uint8 picture, or None where there is none that can be read."""
        from PIL import Image

        try:
            with Image.open(self._path(method, seed)) as image:
                if json.loads(image.info["cq-edge"])["prompt"] != caption:
                    return None
                return np.asarray(image.convert("RGB"), np.uint8)
        except (OSError, SyntaxError, KeyError, ValueError):
            return None

    def keep(self, method: Method, caption: str, seed: int, picture: NDArray[np.uint8]) -> None:
        """Writes a picture.

        Raises:
            CQEdgeError: It cannot be written.
        """
        record = {"prompt": caption, "seed": seed, "modes": method.schedule.to_string()}
        write_png(picture, self._path(method, seed), caption, record)

    def _path(self, method: Method, seed: int) -> Path:
        if method not in self._names:
            self._names[method] = _name(method)
        return self.folder / self._names[method] / f"{seed:06d}.png"


def _name(method: Method) -> str:
    """Returns 16 hexadecimal digits that stand for what a method's pictures follow from."""
    manifest = method.bundle.manifest
    words = [file for t in manifest.tokenizers for file in (t.vocab, t.merges)]
    told = {
        "cq_edge": __version__,
        "engines": sorted(library(entry.backend) for entry in manifest.graphs.values()),
        "graphs": method.bundle.graphs_sha256(),
        "tokenizers": [manifest.files[file].sha256 for file in words],
        "noise_schedule": asdict(manifest.noise_schedule),
        "guidance": manifest.guidance,
        "guidance_scale": manifest.defaults.guidance_scale,
        "empty_negative_prompt": manifest.empty_negative_prompt,
        "noise_scheduler": method.noise_scheduler or manifest.defaults.noise_scheduler,
        "steps": method.steps,
        "modes": method.schedule.to_string(),
    }
    digest = hashlib.sha256(json.dumps(told).encode())
    if method.table is not None:
        for column in RUN_COLUMNS:
            digest.update(np.asarray(getattr(method.table, column)).tobytes())
    if method.shares is not None:
        digest.update(method.shares.tobytes())
    return digest.hexdigest()[:16]
