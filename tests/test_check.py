"""Checking videos: a verdict each, and the quarantine list."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _clip import encode_clip

from evc_fast.data.check import (
    Checked,
    Quarantine,
    Quarantined,
    QuarantineError,
    TooManyBadVideos,
    available_cores,
    check_videos,
    inspect,
)
from evc_fast.data.video import TruncatedVideo


def entry(video_id: str, kind: str = "TruncatedVideo") -> Quarantined:
    return Quarantined(video_id, f"/videos/{video_id}.mp4", kind, f"{video_id} breaks off")


def test_every_video_has_a_verdict(tmp_path):
    good = encode_clip(tmp_path / "good.mp4", seconds=1, width=96, height=64)
    data = good.read_bytes()
    (tmp_path / "broken.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "notes.mp4").write_bytes(b"a man is talking\n" * 50)
    names = ("good", "broken", "missing", "empty", "notes", "folder")
    videos = {name: tmp_path / f"{name}.mp4" for name in names} | {"folder": tmp_path}
    seen = []
    checked = check_videos(videos, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert [video.video_id for video in checked] == list(names)
    assert checked[0] == Checked(
        "good", str(good), num_decoded=25, duration=pytest.approx(1.0), width=96, height=64, damaged=0
    )
    kinds = ["", "TruncatedVideo", "FileNotFoundError", "EmptyVideo", "UnreadableVideo", "UnreadableVideo"]
    assert [video.kind for video in checked] == kinds
    assert all(video.usable != bool(video.reason) for video in checked)
    assert all(video.path in video.reason for video in checked[1:])
    assert seen == [(done, 6) for done in range(1, 7)]

    quarantine = Quarantine.of(checked)
    assert [video.video_id for video in quarantine] == list(names[1:])
    quarantine.write(tmp_path / "quarantine.json")
    assert list(Quarantine.read(tmp_path / "quarantine.json")) == list(quarantine)
    assert set(json.loads((tmp_path / "quarantine.json").read_text())[0]) == {"id", "path", "kind", "reason"}


def test_memory_over_the_limit_is_a_verdict(tmp_path):
    small = encode_clip(tmp_path / "small.mp4", seconds=0.5, width=64, height=64)
    large = encode_clip(tmp_path / "large.mp4", seconds=0.2, width=1280, height=720)
    checked = check_videos({"large": large, "small": small}, workers=1, memory_mb=32)
    assert [video.kind for video in checked] == ["OutOfMemory", ""]
    assert "large.mp4 takes more memory than the limit" in checked[0].reason


def test_truncated_videos_may_be_allowed(tmp_path):
    whole = encode_clip(tmp_path / "whole.mkv", seconds=2, width=96, height=64).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: int(0.6 * len(whole))])
    (allowed,) = check_videos({"cut": tmp_path / "cut.mkv"}, workers=1, allow_truncated=True)
    assert allowed.usable and 0 < allowed.num_decoded < 50
    with pytest.raises(TruncatedVideo):
        inspect(str(tmp_path / "cut.mkv"), 16, allow_truncated=False)


def test_quarantine_is_asked_by_id():
    quarantine = Quarantine([entry("b"), entry("a")])
    assert "a" in quarantine and "c" not in quarantine and len(quarantine) == 2
    assert quarantine["a"] == entry("a")
    assert quarantine.describe() == "b: TruncatedVideo: b breaks off\na: TruncatedVideo: a breaks off"
    assert len(Quarantine()) == 0
    with pytest.raises(QuarantineError, match="the video a stands twice"):
        Quarantine([entry("a"), entry("a")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "must be a list of objects"),
        (b'[{"id": "a", "path": "p", "kind": "k"}]', "entry 1 must be an object with id, path, kind, reason"),
        (b'[{"id": 3, "path": "p", "kind": "k", "reason": "r"}]', "entry 1"),
        (b"[1, 2", "is not a quarantine list"),
        (b"\xff\xfe", "is not a quarantine list"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, content, words):
    (tmp_path / "list.json").write_bytes(content)
    with pytest.raises(QuarantineError, match=words) as caught:
        Quarantine.read(tmp_path / "list.json")
    assert "list.json" in str(caught.value)


def test_a_missing_list_and_a_double_entry(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no quarantine list .*list\.json"):
        Quarantine.read(tmp_path / "list.json")
    twice = Quarantine([entry("a")]).to_json() * 2
    (tmp_path / "list.json").write_text(json.dumps(twice))
    with pytest.raises(QuarantineError, match=r"list\.json is not .* the video a stands twice"):
        Quarantine.read(tmp_path / "list.json")


def test_above_a_set_share_it_stops():
    quarantine = Quarantine([entry(f"v{number}") for number in range(7)])
    quarantine.require_at_most(0.1, 70)
    with pytest.raises(TooManyBadVideos) as caught:
        quarantine.require_at_most(0.1, 69)
    assert str(caught.value) == (
        "7 of 69 videos cannot be used, 10.1%, and 10.0% are allowed: v0 (TruncatedVideo), v1 (TruncatedVideo), "
        "v2 (TruncatedVideo), v3 (TruncatedVideo), v4 (TruncatedVideo) and 2 more"
    )
    Quarantine().require_at_most(0.0, 0)
    with pytest.raises(ValueError, match="must be from 0 to 1, not 5"):
        quarantine.require_at_most(5, 100)


def test_no_videos_need_no_workers():
    assert check_videos({}) == []
    assert available_cores() >= 1
