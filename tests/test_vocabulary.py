"""Words of captions, vocabularies and their files."""

from __future__ import annotations

import json

import pytest
import torch

from evc_fast.model.decoders.vocabulary import PAPER_VOCABULARY_SIZE, Vocabulary, caption_words, cut_words


def test_a_caption_becomes_ascii_lower_case_words_without_punctuation():
    assert caption_words("  A man's T-shirt, café\tand\n“joy”! ") == ["a", "mans", "tshirt", "cafe", "and", "joy"]
    assert caption_words("!!! ...") == []
    assert caption_words("w " * 20) == ["w"] * 15
    assert len(caption_words("w " * 20, max_words=None)) == 20


def test_text_is_cut_after_words_and_otherwise_kept():
    assert cut_words("A  man, smiling.", 2) == "A man,"
    assert cut_words("one two three", None) == "one two three"


def test_the_vocabulary_holds_caption_and_dictionary_words_in_alphabetical_order():
    captions = ["A dog runs happily.", "The dog, it runs!", " ".join(["long"] * 15 + ["beyond"])]
    vocabulary = Vocabulary.from_captions(captions, ["Sad", "happily"])
    assert vocabulary.words[:4] == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert vocabulary.words[4:] == ("a", "dog", "happily", "it", "long", "runs", "sad", "the")
    assert Vocabulary.from_captions(reversed(captions), ["happily", "Sad"]) == vocabulary
    assert "beyond" not in vocabulary and "sad" in vocabulary
    frequent = Vocabulary.from_captions(captions, ["sad"], min_count=2)
    assert frequent.words[4:] == ("dog", "long", "runs", "sad")


def test_captions_round_trip_through_ids():
    vocabulary = Vocabulary(["a", "dog", "runs"])
    assert vocabulary.encode("A dog flies!") == [4, 5, vocabulary.unk_id, vocabulary.eos_id]
    ids = vocabulary.encode_batch(["a dog runs", "dog", ""])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[4, 5, 6, 2], [5, 2, 0, 0], [2, 0, 0, 0]]
    assert [vocabulary.decode(row) for row in ids.tolist()] == ["a dog runs", "dog", ""]
    assert vocabulary.decode([1, 4, 2, 5, 5]) == "a"
    assert vocabulary.decode([4] * 20) == " ".join("a" * 15)
    assert vocabulary.decode([4] * 20, max_words=None) == " ".join("a" * 20)
    with pytest.raises(ValueError, match=r"0\.\.6, got 7"):
        vocabulary.decode([7])


def test_the_placeholder_has_the_papers_size_and_prints_ids():
    vocabulary = Vocabulary.placeholder()
    assert len(vocabulary) == PAPER_VOCABULARY_SIZE == 14_034
    assert vocabulary.random
    assert vocabulary.decode([17, 4, 14_033]) == "<17> <4> <14033>"
    assert not Vocabulary(["a"]).random


def test_a_vocabulary_survives_its_file(tmp_path):
    for vocabulary in (Vocabulary(["b", "a"]), Vocabulary.placeholder(9)):
        vocabulary.save(tmp_path / "vocabulary.json")
        assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    "content",
    ["no json", json.dumps(["a"]), json.dumps({"words": ["a"]}), json.dumps({"words": "ab", "random": False})],
)
def test_a_file_that_holds_no_vocabulary_is_refused(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a vocabulary"):
        Vocabulary.load(path)


def test_words_that_cannot_be_words_are_refused():
    with pytest.raises(ValueError, match=r"more than once: \['a'\]"):
        Vocabulary(["a", "b", "a"])
    with pytest.raises(ValueError, match="more than once"):
        Vocabulary(["<pad>"])
    with pytest.raises(ValueError, match="without white space"):
        Vocabulary(["two words"])
    with pytest.raises(ValueError, match="min_count"):
        Vocabulary.from_captions([], min_count=0)
    with pytest.raises(ValueError, match="size"):
        Vocabulary.placeholder(4)
