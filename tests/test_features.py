"""Extraction: the features of the pipeline, in any order of events, killed or not; and the store that holds them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import faulty_videos
from _clip import encode_clip

from evc_fast.data import features
from evc_fast.data.check import Quarantine, Quarantined, TooManyBadVideos
from evc_fast.data.clip import ClipTowers
from evc_fast.data.feature_files import FeatureKind, FeatureWriter
from evc_fast.data.features import (
    CorruptFeatures,
    FeatureError,
    FeatureMismatch,
    FeatureStore,
    UnknownVideo,
    extract_features,
)
from evc_fast.data.guarded import Outcome
from evc_fast.data.video import VideoError, read_frames

pytestmark = pytest.mark.usefixtures("one_thread")

N = 4


@pytest.fixture(scope="module")
def towers():
    return ClipTowers.random("tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Seven short clips of several sizes and lengths."""
    folder = tmp_path_factory.mktemp("clips")
    shapes = [(0.4, 64, 48), (0.2, 48, 64), (0.08, 96, 64), (0.4, 32, 32), (0.3, 64, 64), (0.2, 80, 48), (0.04, 64, 48)]
    return {
        f"video{number}": encode_clip(folder / f"{number}.mp4", seconds=seconds, width=width, height=height)
        for number, (seconds, width, height) in enumerate(shapes)
    }


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features, "_VIDEOS_PER_SHARD", 3)


@pytest.fixture
def no_workers(monkeypatch):
    """Tasks run in this process, where that is not the point: a worker takes seconds to start."""

    def run_here(task, jobs, **options):
        for job in jobs:
            try:
                value, payload = task(**job)
            except (OSError, VideoError) as error:
                yield Outcome(kind=type(error).__name__, reason=str(error))
            else:
                yield Outcome(value, bytearray(payload))

    monkeypatch.setattr(features, "run_guarded", run_here)


