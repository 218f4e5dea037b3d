"""Draws captions in several ways, which take turns caption by caption: in this process where times
count, in others for the rest."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from apps.engines import engine_for
from apps.in_processes import in_processes
from apps.kept_pictures import KeptPictures
from runtime.draw import Drawn, Method, draw
from runtime.engine import Engine

TIMED_CAPTIONS = 16
"""The first so many captions are drawn in this process and always anew, for the time they take."""

Found: TypeAlias = Drawn | NDArray[np.uint8]
"""What was drawn here, with its times, or else the (H, W, 3) picture alone."""


def draw_captions(
    methods: Sequence[Method], captions: Sequence[str], kept: KeptPictures | None, processes: int
) -> Iterator[list[Found]]:
    """Yields what each caption gives by every method; its number is its seed.

    Args:
        methods: Whose engines draw in this process.
        captions: In order.
        kept: Where pictures are kept and, but for the first captions, looked for.
        processes: How many draw all but the first captions, with one thread each; with 1, this
            process draws them all.

    Raises:
        CQEdgeError: Something could not be drawn.
    """
    here = captions[:TIMED_CAPTIONS] if processes > 1 else captions
    for seed, caption in enumerate(here):
        anew = seed < TIMED_CAPTIONS
        yield [find_or_draw(method, caption, seed, kept, anew=anew) for method in methods]
    left = [*enumerate(captions)][len(here) :]
    if not left:
        return
    without = [replace(method, engine=cast(Engine, None)) for method in methods]  # not to be sent
    folder = None if kept is None else kept.folder
    yield from in_processes(_pictures, left, min(processes, len(left)), _begin, without, folder)


def find_or_draw(
    method: Method, caption: str, seed: int, kept: KeptPictures | None, *, anew: bool = False
) -> Found:
    """Returns a picture that was kept, unless it is wanted anew, or else draws it, and keeps it
    where there is somewhere to.

    Raises:
        CQEdgeError: It could not be drawn.
    """
    old = None if kept is None or anew else kept.find(method, caption, seed)
    if old is not None:
        return old
    drawn = draw(method, caption, seed)
    if kept is not None:
        kept.keep(method, caption, seed, drawn.picture)
    return drawn


def picture_of(found: Found) -> NDArray[np.uint8]:
    """Returns the (H, W, 3) picture."""
    return found.picture if isinstance(found, Drawn) else found


_given: tuple[Sequence[Method], Path | None]


def _begin(methods: Sequence[Method], kept: Path | None) -> None:
    """Tells a process what to draw with."""
    global _given
    _given = methods, kept


@cache
def _ready() -> tuple[list[Method], KeptPictures | None]:
    """Returns this process's methods, with engines of its own, and where pictures are kept."""
    methods, kept = _given
    bundles = {method.bundle.folder: method.bundle for method in methods}
    engines = {folder: engine_for(bundle, 1) for folder, bundle in bundles.items()}
    ready = [replace(method, engine=engines[method.bundle.folder]) for method in methods]
    return ready, None if kept is None else KeptPictures(kept)


def _pictures(numbered: tuple[int, str]) -> list[Found]:
    """Returns a caption's pictures, without times: processes that draw side by side wait for each
    other."""
    seed, caption = numbered
    methods, kept = _ready()
    return [picture_of(find_or_draw(method, caption, seed, kept)) for method in methods]
