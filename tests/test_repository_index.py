"""IVF-PQ in the caption repository: what it finds against the flat index, exclusion, files, and every error."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evc_fast.data import repository as repository_module
from evc_fast.data.repository import (
    CaptionRepository,
    CorruptRepository,
    EncoderMismatch,
    RepositoryTooSmall,
    distinct_parts,
)
from evc_fast.data.repository_index import FlatIndex, learn

COUNT, WIDTH, PER_VIDEO = 2000, 16, 10
FINGERPRINT = "f" * 64

pytestmark = pytest.mark.usefixtures("one_thread")


def gathered(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    """Features around 40 topics, not normalised."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(40, WIDTH, generator=generator)
    of = torch.randint(40, (count,), generator=generator)
    return topics[of] + 0.5 * torch.randn(count, WIDTH, generator=generator)


FEATURES = gathered()
QUERIES = FEATURES[::21].unsqueeze(1) + 0.3 * torch.randn(96, 4, WIDTH, generator=torch.Generator().manual_seed(1))


def few(repository: CaptionRepository, probes: int = 8, candidates: int = 64) -> CaptionRepository:
    """The repository with an index that scans and ranks only some, as it does where there are many."""
    repository.set_effort(probes=probes, candidates=candidates)
    return repository


def make(index: str | None = "ivfpq", features: torch.Tensor = FEATURES, video_ids=None, fingerprint=FINGERPRINT):
    count = len(features)
    captions = [f"caption {row}" for row in range(count)]
    triplets = [(f"noun{row % 7}", "verb", f"noun{row % 5}") for row in range(count)]
    parts = torch.ones(len(distinct_parts(triplets)[0]), features.shape[1])
    if video_ids is None:
        video_ids = [f"video{row // PER_VIDEO}" for row in range(count)]
    return CaptionRepository.from_features(
        captions, video_ids, triplets, features, parts, encoder_fingerprint=fingerprint, index=index
    )


@pytest.fixture(scope="module")
def flat() -> CaptionRepository:
    return make("flat")


@pytest.fixture(scope="module")
def ivfpq() -> CaptionRepository:
    return few(make())


def same(first, second) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True))


def everything(repository: CaptionRepository) -> CaptionRepository:
    """The repository scanning all lists and ranking all captions, which makes it exact."""
    return few(repository, len(repository), len(repository))


@pytest.mark.parametrize("k", [1, 4, 30])
def test_finds_nearly_all_and_ranks_them_exactly(flat, ivfpq, k):
    assert (flat.index_kind, ivfpq.index_kind) == ("flat", "ivfpq")
    exact, found = flat.search(QUERIES, k), ivfpq.search(QUERIES, k)
    pairs = zip(exact.indices.tolist(), found.indices.tolist(), strict=True)
    recall = sum(len(set(a) & set(b)) for a, b in pairs) / exact.indices.numel()
    assert recall > 0.95
    mean = torch.nn.functional.normalize(QUERIES.double().mean(dim=1), dim=1)
    unit = torch.nn.functional.normalize(FEATURES, dim=1).double()
    cosines = (unit[found.indices] * mean[:, None]).sum(dim=2)
    torch.testing.assert_close(found.similarity.double(), cosines, rtol=0, atol=2e-7)
    assert bool((found.similarity[:, :-1] >= found.similarity[:, 1:]).all())
    assert bool((found.similarity <= exact.similarity).all())


def test_all_lists_and_all_captions_are_the_flat_search(flat):
    repository = everything(make())
    excluded = [f"video{row}" if row % 3 else None for row in range(len(QUERIES))]
    assert same(repository.search(QUERIES, 7, excluded), flat.search(QUERIES, 7, excluded))
    repeated = FEATURES[:5].repeat_interleave(200, dim=0)  # equal captions keep the order of the repository
    first, second = everything(make(features=repeated)), make("flat", features=repeated)
    assert same(first.search(QUERIES, 9), second.search(QUERIES, 9))


def test_one_video_alone_is_as_in_a_batch(ivfpq):
    batch = ivfpq.search(QUERIES, 6, ["video3"] * len(QUERIES))
    for row in range(len(QUERIES)):
        alone = ivfpq.search(QUERIES[row], 6, "video3")
        assert torch.equal(alone.indices[0], batch.indices[row])
        assert torch.equal(alone.similarity[0], batch.similarity[row])


