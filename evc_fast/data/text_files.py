"""Text files as users bring them: what is wrong with one is said in a sentence, with its line."""

from __future__ import annotations

import codecs
import itertools
import json
import os
from collections import Counter
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
    """What JSON text holds; `error` with file and line where it is not JSON.

    Objects with a key twice are refused, and strings that no UTF-8 file could hold ("\\ud800").
    """

    def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{path}: {shortened(twice)} comes twice in one object")
        for part in itertools.chain.from_iterable(pairs):
            if isinstance(part, str) and not part.isascii() and any("\ud800" <= letter <= "\udfff" for letter in part):
                raise error(f"{path}: {shortened(part)} holds half of a character (a lone surrogate)")
        return content

    try:
        return json.loads(text, object_pairs_hook=strict)
    except json.JSONDecodeError as problem:
        raise error(f"{path}, line {problem.lineno}: not JSON ({problem.msg})") from None
    except error:
        raise
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits, thousands of brackets
        raise error(f"{path}: JSON that cannot be read ({problem})") from None


def shortened(text: str, most: int = 60) -> str:
    """What was found, for an error message: quoted, on one line, and not longer than that can be read."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names for an error message: the first few, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
