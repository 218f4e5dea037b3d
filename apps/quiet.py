"""Keeps the toolchains' own chatter off the screen; errors still raise."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cq_edge.quiet import without_chatter


@contextmanager
def quiet_toolchains() -> Iterator[None]:
    """Silences logs below error, warnings and progress bars of torch's, transformers',
    diffusers' and torchao's loading within the context."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with without_chatter():
        _hide_progress_bars()
        yield


def _hide_progress_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
