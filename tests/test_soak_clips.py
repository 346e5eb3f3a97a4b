"""benchmarks/soak.py, its clip part: 40 of its 1,000 mutations, on rendered clips; what a mutation is."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _soak_clips
import soak
from _container_fields import CLAIMS, header_fields

from evc_fast.data.guarded import Outcome


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_soak_clips, "real_clips", lambda: [])
        return _soak_clips.load_clips(tmp_path_factory.mktemp("clips"))[0]


def test_every_mutation_ends_in_a_caption_or_a_typed_error(tmp_path, monkeypatch):
    monkeypatch.setattr(_soak_clips, "real_clips", lambda: [])  # the same files on every machine
    assert soak.main(["--part", "clips", "--count", "40", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "soak_clips.json").read_text())
    total = report["rows"][-1]
    assert total["mutation"] == "all" and total["files"] == 40 and report["violations"] == []
    assert total["captions"] + total["typed errors"] + total["stopped"] == 40
    assert total["captions"] >= 10 and total["typed errors"] >= 5
    for name in ("files", "captions", "typed errors"):
        assert sum(row[name] for row in report["rows"][:-1]) == total[name]
    assert sum(report["errors"].values()) == 40 - total["captions"]
    page = (tmp_path / "soak_clips.md").read_text()
    assert "Count 40 of 1000, seed 0" in page and "rendered clips" in page and "- Violations: 0" in page


def test_headers_are_found_in_every_container_that_has_them(clips):
    by_name = {clip.name: clip for clip in clips}
    assert len(clips) == 10
    for name, clip in by_name.items():
        numbers = {
            claim: [int.from_bytes(clip.data[at : at + width], order) for _, at, width, order in clip.fields[claim]]
            for claim in CLAIMS
        }
        width, height, frames = (320, 180, 50) if "320" in name else (176, 144, 25)
        if name.endswith((".ts", ".flv")):
            assert not any(numbers.values())
            continue
        assert width in numbers["dimensions"] and height in numbers["dimensions"]
        if name.endswith(".mp4"):
            assert width << 16 in numbers["dimensions"] and frames in numbers["frame counts"]
            assert 1000 * frames // 25 in numbers["durations"]
        if name.endswith(".avi"):
            assert numbers["frame counts"] == [frames, frames]
            assert 40_000 in numbers["durations"] and len(clip.data) - 8 == numbers["sizes"][0]
        if name.endswith(".mkv"):
            assert numbers["sizes"] and 1_000_000 in numbers["durations"]  # nanoseconds a tick
    assert header_fields(b"nothing that is known") == []


def test_mutations_are_seeded_and_of_every_kind(clips):
    originals = {clip.name: clip.data for clip in clips}
    seen: Counter[str] = Counter()
    for number in range(300):
        mutation = _soak_clips.mutate(clips, 7, number)
        original = originals[mutation.clip]
        seen[mutation.kind] += 1
        if mutation.kind == "cut off":
            assert len(mutation.data) < len(original) and original.startswith(mutation.data)
        else:
            assert len(mutation.data) == len(original)
    assert set(seen) == set(_soak_clips._KINDS) and min(seen.values()) >= 10
    assert _soak_clips.mutate(clips, 7, 5) == _soak_clips.mutate(clips, 7, 5)
    assert _soak_clips.mutate(clips, 7, 5).data != _soak_clips.mutate(clips, 8, 5).data


@pytest.mark.parametrize(
    ("outcome", "ending"),
    [
        (Outcome(value="a caption"), "captions"),
        (Outcome(value=""), "untyped errors"),
        (Outcome(kind="TruncatedVideo", reason="r"), "typed errors"),
        (Outcome(kind="DecodingTimeout", reason="r"), "stopped"),
        (Outcome(kind="DecoderCrash", reason="r"), "crashes"),
        (Outcome(kind="IndexError", reason="r", typed=False), "untyped errors"),
    ],
)
def test_endings(outcome, ending, clips, monkeypatch):
    monkeypatch.setattr(_soak_clips, "load_clips", lambda folder: (clips, "clips"))
    monkeypatch.setattr(_soak_clips, "run_guarded", lambda task, jobs, **options: (outcome for _ in jobs))
    found = _soak_clips.run(3, 0, lambda done, total: None)
    assert found["rows"][-1][ending] == 3 == found["rows"][-1]["files"]
    assert len(found["violations"]) == (3 if ending in ("crashes", "untyped errors") else 0)
    assert len(found["stopped"]) == (3 if ending == "stopped" else 0)


def test_a_violation_is_written_down_and_fails_the_run(tmp_path, monkeypatch):
    rows = [{"what": "things", "broken": 1}]
    part = types.ModuleType("_soak_clips")
    part.TITLE, part.FULL = "A part", 5
    part.run = lambda count, seed, progress: {"rows": rows, "violations": [f"broken at {seed}"], "said": ["noted"]}
    monkeypatch.setitem(sys.modules, "_soak_clips", part)
    assert soak.main(["--part", "clips", "--seed", "3", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "soak_clips.md").read_text()
    assert "Count 5 of 5, seed 3" in page and "- broken at 3" in page and "- noted" in page
    assert "| things | 1 |" in page


def test_the_command_line(capsys):
    assert "clips" in soak.part_names()
    for wrong in (["--count", "0"], ["--part", "unknown"]):
        with pytest.raises(SystemExit):
            soak.parse_arguments(wrong)
    assert "--count must be at least 1" in capsys.readouterr().err
