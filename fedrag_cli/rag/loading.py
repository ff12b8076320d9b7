"""Loading models without the bars of the library that does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar over a model's weights, which are there in no time.

    A download, which takes long, keeps its bars.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    downloads_are_shown = not are_progress_bars_disabled()
    # This turns off both kinds.
    logging.disable_progress_bar()
    if downloads_are_shown:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
