"""`data check`: decodes every video in a killable, memory-limited process, and lists those that cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evc_fast.data.files import write_json
from evc_fast.data.guarded import Limits, run_guarded
from evc_fast.data.video import read_frames

_KEYS = ("id", "path", "kind", "reason")


class QuarantineError(ValueError):
    """A quarantine list that cannot be read, or that holds one video twice."""


class TooManyBadVideos(ValueError):
    """A larger share of the videos than allowed cannot be used."""


@dataclass(frozen=True)
class Checked:
    """What decoding one video gave.

    kind: "" where it decodes, else the error's class: of evc_fast.data.video (TruncatedVideo, ...), of
        evc_fast.data.guarded (DecodingTimeout, DecoderCrash), or of the system (FileNotFoundError, ...)
    reason: the error's sentence
    num_decoded, duration, width, height: frames, seconds, pixels; 0 where it does not decode
    damaged: packets and frames that were passed over
    """

    video_id: str
    path: str
    kind: str = ""
    reason: str = ""
    num_decoded: int = 0
    duration: float = 0.0
    width: int = 0
    height: int = 0
    damaged: int = 0

    @property
    def usable(self) -> bool:
        """Whether the video decodes."""
        return not self.kind


@dataclass(frozen=True)
class Quarantined:
    """A video that is not to be used, and why; kind and reason as of `Checked`."""

    video_id: str
    path: str
    kind: str
    reason: str


class Quarantine:
    """The videos that are not to be used; `in` asks by video id, iteration gives `Quarantined` in their order."""

    def __init__(self, entries: Iterable[Quarantined] = ()) -> None:
        """Raises QuarantineError where a video stands twice."""
        self._entries: dict[str, Quarantined] = {}
        for entry in entries:
            if entry.video_id in self._entries:
                raise QuarantineError(f"the video {entry.video_id} stands twice in the quarantine list")
            self._entries[entry.video_id] = entry

    @classmethod
    def of(cls, checked: Iterable[Checked]) -> Quarantine:
        """Those of the checked videos that do not decode."""
        bad = (video for video in checked if not video.usable)
        return cls(Quarantined(video.video_id, video.path, video.kind, video.reason) for video in bad)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Quarantine:
        """Reads what `write` wrote; FileNotFoundError, or QuarantineError for anything else than such a list."""
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no quarantine list {os.fspath(path)}") from None
        except ValueError as error:
            raise QuarantineError(f"{os.fspath(path)} is not a quarantine list: {error}") from error
        try:
            return cls.from_json(content)
        except QuarantineError as error:
            raise QuarantineError(f"{os.fspath(path)} is not a quarantine list: {error}") from None

    @classmethod
    def from_json(cls, content: Any) -> Quarantine:
        """From what `to_json` gave; QuarantineError for anything else."""
        if not isinstance(content, list):
            raise QuarantineError(f"it must be a list of objects with {', '.join(_KEYS)}")
        for number, entry in enumerate(content, 1):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in _KEYS):
                raise QuarantineError(f"entry {number} must be an object with {', '.join(_KEYS)}, all of them strings")
        return cls(Quarantined(*(entry[key] for key in _KEYS)) for entry in content)

    def to_json(self) -> list[dict[str, str]]:
        """A list of objects with id, path, kind and reason."""
        return [dict(zip(_KEYS, asdict(entry).values(), strict=True)) for entry in self]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the list as JSON, in one step."""
        write_json(Path(path), self.to_json())

    def __contains__(self, video_id: object) -> bool:
        return video_id in self._entries

    def __iter__(self) -> Iterator[Quarantined]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, video_id: str) -> Quarantined:
        return self._entries[video_id]

    def describe(self) -> str:
        """One line a video: id, kind, reason."""
        return "\n".join(f"{entry.video_id}: {entry.kind}: {entry.reason}" for entry in self)

    def require_at_most(self, share: float, total: int) -> None:
        """Raises TooManyBadVideos where the list holds more than `share` (0 to 1) of `total` videos."""
        if not 0 <= share <= 1:
            raise ValueError(f"the share of bad videos must be from 0 to 1, not {share!r}")
        if len(self) <= share * total:
            return
        shown = [f"{entry.video_id} ({entry.kind})" for entry in list(self)[:5]]
        more = "" if len(self) <= 5 else f" and {len(self) - 5} more"
        raise TooManyBadVideos(
            f"{len(self)} of {total} videos cannot be used, {len(self) / total:.1%}, and {share:.1%} are allowed: "
            f"{', '.join(shown)}{more}"
        )


def check_videos(
    videos: Mapping[str, str | os.PathLike[str]],
    *,
    workers: int | None = None,
    timeout_s: float = 10.0,
    memory_mb: int = 2048,
    num_frames: int = 16,
    allow_truncated: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Checked]:
    """Decodes every video of `videos` (id -> file) as extraction would, and says what came of each, in their order.

    workers: processes; None takes one a core. timeout_s, memory_mb: see `guarded.Limits`; what goes beyond is killed.
    num_frames, allow_truncated: as of `read_frames`. progress(done, n) is called after each video.
    """
    paths = {video_id: os.fspath(path) for video_id, path in videos.items()}
    jobs = [{"path": path, "num_frames": num_frames, "allow_truncated": allow_truncated} for path in paths.values()]
    limits = Limits(timeout_s, memory_mb)
    outcomes = run_guarded(inspect, jobs, workers=available_cores() if workers is None else workers, limits=limits)
    checked: list[Checked] = []
    for (video_id, path), outcome in zip(paths.items(), outcomes, strict=True):
        found = outcome.value if not outcome.kind else {"kind": outcome.kind, "reason": outcome.reason}
        checked.append(Checked(video_id, path, **found))
        if progress is not None:
            progress(len(checked), len(paths))
    return checked


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def inspect(path: str, num_frames: int, allow_truncated: bool) -> tuple[dict[str, Any], bytes]:
    """A task of `run_guarded`: what `Checked` holds of a video that decodes."""
    video = read_frames(path, num_frames, allow_truncated=allow_truncated, threads=1)
    height, width = video.frames.shape[1:3]
    found = {
        "num_decoded": video.num_decoded,
        "duration": video.duration,
        "width": width,
        "height": height,
        "damaged": video.damaged,
    }
    return found, b""
