"""Two runs compared, and METEOR's Java program: there, absent, broken."""

from __future__ import annotations

import json
import shutil
import stat
import sys

import numpy as np
import pytest

pytest.importorskip("pycocoevalcap", reason="needs the packages of evc-fast[metrics]")

from evc_fast.data.emotions import EmotionDictionary
from evc_fast.metrics import METRICS, MetricsError, evaluate
from evc_fast.metrics.captions import plain_text, score_captions
from evc_fast.metrics.compare import Difference, compare
from evc_fast.metrics.meteor import Meteor, MeteorUnavailable, start_meteor

DICTIONARY = EmotionDictionary({"joy": ["happy"], "sadness": ["sad"]})
THINGS = ["man", "woman", "dog", "cat", "girl", "boy", "bird", "horse"]
PLACES = ["park", "house", "street", "garden", "room", "field"]
VIDEOS = [(f"{thing}-{place}", thing, place) for thing in THINGS for place in PLACES]
REFERENCES = {
    video_id: [f"a happy {thing} runs in the {place}", f"the {thing} is running through a {place} happy as can be"]
    for video_id, thing, place in VIDEOS
}
GOOD = {video_id: f"a happy {thing} runs in the {place}" for video_id, thing, place in VIDEOS}
# Right for every second video, otherwise the wrong thing in the wrong place with the wrong emotion.
POOR = {
    video_id: GOOD[video_id] if number % 2 else "a sad owl sits on a tree" for number, video_id in enumerate(REFERENCES)
}


def test_the_trace_that_bleu_leaves_where_nothing_matches_is_no_difference():
    assert not Difference(0.014, 0.001, -0.013, -0.017, -0.001).excludes_zero
    assert Difference(0.0, 0.1, 0.1, 0.05, 0.2).excludes_zero and Difference(0.1, 0.0, -0.1, -0.2, -0.05).excludes_zero


def test_a_difference_that_is_there_excludes_zero_and_one_that_is_not_does_not():
    found = compare(POOR, GOOD, REFERENCES, DICTIONARY, samples=300, meteor=False)
    first = evaluate(POOR, REFERENCES, DICTIONARY, meteor=False).overall
    second = evaluate(GOOD, REFERENCES, DICTIONARY, meteor=False).overall
    assert tuple(found.differences) == METRICS
    for metric, difference in found.differences.items():
        if metric == "METEOR":
            assert difference is None
            continue
        assert (difference.first, difference.second) == pytest.approx((first[metric], second[metric]))
        assert difference.difference == pytest.approx(second[metric] - first[metric])
        assert 0 < difference.low < difference.difference < difference.high and difference.excludes_zero
    # Half of the videos are right: of 48 drawn, between 2.5 and 97.5 % of the time 17 to 31 are.
    accuracy = found.differences["Acc_sw"]
    assert 100 * (1 - 33 / 48) < accuracy.low < 100 * (1 - 29 / 48)
    assert 100 * (1 - 19 / 48) < accuracy.high < 100 * (1 - 15 / 48)
    same = compare(GOOD, GOOD, REFERENCES, DICTIONARY, samples=50, meteor=False)
    for difference in same.differences.values():
        if difference is not None:
            assert (difference.difference, difference.low, difference.high) == (
                0,
                0,
                0,
            ) and not difference.excludes_zero


def test_the_bootstrap_is_seeded_and_paired():
    a = compare(POOR, GOOD, REFERENCES, DICTIONARY, samples=100, seed=7, meteor=False)
    b = compare(POOR, GOOD, REFERENCES, DICTIONARY, samples=100, seed=7, meteor=False)
    c = compare(POOR, GOOD, REFERENCES, DICTIONARY, samples=100, seed=8, meteor=False)
    assert a == b and a != c
    narrow = compare(POOR, GOOD, REFERENCES, DICTIONARY, samples=100, seed=7, level=0.5, meteor=False)
    assert a.differences["CFS"].low < narrow.differences["CFS"].low
    assert narrow.differences["CFS"].high < a.differences["CFS"].high
    # Turned round, the same videos are drawn: the interval is mirrored.
    turned = compare(GOOD, POOR, REFERENCES, DICTIONARY, samples=100, seed=7, meteor=False).differences["BLEU-4"]
    assert (-turned.high, -turned.low) == pytest.approx((a.differences["BLEU-4"].low, a.differences["BLEU-4"].high))


