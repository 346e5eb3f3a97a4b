"""From captions to a repository: what is computed once, what is passed on, and every error."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from evc_fast.data import triplets as triplets_module
from evc_fast.data.captions import Caption, CaptionSet
from evc_fast.data.clip import ClipTowers
from evc_fast.data.index import build_repository
from evc_fast.data.repository import CaptionRepository, EncoderMismatch, RepositoryError

CAPTIONS = CaptionSet(
    Caption(video, text)
    for video, text in (
        ("dog1", "A dog happily chases a ball."),
        ("dog1", "The ball is chased by a dog"),
        ("cry2", "a sad woman is crying"),
        ("cry2", "A woman cries in the kitchen"),
        ("cry3", "a sad woman is crying"),
        ("fun4", "two kids"),
    )
)
TRIPLETS = [
    ("dog", "chase", "ball"),
    ("dog", "chase", "ball"),
    ("woman", "cry", "something"),
    ("woman", "cry", "kitchen"),
    ("woman", "cry", "something"),
    ("kid", "something", "something"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def towers() -> ClipTowers:
    return ClipTowers.random("tiny")


class Scripted:
    """An extractor that gives what it is told to, and remembers what it was asked."""

    name = "scripted 1"

    def __init__(self, answers: list) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, captions, progress=None):
        self.asked.append(list(captions))
        if progress is not None:
            progress(len(captions), len(captions))
        return self.answers


def test_everything_is_computed_and_stored(towers, tmp_path):
    extractor, calls = Scripted([*TRIPLETS[:4], TRIPLETS[5]]), []
    repository = build_repository(CAPTIONS, towers, extractor, progress=lambda *call: calls.append(call))
    assert extractor.asked == [list(dict.fromkeys(caption.text for caption in CAPTIONS))]  # each sentence once
    assert repository.captions == [caption.text for caption in CAPTIONS]
    assert repository.video_ids == ["dog1", "dog1", "cry2", "cry2", "cry3", "fun4"]
    assert [repository.triplet(row) for row in range(6)] == TRIPLETS
    assert repository.triplet_extractor == "scripted 1" and repository.index_kind == "flat"
    assert calls[0] == ("triplets", 5, 5) and calls[-1] == ("text features", 14, 14)  # 6 captions, 8 parts
    repository.save(tmp_path)
    loaded = CaptionRepository.load(tmp_path, encoder_fingerprint=towers.fingerprint)
    assert loaded.triplet_extractor == "scripted 1"
    # At caption time neither parser nor text tower is asked; a video's own captions are left out.
    query = towers.encode_text(["a sad woman is crying"])
    assert loaded.search(query, 2).indices.tolist() == [[2, 4]]
    found = loaded.search(query, 2, "cry2")
    assert int(found.indices[0, 0]) == 4 and not {2, 3} & set(found.indices[0].tolist())
    with pytest.raises(EncoderMismatch, match="build it again with the towers that encode the frames"):
        CaptionRepository.load(tmp_path, encoder_fingerprint=ClipTowers.random("tiny", seed=1).fingerprint)


def test_the_default_extractor_is_spacys(towers):
    pytest.importorskip("spacy", reason="needs the packages of evc-fast[all]")
    repository = build_repository(CAPTIONS, towers)
    assert [repository.triplet(row) for row in range(6)] == TRIPLETS
    assert repository.triplet_extractor.startswith("spacy ")


def test_an_approximate_index_is_passed_on(towers):
    captions = CaptionSet(Caption(f"v{row % 60}", f"sentence number {row}") for row in range(300))
    repository = build_repository(captions, towers, Scripted([("a", "b", "c")] * 300), index="ivfpq")
    assert repository.index_kind == "ivfpq"
    found = repository.search(torch.randn(3, 2, towers.text_dim), 4, ["v1", "v2", "v3"])
    assert all(repository.video_ids[row] != f"v{video}" for video in (1, 2, 3) for row in found.indices[video - 1])


def test_errors(towers, monkeypatch):
    with pytest.raises(RepositoryError, match="there are no captions"):
        build_repository(CaptionSet([]), towers)
    with pytest.raises(RepositoryError, match="the extractor scripted 1 gave 4 triplets for 5 captions"):
        build_repository(CAPTIONS, towers, Scripted(TRIPLETS[:4]))
    with pytest.raises(RepositoryError, match=r"triplets\[1\] must be three words"):
        build_repository(CAPTIONS, towers, Scripted([("a", "b", "c"), ("a", "b"), *TRIPLETS[:3]]))
    monkeypatch.setitem(sys.modules, "spacy", None)
    triplets_module._load.cache_clear()
    with pytest.raises(ImportError, match=r"^triplets of captions need spaCy .*: pip install 'evc-fast\[all\]'$"):
        build_repository(CAPTIONS, towers)
