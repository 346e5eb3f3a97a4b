"""The page of a report: a table of all videos, and a section for each."""

from __future__ import annotations

import base64
import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import evc_fast
from evc_fast.report.charts import Bar, Curves, bars, choose_curves, curves, gauge, nice_ceiling, pie, series
from evc_fast.report.markup import Markup, element, percent
from evc_fast.report.style import STYLE
from evc_fast.results import CaptionResult, Picture, RetrievedFact

__all__ = ["report_page"]

_PARTS = ("subject", "predicate", "object")
_NO_WORDS, _NOTHING = "(no words)", "\u2013"
_ALPHA = "\u03b1"


def report_page(results: Sequence[CaptionResult], *, title: str, failed: Mapping[str, str]) -> str:
    """The page as HTML; arguments and errors as of `write_report`."""
    if isinstance(results, CaptionResult):
        raise TypeError("results must be a list of caption results, got one result: put it into a list")
    results = list(results)
    other = next((result for result in results if not isinstance(result, CaptionResult)), None)
    if other is not None:
        raise TypeError(f"results must be caption results, got {type(other).__name__}")
    if not results:
        raise ValueError("results must hold at least one caption to report, got none")
    names = _names(results)
    common = [note for note in results[0].notes if all(note in result.notes for result in results)]
    several = len(results) > 1
    today = datetime.date.today()
    made = element("time", f"{today.day} {today:%B %Y}", datetime=today.isoformat())
    count = f"{len(results)} videos" if several else "1 video"
    if failed:
        count += f", {len(failed)} more without a caption"
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", f"{count} · evc_fast {evc_fast.__version__} · ", made),
            _notes(common),
            class_="top",
        ),
        element(
            "main",
            _table(results, names, common) if several else None,
            _failures(failed),
            *(
                _section(result, name, number, several, [note for note in result.notes if note not in common])
                for number, (result, name) in enumerate(zip(results, names, strict=True), 1)
            ),
        ),
        element("footer", element("p", _READING)),
    )
    # The policy holds the page to its word: a browser loads nothing that is not in it.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


_READING = (
    "Bars, weights and curves show how a caption was computed, not that it is true, and nothing of what anybody feels: "
    "they rest on the words that people wrote beside similar pictures. Numbers in brackets are the equations of the "
    "paper that describes FACE-net."
)


def _names(results: Sequence[CaptionResult]) -> list[str]:
    """File names; with their folders where two are alike."""
    short = [Path(result.source).name if result.source else f"video {n}" for n, result in enumerate(results, 1)]
    often = Counter(short)
    return [
        result.source if result.source and often[name] > 1 else name
        for result, name in zip(results, short, strict=True)
    ]


def _notes(notes: Sequence[str]) -> Markup | None:
    if not notes:
        return None
    items = [element("li", f"{note[:1].upper()}{note[1:]}") for note in notes]
    heading = element("strong", "Note" if len(notes) == 1 else "Notes")
    return element("div", heading, element("ul", *items), class_="notes", role="note")


