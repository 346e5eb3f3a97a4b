"""The page of a report: well-formed, self-contained, everything escaped, and every drawn number the result's own."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from evc_fast.model.output import Explanation
from evc_fast.report import write_report
from evc_fast.report.charts import MOST_WORDS, nice_ceiling
from evc_fast.report.markup import Markup, element, number, percent
from evc_fast.report.style import STYLE
from evc_fast.results import STAGES, CaptionResult, Picture, RetrievedFact

VOID = {"img", "meta"}
JPEG = bytes.fromhex("ffd8ffd9")  # only whether it comes through unchanged matters here


class Node:
    def __init__(self, name, attributes, parent):
        self.name, self.attributes, self.parent = name, attributes, parent
        self.children = []

    def all(self, name=None, kind=None):
        """Elements below, by name and by one of their classes, in order."""
        for child in self.children:
            if isinstance(child, Node):
                classes = (child.attributes.get("class") or "").split()
                if name in (None, child.name) and (kind is None or kind in classes):
                    yield child
                yield from child.all(name, kind)

    def one(self, name=None, kind=None):
        found = list(self.all(name, kind))
        assert len(found) == 1, (name, kind, len(found))
        return found[0]

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def __getitem__(self, key):
        return self.attributes[key]


class Page(HTMLParser):
    """A tree of the page; an element that is closed by another's tag, or twice given an attribute, is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.root = self.at = Node("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.root, f"{self.at.name} is never closed"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.at = self.at.children[-1]

    def handle_startendtag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.at.children.append(Node(tag, dict(attrs), self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.name, f"{self.at.name} is closed by {tag}"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def result(k=3, words=6, *, seed=0, named=True, **changes):
    """A result with K triplets and W emotion words, its weights random."""
    generator = torch.Generator().manual_seed(seed)

    def shares(*size):
        return (3 * torch.randn(*size, generator=generator)).softmax(-1)

    names = tuple(f"word{index}" for index in range(words))
    alpha, theta, attention = shares(1, k, 3), shares(1, k), shares(1, max(k, 1), words)
    likely = shares(words).sort(descending=True)
    facts = tuple(
        RetrievedFact(
            caption=f"caption {rank}",
            triplet=(f"subject{rank}", f"verb{rank}", f"object{rank}"),
            similarity=0.9 - 0.1 * rank,
            component_weights=tuple(alpha[0, rank].tolist()),
            triplet_weight=theta[0, rank].item(),
            routing_weight=1 / k,
            emotions=((names[0], 0.25), (names[-1], 0.125)),
        )
        for rank in range(k)
    )
    explanation = Explanation(
        alpha if k else None,
        theta if k else None,
        torch.full((1, 4, max(k, 1)), 1 / max(k, 1)),
        attention,
        torch.rand(1, 8),
        torch.rand(1, 8),
    )
    made = CaptionResult(
        text=f"a man runs happily {seed}",
        ids=torch.arange(4),
        retrieved=facts,
        emotions=tuple((names[i], likely.values[place].item()) for place, i in enumerate(likely.indices[:3].tolist())),
        fact_gate=0.6321,
        emotion_gate=0.25,
        explanation=explanation,
        timings={stage: 0.001 * 4**place for place, stage in enumerate(STAGES)},
        notes=("the model knows nothing",),
        source=f"/videos/clip{seed}.mp4",
        emotion_words=names if named else None,
        pictures=tuple(Picture(JPEG, 0.5 * place, 16, 12) for place in range(4)),
    )
    return dataclasses.replace(made, **changes)


def read(tmp_path, *results, **options):
    path = tmp_path / "page.html"
    write_report(results, path, **options)
    return Page(path.read_text(encoding="utf-8")).root


def width(bar):
    """The share of a bar's frame that is filled."""
    assert bar["width"].endswith("%")
    return float(bar["width"][:-1]) / 100


def points(drawing):
    return [tuple(map(float, pair.split(","))) for pair in drawing["points"].split()]


def test_the_page_needs_nothing_but_itself(tmp_path):
    path = tmp_path / "page.html"
    write_report([result(seed=seed) for seed in range(3)], path, title="Mine")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<iframe|javascript:|\bon[a-z]+=", text)
    assert set(re.findall(r"url\([^)]*\)", text)) == set()
    page = Page(text).root
    assert page.one("head").one("title").text == page.one("h1").text == "Mine"
    policies = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert [policy["content"] for policy in policies] == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    ]
    assert [meta["charset"] for meta in page.all("meta") if "charset" in meta.attributes] == ["utf-8"]
    for picture in page.all("img"):
        kind, data = picture["src"].split(",", 1)
        assert kind == "data:image/jpeg;base64"
        assert base64.b64decode(data, validate=True) == JPEG
        assert "alt" in picture.attributes
    ids = [node["id"] for node in page.all() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)


def test_frames_come_in_order_with_their_times(tmp_path):
    frames = read(tmp_path, result()).one("ol", "frames")
    assert [frame.text for frame in frames.all("figcaption")] == [
        f"{time}\u00a0s" for time in ("0.00", "0.50", "1.00", "1.50")
    ]
    assert [frame["alt"] for frame in frames.all("img")] == [f"frame {rank} of 4" for rank in (1, 2, 3, 4)]
    assert {(frame["width"], frame["height"]) for frame in frames.all("img")} == {("16", "12")}


NASTY = """<script>alert("1")</script> & 'a' </style> &lt; --> ]]> \u202e \x00 \x1b[31m \udc80 ü"""


def test_whatever_a_result_says_is_text(tmp_path):
    """Captions, file names, words of the dictionary, notes and the title: shown as they are, never run."""
    nasty = result(k=1, words=2)
    nasty = dataclasses.replace(
        nasty,
        text=NASTY,
        source=f"/videos/{NASTY.replace('/', '')}.mp4",
        notes=(NASTY,),
        emotions=((NASTY, 0.5),),
        emotion_words=(NASTY, "calm"),
        retrieved=(
            dataclasses.replace(nasty.retrieved[0], caption=NASTY, triplet=(NASTY,) * 3, emotions=((NASTY, 0.5),)),
        ),
        timings={NASTY: 0.1},
    )
    shown = re.sub("[\x00\x1b\udc80]", "\ufffd", NASTY)
    page = read(tmp_path, nasty, dataclasses.replace(nasty, source=None, text="other"), title=NASTY)
    assert not list(page.all("script"))
    assert page.one("head").one("title").text == page.one("h1").text == shown
    assert next(page.all("h2")).text == shown
    assert next(page.all("q")).text == shown
    assert next(page.all("bdi")).text == shown.replace("/", "") + ".mp4"
    assert page.one("div", "notes").one("li").text == shown  # common to both
    assert next(page.one("style").all(), None) is None
    assert [label.one("b").text for label in page.all("span", "label")][:2] == [shown, shown]
    assert shown in next(page.all("svg", "pie"))["aria-label"]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_words_and_triplets_are_drawn_as_heavy_as_they_are(tmp_path, k):
    """Fig. 7: alpha as bars, theta as a pie, the same numbers beside them."""
    given = result(k)
    page = read(tmp_path, given)
    cards = list(page.all("li", "fact"))
    assert len(cards) == k
    weights = [weight for fact in given.retrieved for weight in fact.component_weights]
    end = nice_ceiling(max(weights))
    for fact, card in zip(given.retrieved, cards, strict=True):
        assert card.one("q").text == fact.caption
        rows = list(card.one("ul", "words").all("li"))
        assert len(rows) == 3
        for row, word, weight, part in zip(
            rows, fact.triplet, fact.component_weights, ("subject", "predicate", "object"), strict=True
        ):
            assert (row.one("b").text, row.one("small").text) == (word, part)
            assert row.one("span", "value").text == percent(weight)
            assert width(row.one("rect", "fill")) * end == pytest.approx(weight, abs=2e-6)
            mark = row.one("line", "mark")
            assert float(mark["x1"][:-1]) / 100 * end == pytest.approx(1 / 3, abs=2e-6)
        said = card.one("dl").text
        assert f"{fact.similarity:.3f}" in said
        assert percent(fact.triplet_weight) in said
        assert percent(fact.routing_weight) in said
        assert "word0 25.0\u00a0%, word5 12.5\u00a0%" in card.one("p", "attended").text
    theta = [fact.triplet_weight for fact in given.retrieved]
    assert slices(page.one("svg", "pie")) == pytest.approx([weight / sum(theta) for weight in theta], abs=1e-6)
    legend = [row.one("span", "value").text for row in page.one("ul", "legend").all("li")]
    assert legend == [percent(weight) for weight in theta]


def slices(pie):
    """The share of each slice, from its corners."""
    if circles := list(pie.all("circle", "slice")):
        assert len(circles) == 1
        assert not list(pie.all("path"))
        return [1.0]
    turns, angles = [], []
    for path in pie.all("path", "slice"):
        numbers = re.fullmatch(r"M0 0L(\S+) (\S+)A100 100 0 ([01]) 1 (\S+) (\S+)Z", path["d"]).groups()
        x0, y0, x1, y1 = (float(numbers[place]) for place in (0, 1, 3, 4))
        begin, end = math.atan2(x0, -y0), math.atan2(x1, -y1)
        turns.append((end - begin) % (2 * math.pi) / (2 * math.pi))
        assert (turns[-1] > 0.5) == (numbers[2] == "1")
        angles.append((begin % (2 * math.pi), end % (2 * math.pi)))
    for (_, end), (begin, _) in itertools.pairwise(angles):
        assert math.cos(end - begin) == pytest.approx(1)
    return turns


def test_a_slice_of_more_than_half_and_one_too_thin_to_hold_its_number(tmp_path):
    facts = [
        dataclasses.replace(fact, triplet_weight=weight)
        for fact, weight in zip(result(3).retrieved, (0.01, 0.97, 0.02), strict=True)
    ]
    pie = read(tmp_path, result(3, retrieved=tuple(facts))).one("svg", "pie")
    assert slices(pie) == pytest.approx([0.01, 0.97, 0.02], abs=1e-6)
    assert [text["class"] for text in pie.all("text")] == ["outside", "inside", "outside"]
    none = [dataclasses.replace(fact, triplet_weight=0.0) for fact in facts]
    assert not list(read(tmp_path, result(3, retrieved=tuple(none))).one("svg", "pie").all("path"))


@pytest.mark.parametrize("k, words", [(1, 1), (1, 4), (3, 6), (5, 179), (4, MOST_WORDS + 1)])
def test_curves_are_the_attention_over_the_words(tmp_path, k, words):
    """Fig. 8: a curve a triplet over the words that any of them attends to most, and the same numbers in a table."""
    given = result(k, words)
    page = read(tmp_path, given)
    shares = given.explanation.emotion_distribution[0]
    drawing = page.one("svg", "curves")
    labels = [text.text for text in drawing.all("text", "word")]
    assert len(labels) == len(set(labels)) == min(words, MOST_WORDS)
    columns = [given.emotion_words.index(label) for label in labels]
    kept = shares.amax(0).topk(len(labels)).values
    assert sorted(shares.amax(0)[columns].tolist()) == pytest.approx(sorted(kept.tolist()))
    means = shares.mean(0)[columns].tolist()
    assert means == sorted(means, reverse=True)
    titles = [title.text for title in drawing.all("text", "title")]
    assert titles == [f"{rank}. subject{rank - 1} · verb{rank - 1} · object{rank - 1}" for rank in range(1, k + 1)]
    end = nice_ceiling(shares.max().item())
    scales = [text.text for text in drawing.all("text", "scale")]
    assert scales == [f"{number(100 * end * part)}\u00a0%" for part in (0, 0.5, 1)] * k
    lines = list(drawing.all("polyline", "curve"))
    assert len(lines) == k
    bases = [float(line["y1"]) for line in drawing.all("line", "base")]
    tops = [min(float(line["y1"]) for line in line.parent.all("line", "grid")) for line in lines]
    for rank, (line, base, top) in enumerate(zip(lines, bases, tops, strict=True)):
        drawn = [(base - y) / (base - top) * end for _, y in points(line)]
        assert drawn == pytest.approx(shares[rank, columns].tolist(), abs=1e-5)
        said = [circle.one("title").text for circle in line.parent.all("g", "point")]
        assert said == [f"{word}: {percent(shares[rank, i].item())}" for word, i in zip(labels, columns, strict=True)]
        best = shares[rank].argmax().item()
        assert line.parent.one("text", "peak").text == f"word{best} {percent(shares[rank, best].item())}"
        if k > 1:
            mean = [(base - y) / (base - top) * end for _, y in points(line.parent.one("polyline", "mean"))]
            assert mean == pytest.approx(means, abs=1e-5)
        else:
            assert not list(drawing.all("polyline", "mean"))
    table = page.one("table", "numbers")
    rows = list(table.one("tbody").all("tr"))
    assert [row.one("th").text for row in rows[: len(labels)]] == labels
    assert [cell.text for cell in rows[0].all("td")] == [percent(share) for share in shares[:, columns[0]].tolist()]
    if words > MOST_WORDS:
        left = (1 - shares[:, columns].sum(1)).tolist()
        assert [cell.text for cell in rows[-1].all("td")] == [percent(max(share, 0)) for share in left]
    assert [text.text for text in drawing.all("text", "axis")] == ["emotion word", "share of attention"]
    height = float(drawing["viewbox"].split()[3])
    assert all(0 <= float(text["y"]) <= height for text in drawing.all("text") if "y" in text.attributes)


def test_emotions_gates_and_times(tmp_path):
    given = result(words=6, batch_size=4)
    page = read(tmp_path, given)
    rows = list(page.one("ul", "emotion").all("li"))
    end = nice_ceiling(given.emotions[0][1])
    for row, (word, share) in zip(rows, given.emotions, strict=True):
        assert (row.one("b").text, row.one("span", "value").text) == (word, percent(share))
        assert width(row.one("rect", "fill")) * end == pytest.approx(share, abs=2e-6)
    left = 1 - sum(share for _, share in given.emotions)
    assert f"The other 3 words share {percent(left)}." in page.text
    for name, value in (("facts", 0.6321), ("emotions", 0.25)):
        gauge = page.one("svg", f"of-{name}")
        assert float(gauge.one("path", "fill")["stroke-dasharray"].split()[0]) == pytest.approx(value, abs=1e-4)
        assert gauge.one("text", "reading").text == f"{value:.2f}"
        assert f"gate of the {name}" in gauge["aria-label"]
    rows = list(page.one("ul", "time").all("li"))
    assert [row.one("b").text for row in rows] == list(STAGES)
    longest = max(given.timings.values())
    assert [width(row.one("rect", "fill")) for row in rows] == pytest.approx(
        [seconds / longest for seconds in given.timings.values()], abs=1e-6
    )
    assert "341.0\u00a0ms for the 4 videos captioned together, 85.2\u00a0ms each" in page.text


def test_many_videos_have_a_table_whose_links_lead_to_them(tmp_path):
    results = [result(seed=seed) for seed in range(4)]
    results[1] = dataclasses.replace(results[1], notes=(*results[1].notes, "damaged"), emotions=(), emotion_gate=None)
    results[2] = dataclasses.replace(results[2], source="/other/clip0.mp4")
    results[3] = dataclasses.replace(results[3], source=None, text="", pictures=())
    page = read(tmp_path, *results)
    ids = {node["id"]: node for node in page.all() if "id" in node.attributes}
    rows = list(ids["videos"].one("tbody").all("tr"))
    assert len(rows) == 4
    names = []
    for row, given in zip(rows, results, strict=True):
        link = row.one("a")
        names.append(link.text)
        section = ids[link["href"].removeprefix("#")]
        assert section.name == "article"
        assert section.one("h2").text == row.one("td", "said").text == (given.text or "(no words)")
        assert section.one("p", "file").one("bdi").text == link.text
        assert section.one("a", "back")["href"] == "#videos"
        assert ids[section["aria-labelledby"]] is section.one("h2")
        shown = [cell.text.split()[-1] for cell in row.all("td", "gate")]
        gates = (given.fact_gate, given.emotion_gate)
        assert shown == ["\u2013" if gate is None else f"{gate:.2f}" for gate in gates]
        assert len(list(row.all("img"))) == bool(given.pictures)
    assert names == ["/videos/clip0.mp4", "clip1.mp4", "/other/clip0.mp4", "video 4"]
    assert results[0].emotions[0][0] in rows[0].text
    assert ["see its note" in row.text for row in rows] == [False, True, False, False]
    assert page.one("header").one("div", "notes").one("li").text == "The model knows nothing"
    assert ids["video-2"].one("div", "notes").one("li").text == "Damaged"
    assert len(list(page.all("div", "notes"))) == 2


def test_videos_without_a_caption_are_listed(tmp_path):
    page = read(tmp_path, result(), failed={"<a>.mp4": "it breaks off & ends", "b.mp4": "there is no b.mp4"})
    reasons = [item.text for item in page.one("section", "failed").all("li")]
    assert reasons == ["<a>.mp4: it breaks off & ends", "there is no b.mp4"]
    assert "1 video, 2 more without a caption" in page.one("header").text
    assert not list(read(tmp_path, result()).all("section", "failed"))


def test_one_video_has_no_table_and_its_notes_on_top(tmp_path):
    page = read(tmp_path, result(notes=("first", "second")))
    assert not [node for node in page.all("table") if node.attributes.get("id") == "videos"]
    assert not list(page.all("a"))
    assert [note.text for note in page.one("header").one("div", "notes").all("li")] == ["First", "Second"]
    assert not list(read(tmp_path, result(notes=())).all("div", "notes"))


def test_what_a_result_lacks_is_left_out(tmp_path):
    headings = ["Emotions", "Gates", "Retrieved captions", "Emotions that each triplet attends to", "Time"]

    def shown(given):
        return [heading.text for heading in read(tmp_path, given).all("h3")]

    full = result()
    assert shown(full) == headings
    bare = [dataclasses.replace(fact, component_weights=None, triplet_weight=None, routing_weight=None, emotions=())
            for fact in full.retrieved]  # fmt: skip
    unexplained = dataclasses.replace(full, retrieved=tuple(bare), explanation=None, fact_gate=None, emotion_gate=None)
    page = read(tmp_path, unexplained)
    assert shown(unexplained) == ["Emotions", "Retrieved captions", "Time"]
    assert not list(page.all("svg", "pie"))
    assert next(page.all("p", "triplet")).text == "subject0 · verb0 · object0"
    plain = dataclasses.replace(
        full,
        emotions=(),
        emotion_gate=None,
        explanation=full.explanation._replace(emotion_distribution=None, emotion_gate=None),
    )
    assert shown(plain) == ["Gates", "Retrieved captions", "Time"]
    assert len(list(read(tmp_path, plain).all("svg", "gauge"))) == 1
    alone = result(k=0)
    assert shown(alone) == [*headings[:3], "Emotions that the video attends to", "Time"]
    page = read(tmp_path, alone)
    assert "captions without retrieval" in page.text
    assert [title.text for title in page.all("text", "title")] == ["the video"]
    nothing = dataclasses.replace(unexplained, retrieved=(), emotions=(), timings={}, pictures=(), text="")
    page = read(tmp_path, nothing)
    assert page.one("h2").text == "(no words)"
    assert not list(page.all("svg"))


def test_words_without_a_dictionary_are_numbered(tmp_path):
    page = read(tmp_path, result(k=2, words=3, named=False))
    assert {text.text for text in page.one("svg", "curves").all("text", "word")} == {f"emotion {i}" for i in range(3)}
    assert "The other" not in page.text


def test_what_cannot_be_reported_is_refused(tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(ValueError, match="results must hold at least one caption to report, got none"):
        write_report([], path)
    with pytest.raises(TypeError, match="results must be a list of caption results, got one result"):
        write_report(result(), path)
    with pytest.raises(TypeError, match="results must be caption results, got str"):
        write_report([result(), "caption"], path)
    with pytest.raises(IsADirectoryError, match="path must be a file to write the report into"):
        write_report([result()], tmp_path)
    with pytest.raises(ValueError, match="a result with 2 triplets must have as many curves, got 3"):
        write_report([result(retrieved=result().retrieved[:2])], path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "folder" / "page.html"
    write_report([result()], path)
    before = path.read_bytes()

    def broken_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", broken_off)
    with pytest.raises(KeyboardInterrupt):
        write_report([result(seed=1)], path)
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == ["page.html"]


def brightness(colour):
    """Relative luminance of "#rrggbb", as WCAG has it."""
    levels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_their_background():
    light, dark = (dict(re.findall(r"--(\S+): (#\w{6});", block)) for block in re.findall(r":root {[^}]*}", STYLE)[:2])
    assert set(dark) == set(light)
    for colours in (light, dark):
        series = [colours[f"t{rank}"] for rank in range(1, 7)]
        for text in (*(colours[name] for name in ("ink", "soft", "fact")), *series):
            assert contrast(text, colours["panel"]) >= 4.5
        for text in ("ink", "soft", "fact"):
            assert contrast(colours[text], colours["page"]) >= 4.5
        assert contrast(colours["ink"], colours["note"]) >= 4.5
        assert contrast(colours["note-edge"], colours["page"]) >= 3
        for area in series:
            assert contrast(area, colours["on"]) >= 4.5  # the number in a slice
            assert contrast(area, colours["track"]) >= 3
        for area in ("emotion", "fact", "time"):
            assert contrast(colours[area], colours["track"]) >= 3


def test_elements_escape_what_is_not_markup():
    assert element("p", "<b>", Markup("<b>x</b>"), None, class_='a"b', hidden=True, title=None, tabindex=0) == (
        '<p class="a&quot;b" hidden tabindex="0">&lt;b&gt;<b>x</b></p>'
    )
    assert element("line", x1=0.5, aria_hidden="true") == '<line x1="0.5" aria-hidden="true"/>'
    with pytest.raises(ValueError, match="the element line has no content"):
        element("line", "x")
    assert [number(value) for value in (-0.00001, 1.0, 1 / 3, 100)] == ["0", "1", "0.3333", "100"]
    assert [percent(value) for value in (0, 0.0001, 0.34567, 1)] == [
        "0.0\u00a0%", "< 0.1\u00a0%", "34.6\u00a0%", "100.0\u00a0%"
    ]  # fmt: skip


@pytest.mark.parametrize("value, end", [(0, 1), (0.2, 0.2), (0.21, 0.25), (0.26, 0.5), (0.51, 1), (1, 1), (7, 10)])
def test_scales_end_at_a_round_number(value, end):
    assert nice_ceiling(value) == pytest.approx(end)
