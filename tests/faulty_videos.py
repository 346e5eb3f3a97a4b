"""`sampled_levels` for videos that are worse than any encoder can make them; worker processes import it."""

from __future__ import annotations

import os
import signal
import time

from evc_fast.data.features import sampled_levels


def levels_or_worse(path: str, **options: object) -> tuple[dict[str, int], bytes]:
    """`sampled_levels`, unless the file is named after what it does to the decoder."""
    if "segfault" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in path:
        time.sleep(600)
    if "untyped" in path:
        raise ZeroDivisionError("one by none")
    return sampled_levels(path, **options)


def slow_levels(path: str, **options: object) -> tuple[dict[str, int], bytes]:
    """`sampled_levels`, slowly enough to be interrupted."""
    time.sleep(0.2)
    return sampled_levels(path, **options)
