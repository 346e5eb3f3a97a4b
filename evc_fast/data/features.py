"""`features`: videos -> frame features, once, in parallel and resumable; and features that others have extracted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evc_fast.data.check import Quarantine, Quarantined, available_cores
from evc_fast.data.feature_files import (
    CorruptFeatures,
    FeatureError,
    FeatureKind,
    FeatureMismatch,
    FeatureStore,
    FeatureWriter,
    UnknownVideo,
)
from evc_fast.data.guarded import Limits, Outcome, run_guarded
from evc_fast.data.preprocessing import Preprocessing
from evc_fast.data.video import (
    EmptyVideo,
    NoVideoStream,
    TruncatedVideo,
    UnreadableVideo,
    frame_indices,
    read_frames,
)

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers

__all__ = [
    "CorruptFeatures",
    "ExtractionReport",
    "FeatureError",
    "FeatureMismatch",
    "FeatureStore",
    "UnknownVideo",
    "extract_features",
    "import_hdf5",
]

_VIDEOS_PER_SHARD = 64  # 2 MB at 16 frames of 512: what a kill costs, and a file that is worth its name
_FRAMES_PER_BATCH = 64  # what the tower encodes at once
_FAULTS_OF_THE_FILE = {kind.__name__ for kind in (EmptyVideo, NoVideoStream, TruncatedVideo, UnreadableVideo)}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExtractionReport:
    """What became of the `requested` videos: requested = extracted + reused + len(failed).

    extracted: encoded in this run; reused: whose features were there already; seconds: of this run
    failed: those without features: not decodable, now or in an earlier run, or on the quarantine list that was given
    """

    folder: Path
    requested: int
    extracted: int
    reused: int
    failed: Quarantine
    seconds: float

    def describe(self) -> str:
        """A line of counts, and one for each video that failed."""
        head = (
            f"{self.requested} videos: {self.extracted} extracted, {self.reused} there before, "
            f"{len(self.failed)} not usable; {self.seconds:.1f} s"
        )
        return "\n".join([head, *([self.failed.describe()] if len(self.failed) else [])])


def extract_features(
    videos: Mapping[str, str | os.PathLike[str]],
    towers: ClipTowers,
    folder: str | os.PathLike[str],
    *,
    num_frames: int = 16,
    workers: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    quarantine: Quarantine | None = None,
    max_bad_share: float = 0.1,
    allow_truncated: bool = False,
    timeout_s: float = 10.0,
    memory_mb: int = 2048,
) -> ExtractionReport:
    """Encodes `num_frames` frames of every video of `videos` (id -> file) into the `FeatureStore` at `folder`.

    Worker processes decode, resize and crop; the image tower of `towers` encodes in this one, plain CLIP (t = 1). The
    store's bytes depend on videos, towers and machine alone, not on the number of workers, nor on interruptions.

    workers: processes; None takes one a core.
    resume: go on from what is in `folder`, which may also hold other videos; False makes it anew.
    progress(done, n) is called after each video.
    quarantine: videos that are not even tried.
    max_bad_share: the share of `videos` that may be bad (quarantined or not decodable) before the extraction stops.
    allow_truncated: as of `read_frames`; timeout_s, memory_mb: see `guarded.Limits`.

    A video that failed before is tried again, unless it is its file that is damaged and that has not changed.

    Raises TooManyBadVideos, FeatureMismatch where `folder` holds features of other towers or another number of frames,
    and FeatureError where another process writes there, a file has changed since it was encoded, or the tower gives
    NaN.
    """
    start = time.monotonic()
    paths = {_checked_id(video_id): os.fspath(path) for video_id, path in videos.items()}
    kind = FeatureKind(towers.fingerprint, towers.name, towers.random_weights, num_frames, towers.image_dim)
    settings = {
        "num_frames": num_frames,
        "allow_truncated": allow_truncated,
        "crop": towers.preprocess.crop,
        "resize": towers.preprocess.resize,
    }
    with FeatureWriter(folder, kind, resume=resume) as writer:
        plan = _plan(paths, writer, quarantine or Quarantine(), allow_truncated)
        bad, done = list(plan.bad), len(paths) - len(plan.todo)
        Quarantine(bad).require_at_most(max_bad_share, len(paths))
        if progress is not None:
            progress(done, len(paths))
        jobs = ({"path": paths[video_id], **settings} for video_id in plan.todo)
        limits = Limits(timeout_s, memory_mb)
        with closing(
            run_guarded(sampled_levels, jobs, workers=available_cores() if workers is None else workers, limits=limits)
        ) as outcomes:
            for chunk in _chunks(plan.todo, _VIDEOS_PER_SHARD):
                encoder = _BatchEncoder(towers, num_frames)
                failed: list[Quarantined] = []
                for video_id in chunk:
                    outcome = next(outcomes)
                    if outcome.kind:
                        failed.append(Quarantined(video_id, paths[video_id], outcome.kind, outcome.reason))
                        Quarantine([*bad, *failed]).require_at_most(max_bad_share, len(paths))
                    else:
                        encoder.take(outcome)
                    done += 1
                    if progress is not None:
                        progress(done, len(paths))
                bad += failed
                _write(writer, {video_id: plan.sizes[video_id] for video_id in chunk}, encoder.finish(), failed)
        writer.finish()
    order = {video_id: place for place, video_id in enumerate(paths)}
    failures = Quarantine(sorted(bad, key=lambda entry: order[entry.video_id]))
    extracted = len(paths) - len(plan.reused) - len(failures)
    return ExtractionReport(Path(folder), len(paths), extracted, len(plan.reused), failures, time.monotonic() - start)


@dataclass(frozen=True)
class _Plan:
    """What is to be done. sizes: of all files; bad: known beforehand; reused: encoded already; todo: in this order."""

    sizes: Mapping[str, int]
    bad: Sequence[Quarantined]
    reused: Sequence[str]
    todo: Sequence[str]


def _plan(paths: Mapping[str, str], writer: FeatureWriter, quarantine: Quarantine, allow_truncated: bool) -> _Plan:
    sizes = {video_id: _size(path) for video_id, path in paths.items()}
    wanted = [video_id for video_id in paths if video_id not in quarantine]
    reused = [video_id for video_id in wanted if video_id in writer.sizes]
    # Features of a file that has gone are as good as ever; those of one that has changed are not its features.
    changed = [video_id for video_id in reused if sizes[video_id] not in (writer.sizes[video_id], -1)]
    if changed:
        raise FeatureError(
            f"{len(changed)} video files have changed since their features in {writer.folder} were made, "
            f"{changed[0]} first: extract with resume=False"
        )
    failed_before = [video_id for video_id in wanted if video_id in writer.failed]
    lasting = _FAULTS_OF_THE_FILE - ({TruncatedVideo.__name__} if allow_truncated else set())
    settled, again = [], []
    for video_id in failed_before:
        same = writer.failed_sizes[video_id] == sizes[video_id]
        (settled if same and writer.failed[video_id].kind in lasting else again).append(video_id)
    bad = [quarantine[video_id] for video_id in paths if video_id in quarantine]
    bad += [writer.failed[video_id] for video_id in settled]
    known = {*reused, *failed_before}
    # Those tried again come last, so that the others keep their places in the shards.
    todo = [video_id for video_id in wanted if video_id not in known] + again
    return _Plan(sizes, bad, reused, todo)


def _write(
    writer: FeatureWriter, sizes: Mapping[str, int], features: torch.Tensor, failed: Sequence[Quarantined]
) -> None:
    """A shard of the videos of `sizes` without those that failed; none where all that it says is known."""
    names = {entry.video_id for entry in failed}
    news = [entry for entry in failed if writer.failed.get(entry.video_id) != entry]
    good = {video_id: size for video_id, size in sizes.items() if video_id not in names}
    if good or news:
        writer.add(good, features, news, {entry.video_id: sizes[entry.video_id] for entry in news})


class _BatchEncoder:
    """Encodes decoded videos in batches of a fixed number of frames, in the order in which they come."""

    def __init__(self, towers: ClipTowers, num_frames: int) -> None:
        self._towers = towers
        self._shape = (num_frames, towers.preprocess.crop, towers.preprocess.crop, 3)
        self._videos_per_batch = max(1, _FRAMES_PER_BATCH // num_frames)
        self._waiting: list[torch.Tensor] = []
        self._features = [torch.empty(0, num_frames, towers.image_dim)]

    def take(self, outcome: Outcome) -> None:
        """One video as `sampled_levels` gave it."""
        self._waiting.append(torch.frombuffer(outcome.payload, dtype=torch.uint8).view(self._shape))
        if len(self._waiting) == self._videos_per_batch:
            self._encode()

    def _encode(self) -> None:
        levels = torch.stack(self._waiting).permute(0, 1, 4, 2, 3)  # channels last in memory, as the tower likes them
        self._features.append(self._towers.encode_levels(levels, batch_size=_FRAMES_PER_BATCH).cpu())
        self._waiting = []

    def finish(self) -> torch.Tensor:
        """All features, float32 [V, N, D]."""
        if self._waiting:
            self._encode()
        return torch.cat(self._features)


def sampled_levels(
    path: str, num_frames: int, allow_truncated: bool, crop: int, resize: int
) -> tuple[dict[str, int], bytes]:
    """A task of `run_guarded`: a video's frames as the image tower takes them, uint8 [N, crop, crop, 3]."""
    video = read_frames(path, num_frames, allow_truncated=allow_truncated, threads=1)
    levels = Preprocessing(crop, resize).levels(video.frames)
    return {"damaged": video.damaged}, levels.permute(0, 2, 3, 1).contiguous().numpy().tobytes()


