"""Where pictures go, and PNG files that say how they were made."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import CQEdgeError, OutputExistsError, UsageError

_LONGEST_NAME = 60  # characters
_GAP_PX = 4  # between two pictures side by side


def output_paths(output: Path | None, prompts: Sequence[str]) -> list[Path]:
    """Returns a path for each picture, no two the same.

    Args:
        output: A .png file, or a folder (one that exists, or any name without a suffix); None
            is the current folder. In a folder a picture is named after its prompt.
        prompts: The prompt of each picture. Pictures that would share a name get -0, -1, …

    Raises:
        UsageError: `output` has another suffix than .png.
    """
    folder = output if output is not None else Path()
    if output is None or output.is_dir() or not output.suffix:
        stems = [_slug(prompt) for prompt in prompts]
    elif output.suffix.lower() == ".png":
        folder, stems = output.parent, [output.stem] * len(prompts)
    else:
        raise UsageError(f"{output} would not be a PNG: name it {output.with_suffix('.png')}")
    return [folder / f"{name}.png" for name in _distinct(stems)]


def check_writable(paths: Sequence[Path], *, force: bool) -> None:
    """Makes sure, before any work, that every picture can be written.

    Raises:
        OutputExistsError: A file exists already and `force` is False.
        CQEdgeError: A path is a folder, or its folder cannot be made or written.
    """
    for path in paths:
        if path.is_dir():
            raise CQEdgeError(f"{path} is a folder: name a file that is not")
        if path.exists() and not force:
            raise OutputExistsError(f"{path} exists already: give --force to replace it")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise CQEdgeError(f"{path} cannot be written: {folder} is no folder")
        if not os.access(folder, os.W_OK):
            raise CQEdgeError(f"{path} cannot be written: {folder} is read-only")


def write_png(
    picture: NDArray[np.uint8], path: Path, parameters: str, record: Mapping[str, object]
) -> None:
    """Writes a picture whole or not at all; the same arguments give the same bytes.

    Args:
        picture: (H, W, 3) uint8 RGB.
        path: Replaced if it exists; its folder is made.
        parameters: For people, under the PNG key "parameters".
        record: For programs, as JSON under the PNG key "cq-edge".

    Raises:
        CQEdgeError: The file cannot be written (a full disk, say); none is left behind.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("parameters", parameters)
    texts.add_text("cq-edge", json.dumps(record))
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            Image.fromarray(picture).save(beside, format="PNG", pnginfo=texts)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CQEdgeError(f"{path} cannot be written: {error.strerror or error}") from error


def side_by_side(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns two (H, W, 3) pictures as one, a white gap between them."""
    gap = np.full((left.shape[0], _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _slug(prompt: str) -> str:
    """Returns a file name that says the prompt: its words joined by hyphens."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words[:_LONGEST_NAME].rstrip("-") or "picture"


def _distinct(stems: Sequence[str]) -> list[str]:
    """Returns the names with -0, -1, … added to those that occur more than once."""
    counts = Counter(stems)
    taken = {stem for stem, count in counts.items() if count == 1}
    names = []
    for stem in stems:
        name, number = stem, 0
        while counts[stem] > 1 and (name == stem or name in taken):
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        names.append(name)
    return names
