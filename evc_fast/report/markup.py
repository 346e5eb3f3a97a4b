"""HTML built from elements: whatever is not an element is text, and is escaped."""

from __future__ import annotations

import html
import re

__all__ = ["Markup", "element", "number", "percent"]

# What HTML does not allow as a character: controls, and halves of surrogate pairs, as in file names that are not UTF-8.
_NOT_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")

_VOID = {"circle", "img", "line", "meta", "path", "polygon", "polyline", "rect"}
"""Elements without content, of HTML and of SVG."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element of HTML or SVG.

    Args:
        name: of the element.
        children: `Markup` as it is, any other text escaped; None is left out.
        attributes: ``class_`` is class, ``aria_label`` aria-label; None and False are left out, True has no value.

    Raises:
        ValueError: children of an element that has none.
    """
    if name in _VOID and children:
        raise ValueError(f"the element {name} has no content")
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{_text(number(value) if _is_number(value) else str(value))}"')
    opened = " ".join(parts)
    if name in _VOID:
        return Markup(f"<{opened}>" if name in ("img", "meta") else f"<{opened}/>")
    content = "".join(child if isinstance(child, Markup) else _text(child) for child in children if child is not None)
    return Markup(f"<{opened}>{content}</{name}>")


def number(value: float) -> str:
    """A number of a drawing, to a ten-thousandth."""
    text = f"{value:.4f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def percent(share: float) -> str:
    """ "34.1 %" on one line; a share too small for that is said to be small, not none."""
    return "< 0.1\u00a0%" if 0 < share < 0.0005 else f"{100 * share:.1f}\u00a0%"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _text(text: str) -> str:
    return html.escape(_NOT_CHARACTERS.sub("\ufffd", text))
