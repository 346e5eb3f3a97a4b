"""The caption repository against brute force in float64, its files, and every error that it promises."""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evc_fast.data.clip import ClipTowers
from evc_fast.data.repository import (
    CaptionRepository,
    CorruptRepository,
    EncoderMismatch,
    RepositoryError,
    RepositoryTooSmall,
    distinct_parts,
)
from evc_fast.data.repository_index import import_faiss

WORDS = [f"word{index}" for index in range(40)]


def texts(count: int, videos: int = 7, seed: int = 0):
    random = np.random.default_rng(seed)
    captions = [f"caption {index} says {WORDS[random.integers(40)]}" for index in range(count)]
    video_ids = [None if index % 11 == 10 else f"video{index % videos}" for index in range(count)]
    triplets = [tuple(WORDS[random.integers(12)] for _ in range(3)) for _ in range(count)]
    return captions, video_ids, triplets


def make(count: int = 200, width: int = 24, seed: int = 0, text_features: torch.Tensor | None = None, **changes):
    captions, video_ids, triplets = texts(count, seed=seed)
    captions, video_ids = changes.pop("captions", captions), changes.pop("video_ids", video_ids)
    triplets = changes.pop("triplets", triplets)
    generator = torch.Generator().manual_seed(seed)
    if text_features is None:
        text_features = 3 * torch.randn(count, width, generator=generator)
    part_features = torch.randn(len(distinct_parts(triplets)[0]), text_features.shape[1], generator=generator)
    part_features = changes.pop("part_features", part_features)
    return CaptionRepository.from_features(
        captions, video_ids, triplets, text_features, part_features, encoder_fingerprint="f" * 64, **changes
    )


def brute_force(text_features, video_ids, frame_features, k, excluded):
    """Rows and cosines of all that is left, sorted; equal cosines in the order of the repository."""
    unit = torch.nn.functional.normalize(text_features.float(), dim=1).double()
    mean = frame_features.double().mean(dim=0)
    cosines = (unit @ (mean / mean.norm())).float()
    rows = [row for row in range(len(unit)) if excluded is None or video_ids[row] != excluded]
    rows.sort(key=lambda row: (-float(cosines[row]), row))
    return rows[:k], cosines[rows[:k]]


@pytest.mark.parametrize("k", [1, 4, 5, 20])
def test_search_is_brute_force(k):
    features = torch.randn(200, 24)
    repository = make(text_features=features)
    query = torch.randn(9, 5, 24)
    excluded = ["video0", None, "video3", "video6", "elsewhere", "video1", None, "video2", "video2"]
    found = repository.search(query, k, excluded)
    assert found.indices.shape == found.similarity.shape == found.groups.shape == (9, k)
    assert found.indices.dtype == found.groups.dtype == torch.int64 and found.similarity.dtype == torch.float32
    assert found.triplets.shape == (9, k, 3, 24) and found.triplets.dtype == torch.float32
    for row, video in enumerate(excluded):
        indices, cosines = brute_force(features, repository.video_ids, query[row], k, video)
        assert found.indices[row].tolist() == indices
        torch.testing.assert_close(found.similarity[row], cosines, rtol=0, atol=2e-7)
        assert found.captions[row] == [repository.captions[index] for index in indices]
        assert all(repository.video_ids[index] != video or video is None for index in indices)
    assert bool((found.similarity[:, :-1] >= found.similarity[:, 1:]).all())


def test_one_video_alone_is_as_in_a_batch():
    repository = make()
    query = torch.randn(33, 4, 24)
    batch = repository.search(query, 6, ["video1"] * 33)
    for row in range(33):
        alone = repository.search(query[row], 6, "video1")
        assert alone.indices.shape == (1, 6) and alone.captions == [batch.captions[row]]
        assert torch.equal(alone.indices[0], batch.indices[row])
        assert torch.equal(alone.similarity[0], batch.similarity[row])
        assert torch.equal(alone.triplets[0], batch.triplets[row])