def import_hdf5(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    num_frames: int = 16,
    *,
    fingerprint: str,
    encoder: str = "imported",
    width: int | None = None,
    keys: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> FeatureStore:
    """Writes the features of an HDF5 file, one dataset [frames, width] a video id, as a `FeatureStore` at `folder`.

    Of n frames the `num_frames` at index floor(i (n - 1) / (N - 1)) are taken, as of a video; n may differ from video
    to video, the width may not. What `folder` held before is replaced.

    fingerprint: of the encoder that made the features: `ClipTowers.fingerprint` of the towers that search and caption
        with them. encoder: its name, for messages. width: of its features; None takes any.
    keys: video id -> name of its dataset; None takes every dataset under its own name.

    Raises ImportError without h5py, FileNotFoundError, and FeatureError for a file that is not HDF5, a dataset that is
    missing, not numbers, of another shape or width, without frames, or not finite.
    """
    h5py = _import_h5py()
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"there is no HDF5 file {name}")
    try:
        file = h5py.File(name, "r")
    except OSError as error:
        raise FeatureError(f"{name} is not an HDF5 file that can be read: {error}") from error
    with file:
        keys = {key: key for key in file} if keys is None else {_checked_id(id_): key for id_, key in keys.items()}
        found = _check_datasets(file, keys, h5py, name).pop()
        if width is not None and found != width:
            raise FeatureError(f"{name} holds features of width {found}, and those of {encoder} have {width}")
        kind = FeatureKind(fingerprint, encoder, False, num_frames, found)
        done = 0
        with FeatureWriter(folder, kind, resume=False) as writer:
            for chunk in _chunks(list(keys), _VIDEOS_PER_SHARD):
                sizes, rows = {}, []
                for video_id in chunk:
                    try:
                        features = torch.from_numpy(file[keys[video_id]][()].astype("float32"))
                    except OSError as error:
                        raise FeatureError(f"{name} is damaged at {keys[video_id]}: {error}") from error
                    sizes[video_id] = len(features)
                    rows.append(features[frame_indices(len(features), num_frames)])
                    done += 1
                    if progress is not None:
                        progress(done, len(keys))
                writer.add(sizes, torch.stack(rows))
            writer.finish()
    return FeatureStore.open(folder)


