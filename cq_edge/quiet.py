"""Keeps the chatter of toolchains off the screen; errors still raise."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_chatter(level: int = logging.WARNING) -> Iterator[None]:
    """Silences warnings, and logs up to a level, within the context."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
