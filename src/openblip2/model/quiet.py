"""`transformers` without its remarks while it loads a model. What is wrong is raised by us, in one line."""

import logging as standard_logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No load report, no warning and no bar of weights within; downloads keep their own bars.

    The report lists what a part of a larger model leaves unused. What a checkpoint lacks is for the caller to
    check. Afterwards everything is as loud as it was.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()  # and those of downloads with it
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def quiet_bitsandbytes() -> None:
    """Errors only, from now on: it warns that an optional kernel is not there, and in each layer of each pass that
    activations are cast to int8."""
    standard_logging.getLogger("bitsandbytes").setLevel(standard_logging.ERROR)
