"""Text files as users bring them: what is wrong with one is said in a sentence, with its line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_text(path: str | os.PathLike[str], error: type[ValueError]) -> str:
    """The text of a UTF-8 file, a byte order mark taken off; `error` with file and line where it is not UTF-8."""
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        byte = data[problem.start]
        raise error(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None


def parse_json(text: str, path: str | os.PathLike[str], error: type[ValueError]) -> Any:
    """What JSON text holds; `error` with file and line where it is not JSON, or an object has a key twice."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for place, key in enumerate(keys) if key in keys[:place])
            raise error(f"{path}: {twice!r} comes twice in one object")
        return content

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as problem:
        raise error(f"{path}, line {problem.lineno}: not JSON ({problem.msg})") from None


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names for an error message: the first few, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
