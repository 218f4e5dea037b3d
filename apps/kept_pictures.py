"""Pictures that an evaluation drew, kept for the next one: float32's are most of its work."""

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.pictures import write_png
from runtime.draw import Method

_ENGINES = ("executorch", "coremltools")


class KeptPictures:
    """A folder of PNG files, those of one method in a folder below it.

    A method's folder is named after all that its pictures follow from: the bundle's files, the
    steps and their modes, the corrections, the engines' versions. What was drawn in another way
    is never taken for it.
    """

    def __init__(self, folder: Path) -> None:
        """Takes the folder, which need not exist."""
        self._folder = folder
        self._names: dict[int, tuple[Method, str]] = {}

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
        if id(method) not in self._names:
            self._names[id(method)] = (method, _name(method))
        return self._folder / self._names[id(method)][1] / f"{seed:06d}.png"


def _name(method: Method) -> str:
    """Returns 16 hexadecimal digits that stand for all that a method's pictures follow from."""
    manifest = method.bundle.manifest
    told = {
        "files": {name: entry.sha256 for name, entry in sorted(manifest.files.items())},
        "engines": {name: version(name) for name in _ENGINES},
        "noise_scheduler": method.noise_scheduler or manifest.defaults.noise_scheduler,
        "guidance_scale": manifest.defaults.guidance_scale,
        "steps": method.steps,
        "modes": method.schedule.to_string(),
    }
    digest = hashlib.sha256(json.dumps(told).encode())
    if method.table is not None:
        for column in fields(method.table):
            digest.update(np.asarray(getattr(method.table, column.name)).tobytes())
    return digest.hexdigest()[:16]
