"""Keeps the toolchains' own chatter off the screen; errors still raise."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_toolchains() -> Iterator[None]:
    """Silences logs below error, warnings and progress bars of torch's, transformers',
    diffusers' and torchao's loading within the context."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _hide_progress_bars()
            yield
    finally:
        logging.disable(before)


def _hide_progress_bars() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
