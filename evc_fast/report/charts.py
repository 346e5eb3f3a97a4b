"""The drawings of a report, as SVG: bars, the pie of triplets, gauges, the curves of emotions.

Lengths of bars are percentages of their frame and need no script to fit any width; colours are the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evc_fast.report.markup import Markup, element, number, percent

__all__ = ["MOST_WORDS", "Bar", "Curves", "bars", "choose_curves", "curves", "gauge", "nice_ceiling", "pie", "series"]

MOST_WORDS = 24
"""Words that a drawing of curves can name below its axis."""

_COLOURS = 6


@dataclass(frozen=True)
class Bar:
    """One bar: what it is of, how long it is, and its length in words."""

    label: str
    value: float
    text: str
    detail: str | None = None
    """Said beside the label, smaller."""


@dataclass(frozen=True)
class Curves:
    """Which words curves are drawn over, and their shares."""

    words: tuple[str, ...]
    """Those that any curve is highest at, at most `MOST_WORDS`, by their mean share, largest first."""
    shares: tuple[tuple[float, ...], ...]
    """A row a curve, over ``words``."""
    mean: tuple[float, ...]
    """Of the rows."""
    total: int
    """How many words there are, W."""
    rest: tuple[float, ...]
    """What the words that are not drawn hold together, a curve."""


def series(rank: int) -> str:
    """The class that colours what belongs to the triplet of this rank, from 1 on."""
    return f"t{(rank - 1) % _COLOURS + 1}"


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below ``value``; 1 where that is not positive."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def bars(rows: Sequence[Bar], *, end: float, kind: str, mark: float | None = None) -> Markup:
    """A list of horizontal bars; ``end`` is the value of a whole width, ``mark`` one that a line marks in each."""
    items = []
    for row in rows:
        length = 100 * min(max(row.value / end, 0.0), 1.0)
        line = None
        if mark is not None:
            at = f"{number(100 * mark / end)}%"
            line = element("line", x1=at, x2=at, y1="0", y2="100%", class_="mark")
        drawing = element(
            "svg",
            element("rect", width="100%", height="100%", rx="2", class_="track"),
            element("rect", width=f"{number(length)}%", height="100%", rx="2", class_="fill"),
            line,
            class_="bar",
            aria_hidden="true",  # the label and the number beside it say the same
        )
        detail = None if row.detail is None else element("small", row.detail)
        label = element("span", element("b", row.label), detail, class_="label")
        items.append(element("li", label, drawing, element("span", row.text, class_="value")))
    return element("ul", *items, class_=f"bars {kind}", role="list")


def pie(shares: Sequence[float], label: str) -> Markup:
    """Slices clockwise from the top, in proportion to ``shares``, numbered from 1; ``label`` says it in words."""
    total = sum(shares)
    slices, numbers = [], []
    start = 0.0
    for rank, share in enumerate(shares, 1):
        part = share / total if total > 0 else 0.0
        if part <= 0:
            continue
        end = start + part
        if part > 1 - 1e-9:
            slices.append(element("circle", r=100, class_=f"slice {series(rank)}"))
        else:
            (x0, y0), (x1, y1) = _on_circle(start), _on_circle(end)
            corners = f"M0 0L{number(x0)} {number(y0)}A100 100 0 {int(part > 0.5)} 1 {number(x1)} {number(y1)}Z"
            slices.append(element("path", d=corners, class_=f"slice {series(rank)}"))
        inside = part >= 0.06
        x, y = _on_circle((start + end) / 2, 64 if inside else 112) if part < 1 - 1e-9 else (0.0, 0.0)
        numbers.append(element("text", str(rank), x=x, y=y, class_="inside" if inside else "outside"))
        start = end
    return element("svg", *slices, *numbers, viewBox="-124 -124 248 248", role="img", aria_label=label, class_="pie")


def gauge(value: float, name: str, label: str) -> Markup:
    """A half ring from 0 to 1, filled up to ``value``; ``name`` stands in it, and ``label`` says it in words."""
    ring = "M-80 0A80 80 0 0 1 80 0"
    ticks = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x0, y0), (x1, y1) = (_on_circle(tick / 2 - 0.25, radius) for radius in (94, 99))
        ticks.append(element("line", x1=x0, y1=y0, x2=x1, y2=y1))
        if tick in (0.0, 0.5, 1.0):
            x, y = _on_circle(tick / 2 - 0.25, 109)
            ticks.append(element("text", number(tick), x=x, y=y, class_="tick"))
    filled = number(min(max(value, 0.0), 1.0))
    return element(
        "svg",
        element("path", d=ring, class_="track"),
        element("path", d=ring, pathLength=1, stroke_dasharray=f"{filled} 2", class_="fill"),
        *ticks,
        element("text", f"{value:.2f}", y=-18, class_="reading"),
        element("text", name, y=6, class_="name"),
        viewBox="-122 -122 244 138",
        role="img",
        aria_label=label,
        class_=f"gauge of-{name}",
    )


def choose_curves(shares: Sequence[Sequence[float]], words: Sequence[str] | None) -> Curves:
    """What to draw of ``shares`` [K, W]; words are numbered where ``words`` is None."""
    total = len(shares[0])
    highest = [max(row[index] for row in shares) for index in range(total)]
    mean = [sum(row[index] for row in shares) / len(shares) for index in range(total)]
    drawn = sorted(range(total), key=lambda index: -highest[index])[:MOST_WORDS]
    drawn.sort(key=lambda index: -mean[index])
    names = [f"emotion {index}" if words is None else words[index] for index in drawn]
    rows = tuple(tuple(row[index] for index in drawn) for row in shares)
    rest = tuple(max(sum(row) - sum(kept), 0.0) for row, kept in zip(shares, rows, strict=True))
    return Curves(tuple(names), rows, tuple(mean[index] for index in drawn), total, rest)


_LEFT, _WIDTH, _RIGHT = 96, 960, 24
_HEAD, _PLOT, _GAP = 36, 78, 12
"""Of a row of curves: the line that names it and one for what stands above a peak, its drawing, the space below."""


def curves(chosen: Curves, names: Sequence[str], label: str) -> Markup:
    """A row a curve, one below the other over the same words, on the same scale, the mean of all dashed in each."""
    end = nice_ceiling(max(max(row) for row in chosen.shares))
    count = len(chosen.words)
    step = (_WIDTH - _LEFT - _RIGHT) / max(count - 1, 1)
    places = [_LEFT + step * index if count > 1 else (_LEFT + _WIDTH - _RIGHT) / 2 for index in range(count)]
    drawn: list[Markup] = []
    for rank, (row, name) in enumerate(zip(chosen.shares, names, strict=True), 1):
        top = (rank - 1) * (_HEAD + _PLOT + _GAP) + _HEAD
        drawn.append(_curve(chosen, row, places, top, end, rank, name))
    bottom = len(chosen.shares) * (_HEAD + _PLOT + _GAP) - _GAP
    for place, word in zip(places, chosen.words, strict=True):
        at = f"translate({number(place)} {number(bottom + 14)}) rotate(-45)"
        drawn.append(element("text", _cut(word, 18), transform=at, class_="word"))
    lowest = bottom + 22 + 5.2 * min(max(map(len, chosen.words)), 18)
    drawn.append(element("text", "emotion word", x=(_LEFT + _WIDTH - _RIGHT) / 2, y=lowest + 8, class_="axis"))
    upwards = f"translate(10 {number((_HEAD + bottom) / 2)}) rotate(-90)"
    drawn.append(element("text", "share of attention", transform=upwards, class_="axis"))
    box = f"0 0 {_WIDTH} {number(lowest + 20)}"
    return element("svg", *drawn, viewBox=box, role="img", aria_label=label, class_="curves")


def _curve(
    chosen: Curves, row: Sequence[float], places: Sequence[float], top: float, end: float, rank: int, name: str
) -> Markup:
    """One row of `curves`, whose drawing is `_PLOT` high from ``top`` on; ``end`` is the share at its top."""
    base = top + _PLOT

    def line(shares: Sequence[float]) -> str:
        return " ".join(
            f"{number(x)},{number(base - _PLOT * share / end)}" for x, share in zip(places, shares, strict=True)
        )

    several = len(chosen.shares) > 1
    parts = [element("text", _cut(name, 100), x=_LEFT, y=top - 23, class_="title")]
    for share in (0.0, end / 2, end):
        y = base - _PLOT * share / end
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="base" if share == 0 else "grid"))
        parts.append(element("text", f"{number(100 * share)}\u00a0%", x=_LEFT - 12, y=y, class_="scale"))
    parts.append(
        element("polygon", points=f"{number(places[0])},{base} {line(row)} {number(places[-1])},{base}", class_="area")
    )
    if several:
        parts.append(element("polyline", points=line(chosen.mean), class_="mean"))
    parts.append(element("polyline", points=line(row), class_="curve"))
    for x, word, share in zip(places, chosen.words, row, strict=True):
        said = element("title", f"{word}: {percent(share)}")
        parts.append(element("g", element("circle", cx=x, cy=base - _PLOT * share / end, r=3), said, class_="point"))
    peak = max(range(len(row)), key=lambda index: row[index])
    late = places[peak] > 0.75 * _WIDTH
    parts.append(
        element(
            "text",
            f"{_cut(chosen.words[peak], 24)} {percent(row[peak])}",
            x=places[peak] + (4 if late else -4),
            y=base - _PLOT * row[peak] / end - 13,
            class_="peak late" if late else "peak",
        )
    )
    return element("g", *parts, class_=series(rank))


def _on_circle(turn: float, radius: float = 100.0) -> tuple[float, float]:
    """The point at ``turn`` of a whole turn, clockwise from the top."""
    angle = 2 * math.pi * turn
    return radius * math.sin(angle), -radius * math.cos(angle)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