def test_a_comparison_as_json_and_table():
    found = compare(POOR, GOOD, REFERENCES, DICTIONARY, samples=40, seed=3, meteor=False, names=("nearest", "model"))
    content = json.loads(found.to_json())
    assert content["names"] == ["nearest", "model"] and content["videos"] == len(REFERENCES)
    assert content["bootstrap"] == {"samples": 40, "seed": 3, "level": 0.95, "paired": True}
    assert content["differences"]["METEOR"] is None and content["differences"]["CIDEr"]["excludes_zero"] is True
    lines = found.table().splitlines()
    assert "48 videos" in lines[0] and "95 % intervals" in lines[0] and "seed 3" in lines[0]
    assert lines[1].split() == ["nearest", "model", "difference", "interval"]
    assert lines[2].startswith("Acc_sw") and lines[2].endswith("*")
    assert lines[8].split() == ["METEOR", "not", "computed", "not", "computed"]
    assert lines[-1] == "METEOR: not computed (left out)"


def test_runs_that_do_not_fit_the_references_are_refused():
    lacking = {video_id: text for video_id, text in GOOD.items() if video_id != "dog-park"}
    with pytest.raises(MetricsError, match="1 of 48 videos have no caption: dog-park"):
        compare(GOOD, lacking, REFERENCES, DICTIONARY)
    with pytest.raises(MetricsError, match="without references: other"):
        compare({**GOOD, "other": "x"}, GOOD, REFERENCES, DICTIONARY)
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        compare(GOOD, GOOD, REFERENCES, DICTIONARY, samples=1)
    with pytest.raises(ValueError, match=r"level must be between 0 and 1, got 95"):
        compare(GOOD, GOOD, REFERENCES, DICTIONARY, level=95)


SMALL = {"a": ["a happy man runs"], "b": ["a sad dog sits", "the dog is sad"]}
CAPTIONS = {"a": "a man runs", "b": ""}


def put_java(monkeypatch, tmp_path, body: str | None) -> None:
    """A PATH on which `java` is a script of ours, or nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if body is not None:
        program = folder / "java"
        program.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_without_java_meteor_is_not_computed_and_all_else_is(monkeypatch, tmp_path):
    put_java(monkeypatch, tmp_path, None)
    scores = evaluate(CAPTIONS, SMALL, DICTIONARY)
    assert scores.overall["METEOR"] is None and scores.per_video["a"]["METEOR"] is None
    (note,) = scores.notes
    assert note == "METEOR: not computed (METEOR 1.5 is a Java program, and there is no java on the PATH)"
    assert json.loads(scores.to_json())["overall"]["METEOR"] is None
    assert "not computed" in scores.table() and note in scores.table()
    assert all(value is not None for metric, value in scores.overall.items() if metric != "METEOR")
    found = compare(CAPTIONS, CAPTIONS, SMALL, DICTIONARY, samples=5)
    assert found.differences["METEOR"] is None and found.notes == [note]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('Invalid maximum heap size: -Xmx2G')", "gave no answer: Invalid maximum heap size: -Xmx2G"),
        ("sys.exit()", "gave no answer: it said nothing"),
        ("sys.stdin.readline(); print('Error: no such thing', flush=True)", "gave no answer"),
        ("print('1.0 ' * 23, flush=True); sys.stdin.readline(); sys.exit('out of memory')", "no answer: out of memory"),
    ],
)
def test_a_java_that_breaks_is_a_note_and_not_an_error(monkeypatch, tmp_path, body, message):
    put_java(monkeypatch, tmp_path, body)
    scores = evaluate(CAPTIONS, SMALL, DICTIONARY)
    assert scores.overall["METEOR"] is None and scores.overall["BLEU-1"] > 0
    assert len(scores.notes) == 1 and message in scores.notes[0]


def test_a_java_that_does_not_start_or_answer_is_given_up(monkeypatch, tmp_path):
    put_java(monkeypatch, tmp_path, "import time; time.sleep(600)")
    with Meteor(timeout_s=0.2) as program, pytest.raises(MeteorUnavailable, match="gave no answer"):
        program.statistics("a man", ["a man"])
    (tmp_path / "bin" / "java").write_text("#!/no/such/interpreter\n")
    with pytest.raises(MeteorUnavailable, match="does not start"):
        Meteor()


FAKE = """
for line in sys.stdin:
    kind, *parts = [part.strip() for part in line.split("|||")]
    if kind == "SCORE":  # how many words references and caption have
        print(*[float(len(part.split())) for part in (" ".join(parts[:-1]), parts[-1])], *[0.0] * 21, flush=True)
    else:
        rows = [[float(value) for value in part.split()] for part in parts]
        rows.append([sum(column) for column in zip(*rows)])
        print(*[row[1] / row[0] for row in rows], sep=chr(10), flush=True)
