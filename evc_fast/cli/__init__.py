"""`evc-fast`: the command line. Importing it, and `--help`, load neither PyTorch nor transformers."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Runs the command of `sys.argv` and exits: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        from evc_fast.cli.app import build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "pydantic"):
            raise
        sys.exit(f"error: the command line needs {error.name}: pip install 'evc-fast[cli]'")
    except KeyboardInterrupt:
        sys.exit(130)
    build_app()(prog_name="evc-fast")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C lets the work end tidily, a second one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
