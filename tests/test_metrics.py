"""Every metric on examples worked by hand, against pycocoevalcap, and against the paper's own table."""

from __future__ import annotations

import json
import math
import random
import sys

import numpy as np
import pytest

pytest.importorskip("pycocoevalcap", reason="needs the packages of evc-fast[metrics]")

from evc_fast.data.caption_files import read_hypotheses
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.metrics import METRICS, MetricsError, Scores, evaluate
from evc_fast.metrics.captions import corpus_bleu, plain_text, resampled, score_captions
from evc_fast.metrics.emotions import accuracies, bfs, cfs, count_emotions
from evc_fast.metrics.meteor import MeteorUnavailable
from evc_fast.metrics.published import INCONSISTENT, TABLE_1, recognise

DICTIONARY = EmotionDictionary(
    {
        "anger": ["angry"],
        "awe": ["amazed"],
        "joy": ["glad", "happy"],
        "sadness": ["sad"],
        "surprise": ["amazed", "startled"],
    }
)
NO_METEOR = MeteorUnavailable("left out")


def random_captions(videos: int, each: int, seed: int = 0) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions that share many n-grams, punctuation and length beyond 15 words included, and one that is empty."""
    draw = random.Random(seed)
    words = ["A", "the", "man,", "woman", "dog", "plays", "sits", "on", "guitar", "joy!", "sad", "amazed", "angry"]

    def caption() -> str:
        return " ".join(draw.choices(words, k=draw.randint(2, 18)))

    references = {f"video{number}": [caption() for _ in range(each)] for number in range(videos)}
    hypotheses = {video_id: draw.choice([caption(), *texts]) for video_id, texts in references.items()}
    return {**hypotheses, "video3": ""}, references


def test_bleu_by_hand():
    # 4 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 quadruple are in a reference; of 5 and 2 words, 5 are closer.
    found = score_captions(
        {"a": "A man plays guitar."}, {"a": ["a man plays the guitar", "man, plays"]}, NO_METEOR
    ).overall
    brevity = math.exp(1 - 5 / 4)
    expected = [brevity, math.sqrt(2 / 3) * brevity, (1 / 3) ** (1 / 3) * brevity, 0]
    assert [found[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx([100 * value for value in expected], abs=0.02)


def test_rouge_by_hand():
    # The longest common subsequence has 4 words: precision 1, recall 4/5, beta 1.2.
    found = score_captions({"a": "a man plays guitar"}, {"a": ["a man plays the guitar"]}, NO_METEOR)
    assert found.overall["ROUGE-L"] == pytest.approx(100 * 2.44 * 0.8 / (0.8 + 1.44))


def test_cider_by_hand():
    # Each n-gram is in one of two documents, so all weigh log 2. a: cosine 1 for single words, no pairs. b: words
    # (cat, sits) and (cat, runs), cosine 1/2, no pair in common. Ten times the mean over n = 1..4.
    found = score_captions({"a": "dog", "b": "cat sits"}, {"a": ["dog"], "b": ["cat runs"]}, NO_METEOR)
    assert found.per_video["CIDEr"].tolist() == pytest.approx([250, 125])
    assert found.overall["CIDEr"] == pytest.approx(187.5)


EVC = {  # hypothesis, references, right and wrong categories
    "both": ("An amazed, glad man", ["a happy man", "an amazed man"], ["awe", "joy"], []),
    "mixed": ("a sad happy dog", ["a SAD dog"], ["sadness"], ["joy"]),
    "wrong": ("an angry man", ["a man"], [], ["anger"]),
    "none": ("a girl sadly sits", ["a glad girl"], [], []),  # words are matched whole
    "once": ("glad, so glad a girl", ["happy girl"], ["joy"], []),
}


def test_emotion_accuracies_by_hand():
    hypotheses = {video_id: row[0] for video_id, row in EVC.items()}
    references = {video_id: row[1] for video_id, row in EVC.items()}
    found = evaluate(hypotheses, references, DICTIONARY, meteor=False)
    for video_id, (_, _, right, wrong) in EVC.items():
        assert (found.per_video[video_id]["right"], found.per_video[video_id]["wrong"]) == (right, wrong)
    # N_r = 2 + 1 + 0 + 0 + 1, N_w = 0 + 1 + 1 + 0 + 0, N_0 = 1; C_r = 3, C_h = 1, n = 5
    assert found.overall["Acc_sw"] == pytest.approx(100 * 4 / 7)
    assert found.overall["Acc_c"] == pytest.approx(100 * math.exp(1 / (1 - 3 + 1e-4)) * 3 / 5)
    bleu = sum(0.1 * n * found.overall[f"BLEU-{n}"] for n in range(1, 5))
    emotion = found.overall["Acc_sw"] + found.overall["Acc_c"]
    assert found.overall["BFS"] == pytest.approx(0.8 * bleu + 0.1 * emotion)
    assert found.overall["CFS"] == pytest.approx(0.8 * found.overall["CIDEr"] + 0.1 * emotion)
    assert [found.per_video[video_id]["Acc_sw"] for video_id in EVC] == [100, 50, 0, 0, 100]
    assert [found.per_video[video_id]["Acc_c"] for video_id in EVC] == [100, 0, 0, 0, 100]


def test_a_word_of_two_categories_counts_for_its_first_in_a_caption_and_for_both_in_references():
    assert count_emotions("amazed", ["startled"], DICTIONARY).wrong == ("awe",)
    assert count_emotions("startled", ["amazed"], DICTIONARY).right == ("surprise",)
    assert count_emotions("amazed", ["amazed"], DICTIONARY).right == ("awe",)


def test_emotion_words_beyond_the_15th_do_not_count():
    long = "word " * 15 + "happy"
    assert count_emotions("happy", [long], DICTIONARY).wrong == ("joy",)
    assert count_emotions(long, ["happy"], DICTIONARY).row() == [0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("sums", "words", "sentences"),
    [
        ([0, 3, 1, 0, 0, 4], 0, 0),  # no right category
        ([5, 5, 0, 5, 5, 5], 50, 0),  # every right one with a wrong one: the limit, where the printed form overflows
        ([4, 0, 0, 4, 0, 4], 100, 100),
        ([4, 3, 1, 4, 3, 5], 50, 100 * math.exp(3 / (3 - 4 + 1e-4)) * 4 / 5),
    ],
)
def test_limits_of_the_accuracies(sums, words, sentences):
    with np.errstate(all="raise"):
        found = accuracies(np.array(sums))
    assert [float(value) for value in found] == pytest.approx([words, sentences])


def test_the_hybrids_follow_the_published_rows_but_for_the_named_ones():
    rows = [(dataset, method, row) for dataset, methods in TABLE_1.items() for method, row in methods.items()]
    assert len(rows) == 26 and len({(d, m) for d, m, _ in rows} - set(INCONSISTENT)) == 18
    for dataset, method, row in rows:
        # Inputs within 0.05 move a hybrid by up to 0.05, and itself it is rounded to 0.05.
        found = {"BFS": bfs(row), "CFS": cfs(row)}
        off = tuple(metric for metric, value in found.items() if abs(value - row[metric]) > 0.1 + 1e-9)
        assert off == INCONSISTENT.get((dataset, method), ()), (dataset, method, found)
    ours = TABLE_1["EVC-MSVD"]["FACE-net"]
    assert (round(bfs(ours), 1), round(cfs(ours), 1)) == (82.2, 153.6)
    assert round(cfs(TABLE_1["EVC-Combine"]["FACE-net"]), 2) == 70.39


@pytest.fixture(scope="module")
def captions():
    return random_captions(30, 5)


def test_numbers_are_those_of_pycocoevalcap(captions, capfd):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = captions
    written = {video_id: [plain_text(text) for text in texts] for video_id, texts in references.items()}
    generated = {video_id: [plain_text(hypotheses[video_id])] for video_id in references}
    assert max(len(text.split()) for texts in written.values() for text in texts) == 15
    scores = score_captions(hypotheses, references, NO_METEOR)
    bleu, each_bleu = Bleu(4).compute_score(written, generated, verbose=0)
    expected = {f"BLEU-{n}": (bleu[n - 1], each_bleu[n - 1]) for n in range(1, 5)}
    expected |= {
        "ROUGE-L": Rouge().compute_score(written, generated),
        "CIDEr": Cider().compute_score(written, generated),
    }
    for metric, (overall, each) in expected.items():
        assert scores.overall[metric] == 100 * overall
        assert scores.per_video[metric].tolist() == (100 * np.array(each)).tolist()
    for n in range(1, 5):
        assert corpus_bleu(scores.bleu_counts.sum(axis=0))[n - 1] == pytest.approx(scores.overall[f"BLEU-{n}"])
        assert corpus_bleu(scores.bleu_counts)[:, n - 1] == pytest.approx(scores.per_video[f"BLEU-{n}"])
    assert capfd.readouterr().out == ""


def test_a_resample_scores_as_the_corpus_that_it_is(captions):
    hypotheses, references = captions
    scores = score_captions(hypotheses, references, NO_METEOR)
    names = list(references)
    drawn = [0, 0, 3, 5, 5, 5, 29]
    weights = np.bincount(drawn, minlength=len(names))[None]
    again = score_captions(
        {f"{place}": hypotheses[names[row]] for place, row in enumerate(drawn)},
        {f"{place}": references[names[row]] for place, row in enumerate(drawn)},
        NO_METEOR,
    )
    found = resampled(scores, weights)
    for metric in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert found[metric][0] == pytest.approx(again.overall[metric])
    assert found["CIDEr"][0] == pytest.approx(np.mean([scores.per_video["CIDEr"][row] for row in drawn]))
    assert "METEOR" not in found


def test_scores_survive_json_and_name_their_unit(captions, tmp_path):
    hypotheses, references = captions
    scores = evaluate(hypotheses, references, DICTIONARY, meteor=False)
    assert tuple(scores.overall) == METRICS and scores.dataset is None
    path = tmp_path / "scores.json"
    path.write_text(scores.to_json())
    content = json.loads(path.read_text())
    assert content["overall"] == scores.overall and content["unit"] == "percent" and content["videos"] == 30
    assert read_hypotheses(path) == hypotheses
    assert scores.per_video["video3"]["BLEU-1"] == 0 and scores.per_video["video3"]["Acc_sw"] == 0
    lines = scores.table().splitlines()
    assert lines[1].split() == list(METRICS)
    assert lines[2].startswith("ours, 30 videos") and "not computed" in lines[2]
    assert lines[3] == "METEOR: not computed (left out)"


def test_the_papers_rows_stand_above_ours_where_the_data_is_emvidcap():
    for dataset, videos, captions in (("EVC-MSVD", 134, 5_622), ("EVC-VE", 382, 6_527), ("EVC-Combine", 516, 12_149)):
        references = {str(number): ["a man"] for number in range(videos - 1)}
        references["last"] = ["a man"] * (captions - videos + 1)
        assert recognise(references) == dataset
        assert recognise(dict(list(references.items())[1:])) is None
        scores = Scores(dict.fromkeys(METRICS, 12.34), {video_id: {} for video_id in references}, dataset=dataset)
        lines = scores.table().splitlines()
        assert dataset in lines[0] and len(lines) == 3 + len(TABLE_1[dataset])
        assert lines[-2].split() == ["FACE-net", *(f"{value:.1f}" for value in TABLE_1[dataset]["FACE-net"].values())]
        assert lines[-1].split() == ["ours,", str(videos), "videos", *["12.3"] * 11]


def test_one_video_has_no_cider_and_the_notes_say_so():
    scores = evaluate({"a": "a man"}, {"a": ["a man"]}, DICTIONARY, meteor=False)
    assert scores.overall["CIDEr"] == 0 and scores.overall["ROUGE-L"] == pytest.approx(100)
    assert any(note.startswith("CIDEr: 0 for a single video") for note in scores.notes)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ({}, {}, "no references"),
        ({"a": "x"}, {"a": ["x"], "b": ["x"], "c": ["x"]}, r"2 of 3 videos have no caption: b, c$"),
        ({"a": "x", "d": "x"}, {"a": ["x"]}, r"1 captions are of videos without references: d$"),
        ({"a": "x"}, {"a": []}, "references of video 'a' must be a list"),
        ({"a": "x"}, {"a": "x"}, "references of video 'a' must be a list"),
        ({"a": "x"}, {"a": ["x", " ! "]}, "video 'a' has a reference without words: ' ! '"),
    ],
)
def test_captions_that_do_not_fit_the_references_are_refused(hypotheses, references, message):
    with pytest.raises(MetricsError, match=message):
        evaluate(hypotheses, references, DICTIONARY)


def test_without_pycocoevalcap_one_sentence_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(ImportError, match=r"metrics need pycocoevalcap .*pip install 'evc-fast\[metrics\]'"):
        evaluate({"a": "x"}, {"a": ["x"]}, DICTIONARY, meteor=False)