"""


def test_what_is_asked_of_meteor_and_what_is_made_of_its_answers(monkeypatch, tmp_path, capfd):
    put_java(monkeypatch, tmp_path, FAKE)
    scores = evaluate(CAPTIONS, SMALL, DICTIONARY)
    assert scores.per_video["a"]["METEOR"] == 75 and scores.per_video["b"]["METEOR"] == 0
    assert scores.overall["METEOR"] == pytest.approx(100 * 3 / 12)  # of summed counts, not the mean
    other = {"a": "a", "b": "a sad dog sits"}
    found = compare(CAPTIONS, other, SMALL, DICTIONARY, samples=200).differences["METEOR"]
    assert (found.first, found.second) == pytest.approx((100 * 3 / 12, 100 * 5 / 12))
    # Only three corpora can be drawn: a twice, b twice, and both.
    assert found.low == pytest.approx(25 - 75) and found.high == pytest.approx(50)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor_is_that_of_pycocoevalcap_and_its_sums_are_too(capfd):
    from pycocoevalcap.meteor.meteor import Meteor as Wrapper

    # Word for word, one chunk of the reference, a chunk that is all of a shorter reference, inflected, and nothing.
    poor = {**POOR, "man-house": "a happy man runs", "woman-park": "the happy woman runs in a park in the rain"}
    poor |= {"man-park": "", "dog-room": "the dogs ran, happily, across this field"}
    written = {video_id: [plain_text(text) for text in texts] for video_id, texts in REFERENCES.items()}
    generated = {video_id: [plain_text(poor[video_id])] for video_id in REFERENCES}
    overall, each = Wrapper().compute_score(written, generated)
    with start_meteor() as program:
        found = score_captions(poor, REFERENCES, program)
        assert found.notes == []
        assert found.overall["METEOR"] == pytest.approx(100 * overall, rel=1e-12)
        assert found.per_video["METEOR"].tolist() == pytest.approx([100 * value for value in each], rel=1e-12)
        assert found.per_video["METEOR"][list(REFERENCES).index("man-park")] == 0
        corpora = [slice(None), slice(0, 1), slice(1, 3), slice(0, 20), slice(5, None, 3)]
        sums = np.stack([found.meteor_statistics[part].sum(axis=0) for part in corpora])
        statistics = np.stack([program.statistics(generated[name][0], written[name]) for name in REFERENCES])
        corpus = [program.scores(statistics[part])[1] for part in corpora]
        assert program.scores(sums)[0].tolist() == pytest.approx(corpus, rel=1e-12)
    assert capfd.readouterr().out == ""
