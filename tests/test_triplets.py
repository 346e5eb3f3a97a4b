"""Triplets of captions: agreement with those written by hand, the interface, the command, and its errors."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from evc_fast.data import triplets as module
from evc_fast.data.triplets import MISSING, Agreement, SpacyTriplets, TripletFileError, agreement, main

CAPTIONS = Path(__file__).parent / "data" / "triplets.json"
pytest.importorskip("spacy", reason="needs the packages of evc-fast[all]")

# A new version of the model may parse one sentence more or less as hoped.
LEAST, LEAST_OF_A_FORM = 0.90, 0.60


@pytest.fixture(scope="module")
def extractor() -> SpacyTriplets:
    return SpacyTriplets()


@pytest.fixture(scope="module")
def results(extractor: SpacyTriplets) -> list[Agreement]:
    return agreement(CAPTIONS, extractor)


def share(results: list[Agreement]) -> float:
    return sum(result.exact for result in results) / len(results)


def test_agreement_with_triplets_written_by_hand(results):
    held_out = [result for result in results if result.held_out]
    tuned_on = [result for result in results if not result.held_out]
    assert len(results) >= 120 and len(held_out) >= 40
    assert share(tuned_on) >= LEAST and share(held_out) >= LEAST
    for form in {result.form for result in results}:
        of_form = [result for result in results if result.form == form]
        assert len(of_form) >= 4 and share(of_form) >= LEAST_OF_A_FORM, form


def test_forms_that_must_be_there(results):
    forms = {result.form.split()[0].strip(",") for result in results}
    assert {"active", "passive", "intransitive", "conjoined", "verbless", "question", "copular"} <= forms
    assert {"There", "there", "participle", "particle"} & forms == {"there", "participle", "particle"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog chases a cat.", "dog chase cat"),
        ("A cat is chased by a dog.", "dog chase cat"),
        ("A cat is chased.", "something chase cat"),
        ("A woman sits on a chair.", "woman sit chair"),
        ("A woman sings sadly.", "woman sing sadly"),
        ("A woman is singing.", "woman sing something"),
        ("the man is angry", "man be angry"),
        ("the man is not excited", "man be excited"),
        ("the crowd is shocked by the crash", "crash shock crowd"),
        ("a sad man", "man something something"),
        ("a sad man in a car", "man something car"),
        ("A clown scares the kids.", "clown scare kid"),
        ("A man is riding a horse.", "man ride horse"),
        ("A boy gets a gift", "boy get gift"),
        ("A woman smells a flower", "woman smell flower"),
        ("A girl is baking cookies", "girl bake cookie"),
        ("A boy opens the door", "boy open door"),
        ("A   MAN is\n eating\tcake", "man eat cake"),
    ],
)
def test_rules(extractor, caption, expected):
    assert extractor([caption]) == [tuple(expected.split())]


def test_whatever_the_text_three_words_come_out(extractor):
    odd = [
        "",
        "  ",
        "...",
        "?!",
        "😀",
        "42",
        "a",
        "the the the",
        "and",
        "by",
        "there is",
        "http://x.y/z?q=1",
        "é à ü",
        "\0",
    ]
    odd += ["a man " * 200, "if when because", "who", "not", "is is is", "of of of a of"]
    for triplet in extractor(odd):
        assert len(triplet) == 3
        assert all(part == part.lower() and part.strip() and re.search(r"\w", part) for part in triplet)
    assert extractor(["", "...", "😀"]) == [(MISSING,) * 3] * 3
    assert extractor([]) == []


def test_batches_and_progress(extractor):
    captions = [entry["caption"] for entry in json.loads(CAPTIONS.read_text())["captions"]][:50]
    small, calls = SpacyTriplets(batch_size=8), []
    found = small(captions, progress=lambda done, total: calls.append((done, total)))
    assert found == extractor(captions)
    assert calls == [(done, 50) for done in (8, 16, 24, 32, 40, 48, 50)]
    with pytest.raises(TypeError, match="sequence of strings"):
        extractor("A dog chases a cat.")
    with pytest.raises(TypeError, match="sequence of strings"):
        extractor(["A dog", None])


def test_the_name_says_which_parser_and_model(extractor):
    spacy = importlib.import_module("spacy")
    assert extractor.name.startswith(f"spacy {spacy.__version__}, en_core_web_sm")


def test_without_spacy_the_error_says_what_to_install(monkeypatch, capsys):
    module._load.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"^triplets of captions need spaCy \(.*\): pip install 'evc-fast\[all\]'$"):
        SpacyTriplets()
    assert main(["A dog barks."]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install" in said


def test_without_the_model_the_error_says_what_to_install(monkeypatch, tmp_path):
    import spacy

    module._load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(spacy.util, "is_package", lambda name: False)
        patch.chdir(tmp_path)
        with pytest.raises(
            ImportError, match=r"^.*English model, and en_core_web_sm is not installed: pip install .*$"
        ):
            SpacyTriplets()
    with pytest.raises(ImportError, match="no_such_model is not installed"):
        SpacyTriplets("no_such_model")
    blank = tmp_path / "blank"
    spacy.blank("en").to_disk(blank)
    with pytest.raises(ImportError, match="blank has no tagger and parser"):
        SpacyTriplets(blank)


def test_the_table(capsys, results):
    assert main(["--table", str(CAPTIONS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    right, held = sum(r.exact for r in results), [r for r in results if r.held_out]
    assert lines[0].startswith("spacy ") and lines[2].split()[0] == "form"
    assert [line.split("  ")[0].strip() for line in lines[3:-1]] == list(dict.fromkeys(r.form for r in results))
    assert lines[-1].split()[:4] == ["all", str(right), "of", str(len(results))]
    assert f"{sum(r.exact for r in held)} of  {len(held)}" in lines[-1]
    assert main(["--table", str(CAPTIONS), "--errors"]) == 0
    listed = capsys.readouterr().out
    for result in results:
        assert (f"\n{result.caption}\n" in listed) == (not result.exact and not result.held_out)
    assert main(["--table", str(CAPTIONS), "--json"]) == 0
    assert sum(entry["exact"] for entry in json.loads(capsys.readouterr().out)) == right


def test_captions_on_the_command_line(capsys):
    assert main(["A dog chases a cat.", "a sad man"]) == 0
    assert capsys.readouterr().out == "dog | chase | cat\nman | something | something\n"
    assert main(["--json", "A dog chases a cat."]) == 0
    assert json.loads(capsys.readouterr().out) == [["dog", "chase", "cat"]]
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no list "captions"'),
        ('{"captions": []}', 'has no list "captions"'),
        (
            '{"captions": [{"form": "a", "held_out": 1, "caption": "b", "triplet": []}]}',
            r"captions\[0\] must have form",
        ),
        ('{"captions": [{"form": "a", "held_out": true, "caption": "b", "triplet": ["c"]}]}', "must be three words"),
    ],
)
def test_files_that_are_none(tmp_path, extractor, capsys, content, words):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(TripletFileError, match=words):
        agreement(path, extractor)
    assert main(["--table", str(path)]) == 2 and str(path) in capsys.readouterr().err
