"""The emotion dictionary, ours and a user's, and the vectors of its words."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from evc_fast.data.clip import ClipTowers
from evc_fast.data.emotions import EmotionDictionary, EmotionError, describe_with_clip, read_word_vectors
from evc_fast.model.decoders.vocabulary import caption_words


def folder(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("_txt", ".txt")).write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    return tmp_path


def test_our_dictionary_has_the_published_size_and_words_as_captions_hold_them():
    dictionary = EmotionDictionary.default()
    assert len(dictionary.categories) == 34
    assert sum(map(len, dictionary.categories.values())) == 183
    assert len(dictionary) == len(dictionary.words) == len(set(dictionary.words)) == 179
    assert list(dictionary.words) == sorted(dictionary.words)
    assert list(dictionary.categories) == sorted(dictionary.categories)
    for word in dictionary.words:
        assert caption_words(word) == [word]
        assert list(dictionary.of(word)) == [name for name, words in dictionary.categories.items() if word in words]
    assert dictionary.of("amazed") == ("awe", "surprise")
    assert dictionary.of("happily") == ("joy",)
    assert dictionary.of("guitar") == () and "guitar" not in dictionary


def test_emotion_words_are_found_whole_and_within_the_first_15_words():
    dictionary = EmotionDictionary({"joy": ["happy"], "sadness": ["sad"]})
    assert dictionary.find("A SAD man, then a happy one; unhappy, sadly. Happy!") == ["sad", "happy", "happy"]
    assert dictionary.find("word " * 14 + "sad happy") == ["sad"]


def test_a_users_folder_is_read_as_it_is(tmp_path):
    folder(
        tmp_path,
        joy_txt="Happy\r\n\r\n glad \nhappy\n",
        awe_txt="self-conscious\namazed",
        surprise_txt=b"\xef\xbb\xbfamazed\n",
    )
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "README.md").write_text("two words")
    dictionary = EmotionDictionary.from_folder(tmp_path)
    assert dictionary.categories == {
        "awe": ("amazed", "selfconscious"),
        "joy": ("glad", "happy"),
        "surprise": ("amazed",),
    }
    assert dictionary.words == ("amazed", "glad", "happy", "selfconscious")
    assert dictionary.of("amazed") == ("awe", "surprise")


def test_files_without_a_suffix_are_categories_too(tmp_path):
    dictionary = EmotionDictionary.from_folder(folder(tmp_path, joy="happy\n", sadness="sad\n"))
    assert dictionary == EmotionDictionary({"sadness": ["sad"], "joy": ["happy"]})


def test_a_saved_dictionary_is_the_same(tmp_path):
    dictionary = EmotionDictionary.default()
    dictionary.save(tmp_path / "emotions")
    loaded = EmotionDictionary.from_folder(tmp_path / "emotions")
    assert loaded == dictionary and hash(loaded) == hash(dictionary)
    with pytest.raises(EmotionError, match="must be empty"):
        EmotionDictionary({"joy": ["happy"]}).save(tmp_path / "emotions")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"joy_txt": "happy\nvery happy\n"}, r"joy.txt, line 2: expected one word, found 'very happy'"),
        ({"joy_txt": "happy\n\n!\n"}, r"joy.txt, line 3: expected one word, found '!'"),
        ({"joy_txt": b"happy\nd\xe9j\xe0\n"}, r"joy.txt, line 2: not UTF-8 \(byte 0xe9\)"),
        ({"joy_txt": "happy", "awe_txt": "\n\n"}, r"awe.txt is empty"),
        ({}, r"holds no emotion words"),
    ],
)
def test_a_bad_folder_is_refused_with_file_and_line(tmp_path, files, message):
    with pytest.raises(EmotionError, match=message):
        EmotionDictionary.from_folder(folder(tmp_path, **files))


def test_what_cannot_be_a_dictionary_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of emotion words"):
        EmotionDictionary.from_folder(tmp_path / "nowhere")
    with pytest.raises(EmotionError, match="at least one category"):
        EmotionDictionary({})
    with pytest.raises(EmotionError, match="'joy' has no words"):
        EmotionDictionary({"joy": []})
    with pytest.raises(EmotionError, match="'joy' must be a list of words"):
        EmotionDictionary({"joy": "happy"})
    with pytest.raises(EmotionError, match="category 'joy': expected one word"):
        EmotionDictionary({"joy": ["very happy"]})
    for name in ("", "a/b", ".joy"):
        with pytest.raises(EmotionError, match="do as a file's name"):
            EmotionDictionary({name: ["happy"]})


GLOVE = "the 0.1 0.2 0.3\nhappy 1 2 3\n. . . 9 9 9\nsad -1 -2.5 3e-1\nhappy 7 7 7\n"


def write(tmp_path, content, name="glove.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("header", ["", "5 3\n"])
def test_vectors_come_in_the_order_of_the_words(tmp_path, header):
    vectors = read_word_vectors(write(tmp_path, header + GLOVE), ["sad", "happy"], dim=3)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, torch.tensor([[-1, -2.5, 0.3], [1, 2, 3]]))
    assert read_word_vectors(write(tmp_path, header + GLOVE), ["sad"]).shape == (1, 3)


def test_vectors_of_an_array_with_its_word_list(tmp_path):
    array = np.arange(12, dtype=np.float64).reshape(4, 3)
    np.save(tmp_path / "glove.npy", array)
    write(tmp_path, "the\nhappy\nsad\nhappy\n")
    expected = torch.tensor([[6.0, 7, 8], [3, 4, 5]])
    torch.testing.assert_close(read_word_vectors(tmp_path / "glove.npy", ["sad", "happy"], dim=3), expected)
    (tmp_path / "glove.txt").rename(tmp_path / "words.txt")
    found = read_word_vectors(tmp_path / "glove.npy", ["sad", "happy"], word_list=tmp_path / "words.txt")
    torch.testing.assert_close(found, expected)
    with pytest.raises(FileNotFoundError, match=r"no word list .*glove.txt"):
        read_word_vectors(tmp_path / "glove.npy", ["sad"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GLOVE, r"has no vector for 2 of 3 words: awed, glad$"),
        ("the 1 2\nhappy 1 2\n", r"line 1: the vectors are 2 wide, expected 3"),
        ("the 1 2 3\nhappy 1 2\n", r"line 2: the vector of 'happy' is 2 wide, expected 3"),
        ("the 1 2 3\nhappy 1 nan 3\n", r"line 2: the vector of 'happy' is not .* finite numbers"),
        ("the 1 2 3\nhappy 1 two 3\n", r"line 2: the vector of 'happy' is not"),
        ("the 1 2 3\nhappy 1 1e40 3\n", r"line 2: the vector of 'happy' is not"),
        ("<html>\n", r"line 1 is not `word v1 v2 \.\.\.`"),
        (b"PK\x03\x04\xff\xfe binary \x00\n", r"line 1 is not `word"),
        ("", r"has no vector for 3 of 3 words: awed, glad, happy"),
    ],
)
def test_bad_vectors_are_refused_with_file_and_line_or_word(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(EmotionError, match=message) as error:
        read_word_vectors(path, ["awed", "glad", "happy"], dim=3)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_arrays_are_refused(tmp_path):
    path = tmp_path / "glove.npy"
    write(tmp_path, "happy\nsad\n")
    with pytest.raises(FileNotFoundError, match="no file of word vectors"):
        read_word_vectors(path, ["sad"])
    for content, message in (
        (np.zeros((2, 4)), "4 wide, expected 3"),
        (np.zeros((3, 3)), "lists 2 words, .* holds 3 vectors"),
        (np.zeros(3), r"must hold floating-point numbers \[words, dim\]"),
        (np.zeros((2, 3), dtype=np.int64), "must hold floating-point numbers"),
        (np.full((2, 3), np.inf), "row 1: the vector of 'sad' is not finite"),
        (np.array([["a"]], dtype=object), "is not a .npy file of numbers"),
    ):
        np.save(path, content, allow_pickle=True)
        with pytest.raises(EmotionError, match=message):
            read_word_vectors(path, ["sad"], dim=3)
    path.write_bytes(b"no array")
    with pytest.raises(EmotionError, match=r"is not a .npy file of numbers"):
        read_word_vectors(path, ["sad"])
    np.save(path, np.zeros((2, 3)))
    (tmp_path / "glove.txt").write_bytes(b"happy\n\xff\n")
    with pytest.raises(EmotionError, match=r"glove.txt, line 2: not UTF-8"):
        read_word_vectors(path, ["sad"])


def test_without_vectors_clip_describes_the_words(one_thread):
    towers = ClipTowers.random("tiny")
    features = describe_with_clip(["sad", "happy"], towers)
    assert features.shape == (2, towers.text_dim)
    torch.testing.assert_close(features[1:], towers.encode_text(["a photo of a person feeling happy"]))