def test_equal_captions_keep_the_order_of_the_repository():
    features = torch.randn(5, 24).repeat_interleave(60, dim=0)  # 60 captions of each of 5 texts
    repository = make(300, text_features=features)
    query = torch.randn(40, 3, 24)
    excluded = [None, "video0", "video1", "video2"] * 10
    found = repository.search(query, 10, excluded)
    for row, video in enumerate(excluded):
        assert found.indices[row].tolist() == brute_force(features, repository.video_ids, query[row], 10, video)[0]
    same = make(300, text_features=torch.ones(300, 24))
    assert same.search(torch.ones(2, 1, 24), 3).indices.tolist() == [[0, 1, 2]] * 2


def test_most_of_the_repository_is_excluded():
    features = torch.randn(300, 24)
    video_ids = ["own"] * 290 + ["other"] * 10
    repository = make(300, text_features=features, video_ids=video_ids)
    query = features[:290].mean(dim=0).repeat(2, 1)  # every caption of its own is nearer
    assert (
        repository.search(query, 10, "own").indices[0].tolist() == brute_force(features, video_ids, query, 10, "own")[0]
    )
    with pytest.raises(RepositoryTooSmall, match=r"has 10 captions without the 290 of video 'own', fewer than k = 11"):
        repository.search(query, 11, "own")
    with pytest.raises(RepositoryTooSmall, match="has 300 captions, fewer than k = 301"):
        repository.search(query, 301)
    assert repository.search(query, 300).indices[0].sort().values.tolist() == list(range(300))


def test_triplets_and_groups():
    triplets = [("man", "eat", "cake"), ("cake", "eat", "man"), ("man", "eat", "cake"), ("man", "man", "man")]
    parts, places = distinct_parts(triplets)
    assert parts == ["man", "eat", "cake"] and places.dtype == torch.int32
    assert places.tolist() == [[0, 1, 2], [2, 1, 0], [0, 1, 2], [0, 0, 0]]
    part_features = torch.randn(3, 24)
    repository = make(4, triplets=triplets, part_features=part_features)
    found = repository.search(torch.randn(1, 24), 4)
    groups = dict(zip(found.indices[0].tolist(), found.groups[0].tolist(), strict=True))
    assert groups[0] == groups[2] and len(set(groups.values())) == 3
    for position, index in enumerate(found.indices[0].tolist()):
        assert found.triplet_texts[0][position] == triplets[index] == repository.triplet(index)
        assert torch.equal(found.triplets[0, position], part_features[places[index].long()])


def test_similarity_comes_from_the_mean_of_frames_that_are_not_normalised():
    features = torch.eye(3)
    repository = make(3, text_features=features)
    frames = torch.tensor([[10.0, 0, 0], [0, 1, 0]])  # the longer frame counts for more
    found = repository.search(frames, 3)
    expected = torch.tensor([10.0, 1, 0]) / 101**0.5
    torch.testing.assert_close(found.similarity[0], expected)
    assert found.indices[0].tolist() == [0, 1, 2]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert repository.search(frames.to(dtype), 3).indices[0].tolist() == [0, 1, 2]


def test_build_encodes_each_distinct_part_once(monkeypatch):
    towers = ClipTowers.random("tiny")
    captions, video_ids, triplets = texts(30)
    encoded, calls = [], []
    original = towers.encode_text
    monkeypatch.setattr(
        towers, "encode_text", lambda rows, **options: encoded.extend(rows) or original(rows, **options)
    )
    repository = CaptionRepository.build(
        captions, video_ids, triplets, towers, batch_size=8, progress=lambda done, total: calls.append((done, total))
    )
    parts = distinct_parts(triplets)[0]
    assert encoded == captions + [f"A photo of {part}" for part in parts]
    total = 30 + len(parts)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls) and calls[-1] == (total, total)
    assert len(repository) == 30 and repository.width == towers.text_dim
    assert repository.encoder_fingerprint == towers.fingerprint and repository.random_weights
    found = repository.search(torch.randn(4, 32), 2)
    index = int(found.indices[0, 0])
    expected = original([f"A photo of {part}" for part in triplets[index]])
    torch.testing.assert_close(found.triplets[0, 0], expected, rtol=1e-4, atol=1e-5)
    # A caption's own text feature finds it, at cosine 1.
    own = repository.search(original([captions[12]]), 1)
    assert own.captions[0][0] == captions[12] and own.similarity[0, 0] == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr(towers, "encode_text", lambda *_, **__: pytest.fail("encoded before the texts were checked"))
    with pytest.raises(RepositoryError, match="of one length"):
        CaptionRepository.build(captions, video_ids[:-1], triplets, towers)