def test_own_captions_are_left_out(ivfpq):
    rows = torch.arange(0, COUNT, 21)
    own = [f"video{row // PER_VIDEO}" for row in rows.tolist()]
    free, excluded = ivfpq.search(QUERIES, 5), ivfpq.search(QUERIES, 5, own)
    is_own = excluded.indices // PER_VIDEO == (rows // PER_VIDEO)[:, None]
    assert not bool(is_own.any())
    assert bool((free.indices // PER_VIDEO == (rows // PER_VIDEO)[:, None]).any())  # they would have been found


def test_when_the_near_lists_hold_only_own_captions_others_are_scanned():
    near, far = FEATURES[:1] + 0.1 * torch.randn(2000, WIDTH), -FEATURES[:1] + 0.1 * torch.randn(6, WIDTH)
    features = torch.cat([near, far])
    repository = few(make(features=features, video_ids=["own"] * 2000 + ["other"] * 6), 1, 16)
    query = FEATURES[:1].repeat(3, 1)
    found = repository.search(query, 6, "own")
    assert sorted(found.indices[0].tolist()) == list(range(2000, 2006))
    exact = make("flat", features=features, video_ids=["own"] * 2000 + ["other"] * 6).search(query, 6, "own")
    assert same(found, exact)
    with pytest.raises(RepositoryTooSmall, match="has 6 captions without the 2000 of video 'own', fewer than k = 7"):
        repository.search(query, 7, "own")
    with pytest.raises(RepositoryTooSmall, match="has 2006 captions, fewer than k = 2007"):
        repository.search(query, 2007)
    assert repository.search(query, 2006).indices[0].sort().values.tolist() == list(range(2006))


def test_save_and_load(tmp_path, ivfpq):
    ivfpq.save(tmp_path)
    names = ["captions.json", "features.safetensors", "index.safetensors", "manifest.json"]
    assert sorted(os.listdir(tmp_path)) == names
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["index"] == {"kind": "ivfpq", "lists": 51, "code_bytes": 16, "probes": 8, "candidates": 64}
    loaded = CaptionRepository.load(tmp_path, encoder_fingerprint=FINGERPRINT)
    assert loaded.index_kind == "ivfpq"
    excluded = [f"video{row}" for row in range(len(QUERIES))]
    assert same(loaded.search(QUERIES, 4, excluded), ivfpq.search(QUERIES, 4, excluded))
    loaded.save(tmp_path)  # over the files that it is reading
    assert same(CaptionRepository.load(tmp_path).search(QUERIES), ivfpq.search(QUERIES))
    make("flat").save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [name for name in names if not name.startswith("index")]
    assert CaptionRepository.load(tmp_path).index_kind == "flat"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_loaded_features_are_mapped_not_copied(tmp_path, ivfpq):
    ivfpq.save(tmp_path)
    loaded = CaptionRepository.load(tmp_path)
    address = loaded._index.features.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.endswith(str(tmp_path / "features.safetensors"))
            break
    else:
        pytest.fail("the features lie nowhere")


def test_repositories_of_version_1_load(tmp_path, flat):
    flat.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == {
        "format": "evc_fast caption repository",
        "version": 1,
        "captions": COUNT,
        "parts": 8,
        "width": WIDTH,
        "encoder_fingerprint": FINGERPRINT,
        "random_weights": False,
        "captions_sha256": manifest["captions_sha256"],
    }
    loaded = CaptionRepository.load(tmp_path)
    assert loaded.index_kind == "flat" and loaded.triplet_extractor is None
    assert same(loaded.search(QUERIES), flat.search(QUERIES))


def test_another_encoder_is_refused(tmp_path, ivfpq):
    ivfpq.save(tmp_path / "a")
    with pytest.raises(EncoderMismatch, match="built with the encoder ffffffffffff, not with eeeeeeeeeeee"):
        CaptionRepository.load(tmp_path / "a", encoder_fingerprint="e" * 64)
    # The same captions, of another encoder: its index does not belong to these features.
    make(fingerprint="e" * 64).save(tmp_path / "b")
    os.replace(tmp_path / "b" / "index.safetensors", tmp_path / "a" / "index.safetensors")
    with pytest.raises(CorruptRepository, match=r"index\.safetensors holds the features of other captions"):
        CaptionRepository.load(tmp_path / "a")


def _edit_index(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _edit_tensors(folder, change):
    from safetensors import safe_open

    path = folder / "index.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def _without_index(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["index"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


BREAKAGES = {
    "no index file": (lambda f: (f / "index.safetensors").unlink(), "index.safetensors is missing"),
    "cut index file": (lambda f: os.truncate(f / "index.safetensors", 900), "index.safetensors is damaged"),
    "no index in the manifest": (_without_index, "version 2, but its manifest.json names no index"),
    "another kind": (lambda f: _edit_index(f, kind="hnsw"), "names no index of ivfpq"),
    "no lists": (lambda f: _edit_index(f, lists=None), "has no lists that is int"),
    "no probes": (lambda f: _edit_index(f, probes=0), "an index that cannot be"),
    "code that does not divide": (lambda f: _edit_index(f, code_bytes=15), "an index that cannot be"),
    "other lists": (lambda f: _edit_index(f, lists=52), r"has centroids torch.float32 \[51, 16\], expected"),
    "list out of range": (lambda f: _edit_tensors(f, lambda t: t["lists"][3].fill_(51)), "outside of its 51 lists"),
    "negative list": (lambda f: _edit_tensors(f, lambda t: t["lists"][3].fill_(-1)), "outside of its 51 lists"),
    "NaN": (lambda f: _edit_tensors(f, lambda t: t["codebooks"][3].fill_(torch.nan)), "that are not finite"),
    "no codes": (lambda f: _edit_tensors(f, lambda t: t.pop("codes")), "index.safetensors is damaged"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_corrupt_files(tmp_path, ivfpq, name):
    ivfpq.save(tmp_path)
    change, words = BREAKAGES[name]
    change(tmp_path)
    with pytest.raises(CorruptRepository, match=words):
        CaptionRepository.load(tmp_path)


def test_an_interrupted_save_leaves_the_old_repository(tmp_path, ivfpq, flat, monkeypatch):
    flat.save(tmp_path)
    before = sorted(os.listdir(tmp_path))
    original, calls = os.fsync, []

    def interrupt(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(descriptor)

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ivfpq.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert same(CaptionRepository.load(tmp_path).search(QUERIES), flat.search(QUERIES))


def test_large_repositories_have_it_by_default(monkeypatch):
    monkeypatch.setattr(repository_module, "LARGE", 600)
    assert make(None, FEATURES[:600]).index_kind == "ivfpq"
    assert make(None, FEATURES[:599]).index_kind == "flat"
    assert make("flat", FEATURES[:600]).index_kind == "flat"


def test_what_cannot_be_learnt():
    with pytest.raises(ValueError, match="needs at least 256 captions to learn from, not 255"):
        make(features=FEATURES[:255])
    assert make(features=FEATURES[:256]).search(QUERIES, 3).indices.shape == (96, 3)
    with pytest.raises(ValueError, match="index must be 'flat', 'ivfpq' or None, not 'hnsw'"):
        make("hnsw")


def test_sizes_follow_the_number_of_captions_and_the_width():
    unit = torch.nn.functional.normalize(FEATURES, dim=1)
    assert (learn(unit).probes, learn(unit).candidates) == (256, 1024)
    content = learn(unit, probes=5, candidates=9)
    assert content.centroids.shape == (51, WIDTH) and content.codebooks.shape == (16, 256, 1)
    assert content.codes.shape == (COUNT, 16) and content.lists.shape == (COUNT,)
    assert (content.probes, content.candidates) == (5, 9)
    odd = torch.nn.functional.normalize(torch.randn(300, 262), dim=1)
    content = learn(odd, lists=4)  # 262 = 2 * 131: the largest divisor up to 128 is 2
    assert content.codebooks.shape == (2, 256, 131) and len(content.centroids) == 4


def test_the_flat_index_keeps_one_copy_and_learns_nothing():
    index = FlatIndex(FEATURES)
    assert index.content is None and torch.equal(index.features, FEATURES)


def test_effort(ivfpq, flat, tmp_path):
    repository = make()
    repository.save(tmp_path)
    repository = CaptionRepository.load(tmp_path)
    repository.set_effort(probes=8)
    repository.set_effort(candidates=64)
    assert same(repository.search(QUERIES), ivfpq.search(QUERIES))
    repository.save(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["index"]["probes"] == 8
    with pytest.raises(ValueError, match="this repository's is flat"):
        flat.set_effort(probes=8)
    for wrong in ({"probes": 0}, {"candidates": 2.0}, {"candidates": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer of at least 1, not"):
            repository.set_effort(**wrong)


def test_without_faiss_the_error_says_what_to_install(tmp_path, ivfpq, monkeypatch):
    ivfpq.save(tmp_path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"needs FAISS .*pip install faiss-cpu"):
        CaptionRepository.load(tmp_path)
