"""A caption and what explains it, drawn for a terminal, and as plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evc_fast.results import CaptionResult, RetrievedFact

_BAR_WIDTH = 24


def print_plain(result: CaptionResult) -> None:
    """The video's name and `CaptionResult.describe`, emotions with bars of ASCII."""
    print(result.source)
    for line in result.describe().splitlines():
        rows = [f"  {line}"]
        if line.startswith("emotions: "):
            rows = ["  emotions:", *(f"    {row}" for row in _bars(result.emotions, "#"))]
        print("\n".join(rows))
    print(flush=True)


def _bars(emotions: Sequence[tuple[str, float]], mark: str) -> list[str]:
    """One line an emotion word; the longest bar is the most likely one's."""
    width = max((len(word) for word, _ in emotions), default=0)
    most = max((share for _, share in emotions), default=0) or 1
    return [
        f"{word:<{width}}  {100 * share:5.1f} %  {mark * max(1, round(_BAR_WIDTH * share / most))}"
        for word, share in emotions
    ]


def print_rich(result: CaptionResult) -> None:
    """A panel: caption, emotion bars, retrieved captions with their triplets and weights, gates, times."""
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    mark = "█" if (console.encoding or "").lower().startswith("utf") else "#"
    parts: list[Any] = [Text(result.text, style="bold")]
    if result.emotions:
        bars = Text("\n".join(_bars(result.emotions, mark)), style="magenta")
        parts += [Text("\nemotion", style="dim"), bars]
    if result.retrieved:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head, justify in (("retrieved", "left"), ("cosine", "right"), ("triplet", "left"), ("weight", "right")):
            table.add_column(head, justify=justify, overflow="fold")
        table.add_column("emotions it attends to", overflow="fold")
        for fact in result.retrieved:
            words = ", ".join(f"{word} {share:.2f}" for word, share in fact.emotions[:3])
            weight = "" if fact.triplet_weight is None else f"{fact.triplet_weight:.2f}"
            table.add_row(Text(fact.caption), f"{fact.similarity:.3f}", _triplet(fact), weight, Text(words))
        parts += [Text(), table]
    gates = [(name, gate) for name, gate in (("facts", result.fact_gate), ("emotions", result.emotion_gate))
             if gate is not None]  # fmt: skip
    if gates:
        parts.append(Text("\ngates: " + ", ".join(f"{name} {gate:.2f}" for name, gate in gates)))
    seconds = ", ".join(f"{stage} {1e3 * time:.0f} ms" for stage, time in result.timings.items())
    parts.append(Text(seconds, style="dim"))
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    console.print(Panel(Group(*parts), title=Text(str(result.source)), title_align="left"))


def _triplet(fact: RetrievedFact) -> Any:
    """Subject, predicate, object, each with its weight; the weightier, the brighter."""
    from rich.text import Text

    if fact.component_weights is None:
        return Text(" · ".join(fact.triplet))
    text = Text()
    for place, (part, weight) in enumerate(zip(fact.triplet, fact.component_weights, strict=True)):
        text.append(" · " if place else "", style="dim")
        text.append(f"{part} {weight:.2f}", style="bold" if weight == max(fact.component_weights) else "")
    return text
