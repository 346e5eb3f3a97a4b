"""Files that appear whole or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file at `path` in one step: whoever looks sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> TextIO:
    """An open file in `folder`, which is made if absent: the lock is held until it is closed, or the process ends.

    Raises BlockingIOError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115 - held open, that is the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    return file