def test_save_and_load(tmp_path):
    repository = make(random_weights=True)
    repository.save(tmp_path / "made" / "here")
    folder = tmp_path / "made" / "here"
    assert sorted(os.listdir(folder)) == ["captions.json", "features.safetensors", "manifest.json"]
    loaded = CaptionRepository.load(folder, encoder_fingerprint="f" * 64)
    assert len(loaded) == 200 and loaded.random_weights and loaded.encoder_fingerprint == "f" * 64
    assert loaded.captions == repository.captions and loaded.video_ids == repository.video_ids
    query = torch.randn(5, 3, 24)
    for first, second in zip(
        repository.search(query, 4, ["video1"] * 5), loaded.search(query, 4, ["video1"] * 5), strict=True
    ):
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    loaded.save(folder)  # over the files that it is reading
    assert torch.equal(CaptionRepository.load(folder).search(query).indices, repository.search(query).indices)
    make(50, seed=1).save(folder)
    assert len(CaptionRepository.load(folder)) == 50


def test_encoder_mismatch(tmp_path):
    repository = make()
    repository.save(tmp_path)
    with pytest.raises(EncoderMismatch, match="built with the encoder ffffffffffff, not with eeeeeeeeeeee"):
        CaptionRepository.load(tmp_path, encoder_fingerprint="e" * 64)
    repository.require_encoder("f" * 64)
    with pytest.raises(EncoderMismatch, match="build it again with the towers"):
        repository.require_encoder("e" * 64)


def _rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _break_tensors(path, change):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata=metadata)


BREAKAGES = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "no captions": (lambda f: (f / "captions.json").unlink(), "captions.json is missing"),
    "no features": (lambda f: (f / "features.safetensors").unlink(), "features.safetensors is missing"),
    "cut manifest": (lambda f: (f / "manifest.json").write_text('{"form'), "manifest.json is damaged"),
    "other manifest": (lambda f: (f / "manifest.json").write_text("[]"), "not that of a caption repository"),
    "newer version": (lambda f: _rewrite(f / "manifest.json", lambda m: m.update(version=2)), "is of version 2"),
    "no width": (lambda f: _rewrite(f / "manifest.json", lambda m: m.pop("width")), "has no width that is int"),
    "other captions": (lambda f: _rewrite(f / "captions.json", lambda c: c["captions"].pop()), "not the file that"),
    "cut features": (lambda f: os.truncate(f / "features.safetensors", 5000), "features.safetensors is damaged"),
    "features not named": (
        lambda f: _break_tensors(f / "features.safetensors", lambda t: t.pop("part_indices")),
        "features.safetensors is damaged",
    ),
    "features narrower": (
        lambda f: _break_tensors(f / "features.safetensors", lambda t: t.update(part_features=torch.ones(12, 23))),
        r"has part_features torch.float32 \[12, 23\], expected torch.float32 \[12, 24\]",
    ),
    "NaN features": (
        lambda f: _break_tensors(f / "features.safetensors", lambda t: t["text_features"][3].fill_(torch.nan)),
        "not finite, or not of length 1",
    ),
    "infinite part features": (
        lambda f: _break_tensors(f / "features.safetensors", lambda t: t["part_features"][3].fill_(torch.inf)),
        "not finite, or not of length 1",
    ),
    "parts out of range": (
        lambda f: _break_tensors(f / "features.safetensors", lambda t: t["part_indices"][0].fill_(12)),
        "part_indices outside of its 12 parts",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_corrupt_files(tmp_path, name):
    make().save(tmp_path)
    change, words = BREAKAGES[name]
    change(tmp_path)
    with pytest.raises(CorruptRepository, match=words):
        CaptionRepository.load(tmp_path)


def test_features_of_another_repository(tmp_path):
    make(seed=0).save(tmp_path / "a")
    make(seed=1).save(tmp_path / "b")
    os.replace(tmp_path / "b" / "features.safetensors", tmp_path / "a" / "features.safetensors")
    with pytest.raises(CorruptRepository, match="features of other captions"):
        CaptionRepository.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"no repository folder .*nowhere"):
        CaptionRepository.load(tmp_path / "nowhere")


