"""The retrieval benchmark: what its features are like, what it reports, and that it stops on a wrong answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import retrieval
from _retrieval_features import CAPTIONS_A_VIDEO, KINDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_features(kind):
    features, queries, own = KINDS[kind](4010, 30, 128, 0)
    assert features.shape == (4010, 128) and queries.shape == (30, 128) and own.shape == (30,)
    for rows in (features, queries):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    assert len(set(own.tolist())) == 30 and int(own.max()) * CAPTIONS_A_VIDEO < 4010
    again = KINDS[kind](4010, 30, 128, 0)
    assert all(torch.equal(a, b) for a, b in zip(again, (features, queries, own), strict=True))


def test_clustered_features_have_clips_geometry():
    features, queries, own = KINDS["clustered"](8000, 100, 512, 0)
    cosines = features[::7] @ features[::13].T
    assert 0.45 < float(cosines.mean()) < 0.55
    to_any = queries @ features.T
    assert 0.15 < float(to_any.mean()) < 0.25
    of_own = to_any.view(100, -1, CAPTIONS_A_VIDEO)[torch.arange(100), own]
    assert 0.25 < float(of_own.mean()) < 0.35 and float(of_own.mean()) > float(to_any.mean()) + 0.05


def test_a_small_run(tmp_path, capsys):
    argv = ["--captions", "600", "--width", "32", "--queries", "12", "--seconds", "0", "--threads", "1"]
    assert retrieval.main([*argv, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "retrieval.json").read_text())
    assert [record["features"] for record in report["records"]] == list(KINDS)
    for record in report["records"]:
        assert record["captions"] == 600 and record["queries"] == 12
        efforts = record["ivfpq"]["efforts"]
        assert [(effort["probes"], effort["candidates"]) for effort in efforts] == list(retrieval.EFFORTS)
        # 15 lists, 600 captions: with the last effort all are scanned and ranked.
        assert efforts[-1]["recall"] == {"1": 1.0, "4": 1.0, "10": 1.0} and efforts[-1]["cosine_lost"] == 0
        assert all(0 < share <= 1 for effort in efforts for share in effort["recall"].values())
        assert all(effort["seconds"]["one"] > 0 and effort["seconds"]["batch"] > 0 for effort in efforts)
    page, printed = (tmp_path / "retrieval.md").read_text(), capsys.readouterr().out
    for text in (page, printed):
        assert "600 captions, clustered features" in text and "600 captions, random features" in text
        assert "no real CLIP features" in text.replace("\n", " ")


def test_a_report_can_grow(tmp_path):
    argv = ["--captions", "400", "--width", "16", "--queries", "12", "--seconds", "0", "--threads", "1", "--keep"]
    argv += ["--out", str(tmp_path), "--features"]
    for kinds in (["random"], ["clustered"], ["random"]):
        assert retrieval.main([*argv, *kinds]) == 0
    records = json.loads((tmp_path / "retrieval.json").read_text())["records"]
    assert [(record["captions"], record["features"]) for record in records] == [(400, "clustered"), (400, "random")]
    assert (tmp_path / "retrieval.md").read_text().count("400 captions, ") == 2


def test_a_busy_machine_is_said():
    record = {"busy_elsewhere": 1.5, "width": 8, "queries": 3}
    assert any("took up to 1.5 of 2 cores" in line for line in retrieval.said([record], {"cores": 2}))
    assert not any("busy" in line for line in retrieval.said([record | {"busy_elsewhere": 0.1}], {"cores": 2}))


def test_only_others_work_counts_as_such():
    others = retrieval.OtherWork()
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", busy], check=True)
    took = time.perf_counter() - begin
    assert others.cores() * took >= 0.45  # a clock of 10 ms


def test_own_work_does_not_count(monkeypatch):
    clock = iter([(10.0, 100.0, 5.0), (14.0, 107.0, 11.0)])
    monkeypatch.setattr(retrieval.OtherWork, "_now", staticmethod(lambda: next(clock)))
    assert retrieval.OtherWork().cores() == (7.0 - 6.0) / 4.0


def test_wrong_answers_stop_it(tmp_path):
    subject = retrieval.Subject("clustered", 600, 5, 32)
    repository, seconds = subject.repository("flat", tmp_path)
    assert set(seconds) == {"build", "save", "load"}
    found = subject.search(repository, 4)
    retrieval.check(found, subject)
    with pytest.raises(AssertionError, match="cosines are wrong"):
        retrieval.check(found._replace(similarity=found.similarity + 1e-3), subject)
    with pytest.raises(AssertionError, match="own video"):
        retrieval.check(repository.search(subject.images, 4), subject)
    assert retrieval.recall(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 9, 8]]), 2) == 1.0
    assert retrieval.recall(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[9, 1, 2, 8]]), 4) == 0.5


def test_the_default_effort_is_among_the_rows(tmp_path):
    repository, _ = retrieval.Subject("random", 600, 5, 32).repository("ivfpq", tmp_path)
    index = json.loads((tmp_path / "manifest.json").read_text())["index"]
    assert (index["probes"], index["candidates"]) == retrieval.DEFAULT and retrieval.DEFAULT in retrieval.EFFORTS
    assert repository.index_kind == "ivfpq"