def _table(results: Sequence[CaptionResult], names: Sequence[str], common: Sequence[str]) -> Markup:
    """All videos at a glance, each with a link to its section."""
    heads = ["video", "caption", "likeliest emotion", "facts", "emotions"]
    pictured = any(result.pictures for result in results)
    rows = []
    for number, (result, name) in enumerate(zip(results, names, strict=True), 1):
        picture = _picture(result.pictures[len(result.pictures) // 2], "") if result.pictures else None
        own = [note for note in result.notes if note not in common]
        emotion = f"{result.emotions[0][0]} {percent(result.emotions[0][1])}" if result.emotions else _NOTHING
        gates = [_NOTHING if gate is None else f"{gate:.2f}" for gate in (result.fact_gate, result.emotion_gate)]
        link = element("a", element("bdi", name), href=f"#video-{number}")
        mark = element("small", "see its note" if len(own) == 1 else "see its notes") if own else None
        cells = [
            element("th", link, mark, scope="row", role="rowheader"),
            element("td", result.text or _NO_WORDS, role="cell", class_="said"),
            element("td", element("span", "likeliest emotion: ", class_="narrow"), emotion, role="cell"),
            element("td", element("span", "facts ", class_="narrow"), gates[0], role="cell", class_="gate"),
            element("td", element("span", "emotions ", class_="narrow"), gates[1], role="cell", class_="gate"),
        ]
        if pictured:
            cells.insert(0, element("td", picture, role="cell", class_="thumb"))
        rows.append(element("tr", *cells, role="row"))
    spare = [element("td", role="cell")] if pictured else []
    columns = [element("th", head, scope="col", role="columnheader") for head in heads]
    over = element(
        "tr",
        element("td", colspan=len(spare) + 3, role="cell"),
        element("th", "gates", colspan=2, scope="colgroup", role="columnheader"),
        role="row",
        class_="over",
    )
    return element(
        "table",
        element("thead", over, element("tr", *spare, *columns, role="row"), role="rowgroup"),
        element("tbody", *rows, role="rowgroup"),
        role="table",
        id="videos",
        aria_label="all videos",
    )


def _failures(failed: Mapping[str, str]) -> Markup | None:
    if not failed:
        return None
    reasons = [reason if source in reason else f"{source}: {reason}" for source, reason in failed.items()]
    items = [element("li", element("bdi", reason)) for reason in reasons]
    return element("section", element("h2", "Videos without a caption"), element("ul", *items), class_="panel failed")


def _section(result: CaptionResult, name: str, number: int, several: bool, notes: Sequence[str]) -> Markup:
    heading = f"caption-{number}"
    back = element("a", "all videos", href="#videos", class_="back") if several else None
    place = element("span", f"{number}", class_="place") if several else None
    return element(
        "article",
        element("p", place, element("bdi", name), back, class_="file"),
        element("h2", result.text or _NO_WORDS, id=heading),
        _notes(notes),
        _frames(result.pictures),
        element("div", _emotions(result), _gates(result), class_="columns"),
        _facts(result.retrieved),
        _curves(result),
        _timings(result),
        id=f"video-{number}",
        aria_labelledby=heading,
    )


def _panel(heading: str, hint: str | None, *content: Markup | None) -> Markup:
    said = None if hint is None else element("p", hint, class_="hint")
    return element("section", element("h3", heading), said, *content, class_="panel")


def _picture(picture: Picture, alt: str) -> Markup:
    data = base64.b64encode(picture.jpeg).decode("ascii")
    return element("img", src=f"data:image/jpeg;base64,{data}", width=picture.width, height=picture.height, alt=alt)


def _frames(pictures: Sequence[Picture]) -> Markup | None:
    if not pictures:
        return None
    items = [
        element(
            "li",
            element(
                "figure",
                _picture(picture, f"frame {rank} of {len(pictures)}"),
                element("figcaption", f"{picture.seconds:.2f}\u00a0s"),
            ),
        )
        for rank, picture in enumerate(pictures, 1)
    ]
    return element("ol", *items, class_="frames", role="list", aria_label="the frames that were looked at, by time")


def _emotions(result: CaptionResult) -> Markup | None:
    if not result.emotions:
        return None
    rows = [Bar(word, share, percent(share)) for word, share in result.emotions]
    drawing = bars(rows, end=nice_ceiling(max(row.value for row in rows)), kind="emotion")
    rest = None
    if result.emotion_words is not None and len(result.emotion_words) > len(rows):
        others = len(result.emotion_words) - len(rows)
        left = max(1 - sum(share for _, share in result.emotions), 0.0)
        said = f"The other {others} words share" if others > 1 else "The other word has"
        rest = element("p", f"{said} {percent(left)}.", class_="hint")
    return _panel("Emotions", "The words that fit the whole video best, by the model's classifier.", drawing, rest)


def _gates(result: CaptionResult) -> Markup | None:
    drawn = []
    gates = (("facts", result.fact_gate, 24), ("emotions", result.emotion_gate, 25))
    for name, value, equation in gates:
        if value is not None:
            label = f"gate of the {name}, equation {equation}: {value:.2f} on a scale from 0 to 1"
            drawn.append(gauge(value, name, label))
    if not drawn:
        return None
    hint = "How much of each passes on to the decoder: 0 is nothing, 1 is all; the mean |B| of (24) and (25)."
    if len(drawn) == 1:
        hint = "How much of it passes on to the decoder: 0 is nothing, 1 is all; the mean |B| of (24)."
    return _panel("Gates", hint, element("div", *drawn, class_="gauges"))


def _facts(facts: Sequence[RetrievedFact]) -> Markup:
    """The paper's Fig. 7: words' weights within each triplet as bars, triplets' weights as a pie."""
    if not facts:
        return _panel("Retrieved captions", "None: this model captions without retrieval.")
    weights = [weight for fact in facts for weight in fact.component_weights or ()]
    end = nice_ceiling(max(weights)) if weights else 1.0
    cards = [_fact(fact, rank, end) for rank, fact in enumerate(facts, 1)]
    hint = "The captions nearest to the video, each as a triplet of subject, predicate and object."
    if weights:
        hint += f" Bars: the weight {_ALPHA} of each word within its triplet (12); the line marks an equal share, 1/3."
    pie_card = None
    shares = [fact.triplet_weight for fact in facts]
    if None not in shares:
        hint += " Pie: the weight θ of each triplet (15)."
        pie_card = element("li", _pie(facts, shares), class_="whole")
    return _panel("Retrieved captions", hint, element("ol", pie_card, *cards, class_="facts", role="list"))


def _pie(facts: Sequence[RetrievedFact], shares: Sequence[float]) -> Markup:
    said = "; ".join(f"{rank}, {_triplet(fact)}: {percent(share)}" for rank, (fact, share) in _ranked(facts, shares))
    rows = [
        element(
            "li",
            _badge(rank),
            element("span", _triplet(fact)),
            element("span", percent(share), class_="value"),
        )
        for rank, (fact, share) in _ranked(facts, shares)
    ]
    drawing = pie(shares, f"weights of the triplets: {said}")
    return element("figure", drawing, element("ul", *rows, class_="legend", role="list", aria_hidden="true"))


def _ranked(facts: Sequence[RetrievedFact], shares: Sequence[float]) -> enumerate[tuple[RetrievedFact, float]]:
    return enumerate(zip(facts, shares, strict=True), 1)


def _fact(fact: RetrievedFact, rank: int, end: float) -> Markup:
    """The card of one retrieved caption; ``end`` is the weight of a bar's whole width."""
    if fact.component_weights is None:
        drawing = element("p", _triplet(fact), class_="triplet")
    else:
        rows = [
            Bar(word, weight, percent(weight), part)
            for word, weight, part in zip(fact.triplet, fact.component_weights, _PARTS, strict=True)
        ]
        drawing = bars(rows, end=end, kind="words", mark=1 / 3)
    figures = [("similarity to the video", f"{fact.similarity:.3f}")]
    if fact.triplet_weight is not None:
        figures.append(("weight θ", percent(fact.triplet_weight)))
    if fact.routing_weight is not None:
        figures.append(("mean routing weight (26)", percent(fact.routing_weight)))
    terms = [element("div", element("dt", name), element("dd", value)) for name, value in figures]
    return element(
        "li",
        element("p", _badge(rank), element("q", fact.caption), class_="quote"),
        drawing,
        _attended(fact.emotions),
        element("dl", *terms),
        class_=f"fact {series(rank)}",
    )


def _attended(emotions: Sequence[tuple[str, float]]) -> Markup | None:
    if not emotions:
        return None
    words = ", ".join(f"{word} {percent(share)}" for word, share in emotions[:3])
    return element("p", element("span", "attends most to "), words, class_="attended")


def _badge(rank: int) -> Markup:
    return element("span", str(rank), class_=f"badge {series(rank)}")


def _triplet(fact: RetrievedFact) -> str:
    return " · ".join(fact.triplet)


def _curves(result: CaptionResult) -> Markup | None:
    """The paper's Fig. 8: what each triplet attends to among the emotion words."""
    explanation = result.explanation
    if explanation is None or explanation.emotion_distribution is None:
        return None
    chosen = choose_curves(explanation.emotion_distribution[0].tolist(), result.emotion_words)
    names = [f"{rank}. {_triplet(fact)}" for rank, fact in enumerate(result.retrieved, 1)] or ["the video"]
    if len(names) != len(chosen.shares):
        raise ValueError(f"a result with {len(names)} triplets must have as many curves, got {len(chosen.shares)}")
    peaks = []
    for name, row in zip(names, chosen.shares, strict=True):
        best = max(range(len(row)), key=lambda index: row[index])
        peaks.append(f"{name}: most at {chosen.words[best]}, {percent(row[best])}")
    whose = "each triplet" if result.retrieved else "the video"
    hint = f"The attention of (19): how much of it {whose} gives to each emotion word. "
    if len(chosen.words) < chosen.total:
        hint += f"Drawn: the {len(chosen.words)} of {chosen.total} words with the highest peaks, largest mean first. "
    else:
        hint += f"All {chosen.total} words, largest mean first. " if chosen.total > 1 else ""
    if len(chosen.shares) > 1:
        hint += "Dashed: the mean of the triplets."
    drawing = curves(chosen, names, f"attention to emotion words. {'; '.join(peaks)}")
    frame = element("div", drawing, class_="scroll", tabindex=0, role="region", aria_label="curves of emotions")
    return _panel(f"Emotions that {whose} attends to", hint, frame, _numbers(chosen, names))


def _numbers(chosen: Curves, names: Sequence[str]) -> Markup:
    """The curves as a table, for those who would rather read."""
    heads = [element("th", "word", scope="col"), *(element("th", name, scope="col") for name in names)]
    rows = [
        element("tr", element("th", word, scope="row"), *(element("td", percent(row[place])) for row in chosen.shares))
        for place, word in enumerate(chosen.words)
    ]
    others = chosen.total - len(chosen.words)
    if others:
        label = f"the other {others} words together" if others > 1 else "the other word"
        rows.append(
            element("tr", element("th", label, scope="row"), *(element("td", percent(share)) for share in chosen.rest))
        )
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="numbers")
    return element(
        "details", element("summary", "The curves as numbers"), element("div", table, class_="scroll", tabindex=0)
    )


def _timings(result: CaptionResult) -> Markup | None:
    if not result.timings:
        return None
    rows = [Bar(stage, seconds, _duration(seconds)) for stage, seconds in result.timings.items()]
    total = sum(row.value for row in rows)
    hint = f"{_duration(total)} in all."
    if result.batch_size > 1:
        each = _duration(total / result.batch_size)
        hint = f"{_duration(total)} for the {result.batch_size} videos captioned together, {each} each."
    return _panel("Time", hint, bars(rows, end=max(row.value for row in rows) or 1.0, kind="time"))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f}\u00a0s" if seconds >= 10 else f"{1e3 * seconds:.1f}\u00a0ms"