def _with(value, row=1, column=2, rows=200):
    features = torch.ones(rows, 24)
    features[row, column] = value
    return features


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"captions": []}, RepositoryError, "captions is empty"),
        ({"captions": "a man"}, TypeError, "not one string"),
        ({"captions": ["a man"] * 199}, RepositoryError, "of one length, not 199, 200 and 200"),
        ({"captions": ["a man"] * 199 + ["  "]}, RepositoryError, r"captions\[199\] must be a sentence, not '  '"),
        ({"video_ids": [3] * 200}, RepositoryError, r"video_ids\[0\] must be a string or None, not 3"),
        ({"text_features": _with(torch.nan)}, RepositoryError, "text_features has NaN or infinite values in row 1"),
        ({"text_features": _with(-torch.inf)}, RepositoryError, "text_features has NaN or infinite values in row 1"),
        ({"text_features": _with(0.0, column=slice(None))}, RepositoryError, "text_features has only zeros in row 1"),
        ({"text_features": torch.ones(199, 24)}, RepositoryError, r"must be \[200, D_t\] .* not \[199, 24\]"),
        (
            {"text_features": torch.ones(200, 24, dtype=torch.int64)},
            TypeError,
            "floating-point tensor .*not torch.int64",
        ),
        ({"part_features": torch.ones(12, 23)}, RepositoryError, "part_features are 23 wide and text_features 24"),
        ({"part_features": torch.ones(13, 24)}, RepositoryError, r"\[12, D_t\] for 12 distinct parts, not \[13, 24\]"),
        ({"part_features": _with(torch.nan, rows=12)}, RepositoryError, "part_features has NaN or infinite values"),
    ],
)
def test_content_is_checked(changes, error, words):
    with pytest.raises(error, match=words):
        make(**changes)


@pytest.mark.parametrize("triplet", ["abc", ("a", "b"), ("a", "", "c"), ("a", None, "c")])
def test_triplets_are_checked(triplet):
    triplets = [("man", "eat", "cake"), triplet]
    with pytest.raises(RepositoryError, match=r"triplets\[1\] must be three words"):
        CaptionRepository.from_features(
            ["a", "b"], [None] * 2, triplets, torch.ones(2, 8), torch.ones(3, 8), encoder_fingerprint="f"
        )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((np.zeros((2, 24)),), TypeError, "frame_features must be a floating-point tensor .*not ndarray"),
        ((torch.zeros(2, 24, dtype=torch.int64),), TypeError, "not torch.int64"),
        ((torch.ones(2, 23),), ValueError, r"\[B, N, 24\] or \[N, 24\].* not \[2, 23\]"),
        ((torch.ones(24),), ValueError, r"not \[24\]"),
        ((torch.ones(0, 24),), ValueError, r"not \[0, 24\]"),
        ((torch.zeros(2, 24),), ValueError, "mean of only zeros in video 0"),
        ((_with(torch.nan)[None],), ValueError, "NaN or infinite values in video 0, frame 1"),
        ((torch.stack([_with(1), _with(torch.inf)]),), ValueError, "NaN or infinite values in video 1, frame 1"),
        ((torch.ones(2, 24), 0), ValueError, "k must be an integer of at least 1, not 0"),
        ((torch.ones(2, 24), 2.0), ValueError, "k must be an integer of at least 1, not 2.0"),
        ((torch.ones(2, 1, 24), 2, ["video1"]), ValueError, "exclude_video_ids has 1 ids for 2 videos"),
        ((torch.ones(2, 1, 24), 2, [1, 2]), TypeError, "exclude_video_ids must hold strings"),
    ],
)
def test_queries_are_checked(arguments, error, words):
    with pytest.raises(error, match=words):
        make().search(*arguments)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"needs FAISS .*pip install faiss-cpu"):
        make()


def test_threads_of_faiss_are_those_of_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        repository = make()
        repository.search(torch.ones(1, 24))
        assert import_faiss().omp_get_max_threads() == 1
    finally:
        torch.set_num_threads(before)