def _check_datasets(file: Any, keys: Mapping[str, str], h5py: Any, name: str) -> set[int]:
    """The one width of all datasets; FeatureError, naming the first that are not as they must be."""
    missing = [key for key in keys.values() if key not in file]
    if missing:
        raise FeatureError(
            f"{name} has no dataset {', '.join(missing[:10])} ({len(missing)} of {len(keys)} are missing)"
        )
    if not keys:
        raise FeatureError(f"{name} holds no datasets")
    by_width: dict[int, str] = {}
    for key in keys.values():
        entry = file[key]
        if not isinstance(entry, h5py.Dataset):
            raise FeatureError(f"{name} has a group at {key}, where a dataset [frames, width] is expected")
        if entry.dtype.kind not in "fiu" or len(entry.shape) != 2 or 0 in entry.shape:
            raise FeatureError(
                f"{name} has {entry.dtype} {list(entry.shape)} at {key}, where numbers [frames, width] are expected"
            )
        by_width.setdefault(entry.shape[1], key)
    if len(by_width) > 1:
        found = ", ".join(f"{width} ({key})" for width, key in by_width.items())
        raise FeatureError(f"{name} holds features of several widths: {found}")
    return set(by_width)


def _import_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading HDF5 features needs h5py ({error}): pip install 'evc-fast[hdf5]'") from error
    return h5py


def _checked_id(video_id: Any) -> str:
    if not isinstance(video_id, str) or not video_id:
        raise FeatureError(f"a video id must be a string that is not empty, not {video_id!r}")
    return video_id


def _size(path: str) -> int:
    """Bytes of a file; -1 where there is none, which the decoding then reports."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _chunks(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
