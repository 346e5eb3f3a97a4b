"""Files and folders that appear whole or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file at `path` in one step: whoever looks sees the old file or the whole new one.

    A link stays one. Raises FileNotFoundError where its folder is not there.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
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


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` of a JSON document."""
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


@contextmanager
def replacing_folder(folder: Path, *, only_empty: bool = False) -> Iterator[Path]:
    """A folder, not made yet, to write what shall stand at `folder`: it takes its place when the block ends.

    Before that, and where the block raises, `folder` holds what it held; its parent is made. It is one step where the
    file system can exchange two names, else two. A process that is killed may leave, beside it, what it was writing or
    the old folder, as .NAME.PID.partial or .NAME.PID.old.

    only_empty: `folder` must be empty, or not there, when the block ends.
    Raises FileExistsError where it is not, NotADirectoryError where `folder` is a file, ValueError where it is the
    working directory, which would be gone from under whoever works in it.
    """
    folder = Path(os.path.realpath(folder))  # a link stays one
    if folder == Path.cwd():
        raise ValueError(f"{folder} is the working directory, which cannot be replaced: name another folder")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: name a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        yield partial
        sync_tree(partial)
        if folder.exists():
            shutil.copymode(folder, partial)
        if only_empty or not folder.exists():
            _fill(folder, partial)
        elif not _exchange(partial, folder):
            os.replace(folder, old)
            try:
                os.replace(partial, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, partial: Path) -> None:
    try:
        os.replace(partial, folder)  # over an empty folder too
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(f"{folder} has been filled by another process: it is left as it is") from None


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; False where system or file system have no such step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(second))


def sync_tree(folder: Path) -> None:
    """Makes all that is in `folder` last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


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
