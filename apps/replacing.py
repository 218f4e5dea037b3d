"""A folder, or a file, that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cq_edge.errors import CQEdgeError, OutputExistsError
from cq_edge.manifest import MANIFEST_FILE


def check_replaceable(folder: Path, *, force: bool) -> None:
    """Makes sure, before any work, that a bundle can be written to `folder`.

    Raises:
        OutputExistsError: Something is there and `force` is False, or it is no bundle.
        CQEdgeError: The place cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file: name a folder for the bundle")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MANIFEST_FILE).is_file():
            raise OutputExistsError(
                f"{folder} is not empty and is no bundle: name a new folder, nothing in this one "
                "is touched"
            )
        if not force:
            raise OutputExistsError(f"{folder} exists already: give --force to replace it")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CQEdgeError(f"{folder} cannot be written: {parent} is no folder one may write to")


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder` that takes its place when the block ends well.

    A block that fails, or is interrupted, leaves `folder` as it was and nothing beside it.

    Raises:
        CQEdgeError: The disk is full, or the folder cannot be written.
    """
    folder = folder.absolute()
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        beside.mkdir(parents=True)
        yield beside
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    except OSError as error:
        raise CQEdgeError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; replaces one that exists, and makes its folder.

    Raises:
        CQEdgeError: It cannot be written (a full disk, say); nothing is left beside it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CQEdgeError(f"{path} cannot be written: {error.strerror or error}") from error