def extract(videos, towers, folder, **options):
    return extract_features(videos, towers, folder, **{"num_frames": N, "workers": 1, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def store(clips, towers, tmp_path, small_shards, no_workers):
    extract(clips, towers, tmp_path / "store")
    return FeatureStore.open(tmp_path / "store")


def test_the_features_are_those_of_the_pipeline(store, clips, towers):
    assert store.video_ids == tuple(clips) and len(store) == 7
    assert (store.num_frames, store.width, store.fingerprint) == (N, towers.image_dim, towers.fingerprint)
    assert store.encoder == towers.name and store.random_weights
    for video_id, path in clips.items():
        expected = towers.encode_frames(read_frames(path, N).frames)
        torch.testing.assert_close(store[video_id], expected, rtol=1e-5, atol=1e-6)
        assert store[video_id].shape == (N, towers.image_dim) and store[video_id].dtype == torch.float32
    store.verify()


def test_towers_that_resize_more_than_they_crop_and_other_engines(clips, tmp_path, no_workers):
    library = ClipTowers.random("tiny", engine="library")
    library.preprocess = type(library.preprocess)(crop=32, resize=40)
    videos = {"video0": clips["video0"]}
    extract(videos, library, tmp_path)
    expected = library.encode_frames(read_frames(clips["video0"], N).frames)
    torch.testing.assert_close(FeatureStore.open(tmp_path)["video0"], expected, rtol=1e-5, atol=1e-6)


def test_what_is_there_is_not_made_again(store, clips, towers, monkeypatch):
    before = contents(store.folder)
    monkeypatch.setattr(features, "sampled_levels", None)  # would fail as a task
    progress = []
    report = extract(clips, towers, store.folder, progress=lambda *counts: progress.append(counts))
    assert (report.requested, report.extracted, report.reused, len(report.failed)) == (7, 0, 7, 0)
    assert contents(store.folder) == before and progress == [(7, 7)]


def test_more_videos_are_added(clips, towers, tmp_path, small_shards, no_workers):
    few = {video_id: clips[video_id] for video_id in list(clips)[:2]}
    extract(few, towers, tmp_path)
    opened = FeatureStore.open(tmp_path)
    progress = []
    report = extract(clips, towers, tmp_path, workers=2, progress=lambda *counts: progress.append(counts))
    assert (report.extracted, report.reused) == (5, 2)
    assert progress == [(done, 7) for done in range(2, 8)]
    assert set(FeatureStore.open(tmp_path).video_ids) == set(clips)
    assert opened.video_ids == tuple(few) and torch.isfinite(opened["video1"]).all()  # its files are still there


def test_made_anew_on_request(store, clips, towers):
    report = extract({"video0": clips["video0"]}, towers, store.folder, resume=False)
    assert report.extracted == 1 and FeatureStore.open(store.folder).video_ids == ("video0",)
    assert store["video5"].shape == (N, towers.image_dim)  # mapped before, and held


def test_interrupted_by_ctrl_c(clips, towers, tmp_path, small_shards, no_workers):
    extract(clips, towers, tmp_path / "whole")

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(clips, towers, tmp_path / "broken", progress=interrupt)
    assert sorted(contents(tmp_path / "broken")) == [".lock", "features-00000.safetensors"]
    with pytest.raises(CorruptFeatures, match="was not finished: 1 shards are there; run it again to go on"):
        FeatureStore.open(tmp_path / "broken")
    report = extract(clips, towers, tmp_path / "broken", workers=2)
    assert (report.extracted, report.reused) == (4, 3)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


PROGRAM = """if True:
    import sys; sys.path[:] = {path!r}
    import torch, faulty_videos
    from evc_fast.data import features
    from evc_fast.data.clip import ClipTowers
    torch.set_num_threads(1)
    features._VIDEOS_PER_SHARD = 3
    features.sampled_levels = faulty_videos.slow_levels
    videos = {videos!r}
    try:
        report = features.extract_features(
            videos, ClipTowers.random("tiny"), {folder!r}, num_frames=4, workers=1, max_bad_share=0.2
        )
    except features.FeatureError as error:
        print("refused:", error)
    else:
        print("extracted", report.extracted, "reused", report.reused)
"""


def program(videos, folder) -> list[str]:
    paths = {video_id: str(path) for video_id, path in videos.items()}
    return [sys.executable, "-c", PROGRAM.format(path=sys.path, videos=paths, folder=str(folder))]


def test_killed_and_resumed_gives_the_same_bytes(clips, towers, tmp_path, small_shards, no_workers):
    broken = tmp_path / "broken"
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    videos = {"bad": bad, **clips}
    with subprocess.Popen(program(videos, broken)) as process:
        while not list(broken.glob("features-*")):
            assert process.poll() is None, "it ended before its first shard was seen"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(CorruptFeatures, match="was not finished"):
        FeatureStore.open(broken)
    (broken / ".features-00007.safetensors.1.tmp").write_bytes(b"what a kill leaves")
    resumed = extract(videos, towers, broken, max_bad_share=0.2)
    assert resumed.reused >= 2 and resumed.reused + resumed.extracted == 7
    assert [entry.video_id for entry in resumed.failed] == ["bad"]
    extract(videos, towers, tmp_path / "whole", max_bad_share=0.2)
    assert contents(broken) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_at_once(clips, towers, tmp_path):
    both = [subprocess.Popen(program(clips, tmp_path), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].strip() for process in both)
    assert all(process.returncode == 0 for process in both)
    # The later one is refused, or finds everything done.
    assert said[0] in ("extracted 0 reused 7", "extracted 7 reused 0")
    assert said[1] in ("extracted 7 reused 0", f"refused: another process is writing features into {tmp_path}")
    store = FeatureStore.open(tmp_path)
    assert set(store.video_ids) == set(clips)
    store.verify()


def test_one_writer_at_a_time(clips, towers, tmp_path, no_workers):
    kind = FeatureKind(towers.fingerprint, towers.name, True, N, towers.image_dim)
    with (
        FeatureWriter(tmp_path, kind, resume=True),
        pytest.raises(FeatureError, match="another process is writing features into"),
    ):
        extract(clips, towers, tmp_path)
    assert extract(clips, towers, tmp_path).extracted == 7


class _Rows(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store)

    def __getitem__(self, index):
        return self.store[self.store.video_ids[index]]


def test_readers_in_other_processes(store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy.video_ids == store.video_ids and len(pickle.dumps(store)) < 1000
    loader = torch.utils.data.DataLoader(_Rows(store), batch_size=7, num_workers=2)
    (rows,) = loader
    assert torch.equal(rows, torch.stack([store[video_id] for video_id in store.video_ids]))


def many(clips, folder, count, bad) -> dict[str, Path]:
    """`count` ids on few files, `bad` of them corrupt in one way or another."""
    videos = {f"v{number}": list(clips.values())[number % 7] for number in range(count)}
    data = clips["video0"].read_bytes()
    for number in range(bad):
        path = folder / f"corrupt{number}.mp4"
        path.write_bytes([data[: len(data) // 2], b"", b"rubbish" * 99][number % 3])
        videos[f"v{number * count // bad + 1}"] = path
    return videos


def test_five_percent_corrupt_videos(clips, towers, tmp_path, capsys):
    videos = many(clips, tmp_path, 40, 2)
    reports = {}
    for workers in (1, 2):
        report = extract(videos, towers, tmp_path / str(workers), workers=workers, max_bad_share=0.05)
        assert report.requested == 40 == report.extracted + len(report.failed) and report.reused == 0
        reports[workers] = [(entry.video_id, entry.kind) for entry in report.failed]
        print(report.describe())
    assert reports[1] == reports[2] == [("v1", "TruncatedVideo"), ("v21", "EmptyVideo")]
    printed = capsys.readouterr().out
    assert "40 videos: 38 extracted, 0 there before, 2 not usable" in printed and "v21: EmptyVideo:" in printed
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    store = FeatureStore.open(tmp_path / "1")
    assert len(store) == 38 and [entry.video_id for entry in store.failed] == ["v1", "v21"]
    with pytest.raises(UnknownVideo, match=r"no features of v1, 1 of them because .* \(TruncatedVideo\)"):
        store["v1"]


def test_above_a_set_share_it_stops_and_goes_on_when_more_is_allowed(clips, towers, tmp_path, small_shards, no_workers):
    videos = many(clips, tmp_path, 20, 3)
    with pytest.raises(TooManyBadVideos, match=r"^3 of 20 videos cannot be used, 15.0%, and 10.0% are allowed: v1 "):
        extract(videos, towers, tmp_path / "store")
    report = extract(videos, towers, tmp_path / "store", max_bad_share=0.2)
    assert report.reused > 0 and report.reused + report.extracted == 17 and len(report.failed) == 3


def test_a_decoder_that_crashes_or_hangs(clips, towers, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "sampled_levels", faulty_videos.levels_or_worse)
    videos = dict(clips)
    for name in ("segfault", "hang", "untyped"):
        videos[name] = shutil.copy(clips["video0"], tmp_path / f"{name}.mp4")
    report = extract(videos, towers, tmp_path / "store", timeout_s=2.0, max_bad_share=0.3)
    assert report.extracted == 7
    kinds = {"segfault": "DecoderCrash", "hang": "DecodingTimeout", "untyped": "ZeroDivisionError"}
    assert {entry.video_id: entry.kind for entry in report.failed} == kinds
    # None of these need be the file's fault: they are tried again.
    monkeypatch.setattr(features, "sampled_levels", faulty_videos.slow_levels)
    report = extract(videos, towers, tmp_path / "store", max_bad_share=0.3)
    assert (report.extracted, report.reused, len(report.failed)) == (3, 7, 0)
    assert len(FeatureStore.open(tmp_path / "store").failed) == 0


def test_a_quarantined_video_is_not_tried(clips, towers, tmp_path, no_workers):
    quarantine = Quarantine([Quarantined("video3", "3.mp4", "OutOfMemory", "too large"), Quarantined("x", "", "", "")])
    report = extract(clips, towers, tmp_path, quarantine=quarantine, max_bad_share=0.2)
    assert report.extracted == 6 and [entry.video_id for entry in report.failed] == ["video3"]
    assert "video3" not in FeatureStore.open(tmp_path)
    with pytest.raises(TooManyBadVideos):
        extract(clips, towers, tmp_path, quarantine=quarantine, max_bad_share=0.1)
    assert extract(clips, towers, tmp_path).extracted == 1


def test_files_that_change(clips, towers, tmp_path, no_workers):
    videos = dict(clips)
    videos["late"], videos["mended"] = tmp_path / "late.mp4", tmp_path / "mended.mp4"
    videos["mended"].write_bytes(b"half of it")
    report = extract(videos, towers, tmp_path / "store", max_bad_share=0.3)
    assert [entry.kind for entry in report.failed] == ["FileNotFoundError", "UnreadableVideo"]
    before = contents(tmp_path / "store")
    assert extract(videos, towers, tmp_path / "store", max_bad_share=0.3).failed["late"].kind == "FileNotFoundError"
    assert contents(tmp_path / "store") == before
    for name in ("late", "mended"):
        shutil.copy(clips["video1"], videos[name])
    report = extract(videos, towers, tmp_path / "store")
    assert (report.extracted, report.reused, len(report.failed)) == (2, 7, 0)
    shutil.copy(clips["video2"], videos["late"])
    with pytest.raises(FeatureError, match=r"1 video files have changed .* late first: extract with resume=False"):
        extract(videos, towers, tmp_path / "store")
    os.unlink(videos["late"])
    assert extract(videos, towers, tmp_path / "store").reused == 9


def test_features_of_another_encoder_are_refused(store, clips, towers):
    other = ClipTowers.random("tiny", seed=1)
    with pytest.raises(FeatureMismatch, match="holds features of another encoder"):
        extract(clips, other, store.folder)
    with pytest.raises(FeatureMismatch, match="num_frames = 4, not 5"):
        extract(clips, towers, store.folder, num_frames=5)
    store.require_encoder(towers.fingerprint)
    with pytest.raises(FeatureMismatch, match="another encoder"):
        store.require_encoder(other.fingerprint)
    shutil.copy(store.folder / "features-00000.safetensors", store.folder / "features-00003.safetensors")
    assert len(FeatureStore.open(store.folder)) == 7  # what no manifest names does not count


def test_unknown_and_invalid_ids(store, clips, towers, tmp_path):
    with pytest.raises(UnknownVideo, match="has no features of nobody"):
        store["nobody"]
    with pytest.raises(UnknownVideo, match=r"has no features of a, b$"):
        store.require_videos(["a", "video1", "b"])
    assert "video1" in store and "nobody" not in store
    for wrong in ("", 7, None):
        with pytest.raises(FeatureError, match="a video id must be a string that is not empty"):
            extract({wrong: clips["video0"]}, towers, tmp_path / "other")
    for wrong in (0, True, 2.0):
        with pytest.raises(FeatureError, match="num_frames must be an integer of at least 1"):
            extract(clips, towers, tmp_path / "other", num_frames=wrong)


def test_features_that_are_not_finite_are_refused(store, clips, towers, tmp_path, monkeypatch):
    encode = towers.encode_levels
    monkeypatch.setattr(towers, "encode_levels", lambda *args, **options: encode(*args, **options) / 0)
    with pytest.raises(FeatureError, match=r"the features of video0, video1, .* are not finite"):
        extract(clips, towers, tmp_path / "new")
    path = store.folder / "features-00001.safetensors"
    rewrite(path, lambda values: values.index_fill(1, torch.tensor([2]), float("nan")))
    opened = FeatureStore.open(store.folder)
    with pytest.raises(CorruptFeatures, match=r"00001\.safetensors has features of video4 that are not finite"):
        opened["video4"]
    with pytest.raises(CorruptFeatures, match=r"00001\.safetensors is damaged: its checksum is another"):
        opened.verify()


def rewrite(path, change=lambda values: values, **record):
    """Writes a shard anew with other features or entries of its record."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        held = json.loads(file.metadata()["record"])
    values = change(load_file(path)["features"].clone())
    path.unlink()
    save_file({"features": values.contiguous()}, path, metadata={"record": json.dumps(held | record)})


def test_damaged_stores_are_refused(store, tmp_path):
    def damaged(name):
        return Path(shutil.copytree(store.folder, tmp_path / name))

    with pytest.raises(FileNotFoundError, match="there is no feature folder"):
        FeatureStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptFeatures, match=r"is not a feature store: it has no manifest\.json"):
        FeatureStore.open(tmp_path / "empty")

    folder = damaged("short")
    os.truncate(folder / "features-00001.safetensors", 1000)
    with pytest.raises(CorruptFeatures, match=r"00001\.safetensors is damaged"):
        FeatureStore.open(folder)
    (folder / "features-00001.safetensors").unlink()
    with pytest.raises(CorruptFeatures, match=r"not a whole feature store: features-00001\.safetensors is missing"):
        FeatureStore.open(folder)

    folder = damaged("twice")
    shutil.copy(folder / "features-00000.safetensors", folder / "features-00001.safetensors")
    with pytest.raises(CorruptFeatures, match="promises 7 videos, the shards hold 4"):
        FeatureStore.open(folder)
    kind = store.kind
    with pytest.raises(CorruptFeatures, match="holds features of video0, video1, video2 twice"):
        FeatureWriter(folder, kind, resume=True)

    folder = damaged("narrow")
    rewrite(folder / "features-00002.safetensors", lambda values: values[:, :, 1:])
    with pytest.raises(CorruptFeatures, match=r"has features torch.float32 \[1, 4, 31\], expected"):
        FeatureStore.open(folder)
    rewrite(folder / "features-00002.safetensors", version=9)
    with pytest.raises(CorruptFeatures, match="version 9"):
        FeatureStore.open(folder)
    save_file({"weights": torch.zeros(2)}, folder / "features-00002.safetensors")
    with pytest.raises(CorruptFeatures, match="is damaged"):
        FeatureStore.open(folder)

    manifest = json.loads((store.folder / "manifest.json").read_text())
    for change, words in (
        ({"format": "other"}, "is not that of a feature store"),
        ({"version": 2}, "is of version 2"),
        ({"videos": 8}, "promises 8 videos"),
        ({"width": "32"}, "is damaged: width must be"),
        ({"fingerprint": "f" * 64}, "another encoder"),
        ({"failed": {}}, "is damaged: it must be a list"),
        ({"shards": [{"file": "../features-00000.safetensors"}]}, "a file in the same folder"),
        ({"shards": [{}]}, "is damaged"),
    ):
        folder = damaged(f"manifest {words[:20]}")
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(FeatureError, match=words):
            FeatureStore.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CorruptFeatures, match=r"manifest\.json is damaged"):
        FeatureStore.open(folder)
