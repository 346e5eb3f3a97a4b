"""Captions and the videos they belong to: EmVidCap's CSV, COCO-caption JSON, splits by video, and the videos' files."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evc_fast.data.caption_files import CaptionError, read_caption_rows, read_name_mapping
from evc_fast.data.text_files import listed
from evc_fast.model.decoders.vocabulary import caption_words

__all__ = [
    "Caption",
    "CaptionError",
    "CaptionSet",
    "check_splits",
    "differing_ids",
    "locate_videos",
    "merge_captions",
    "read_captions",
    "read_name_mapping",
    "split_by_video",
    "video_files",
]

_VIDEO_SUFFIXES = {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"}
_VIDEO_SUFFIXES |= {".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}


@dataclass(frozen=True, slots=True)
class Caption:
    """One sentence about one video, as it was written."""

    video_id: str
    text: str


class CaptionSet:
    """n captions of m videos, immutable, in the order they were given.

    captions: the n captions; video_ids: the m distinct ids in order of first appearance
    Raises CaptionError for an empty video id, and for a caption in which no word is left as captions are read
    (`caption_words`), naming the video.
    """

    def __init__(self, captions: Iterable[Caption]) -> None:
        self.captions: tuple[Caption, ...] = tuple(captions)
        texts: dict[str, list[str]] = {}
        for number, caption in enumerate(self.captions, start=1):
            if not caption.video_id:
                raise CaptionError(f"caption {number} has no video id: {caption.text!r}")
            if not caption_words(caption.text):
                raise CaptionError(f"caption {number}, of video {caption.video_id!r}, has no words: {caption.text!r}")
            texts.setdefault(caption.video_id, []).append(caption.text)
        self._texts = texts
        self.video_ids: tuple[str, ...] = tuple(texts)

    @property
    def texts(self) -> list[str]:
        """The n sentences."""
        return [caption.text for caption in self.captions]

    def of(self, video_id: str) -> list[str]:
        """The captions of one video. Raises CaptionError where it has none here."""
        if video_id not in self._texts:
            raise CaptionError(f"there are no captions of a video {video_id!r}")
        return list(self._texts[video_id])

    def references(self) -> dict[str, list[str]]:
        """Video id -> its captions: what the metrics compare with."""
        return {video_id: list(texts) for video_id, texts in self._texts.items()}

    def subset(self, video_ids: Iterable[str]) -> CaptionSet:
        """The captions of these videos, in the order of this set.

        Raises CaptionError for ids that come twice and for unknown ones, naming all of them.
        """
        video_ids = list(video_ids)
        wanted = set(video_ids)
        if len(wanted) != len(video_ids):
            twice = dict.fromkeys(video_id for video_id in video_ids if video_ids.count(video_id) > 1)
            raise CaptionError(f"video ids that come twice: {listed(twice)}")
        unknown = [video_id for video_id in video_ids if video_id not in self._texts]
        if unknown:
            raise CaptionError(f"there are no captions of these videos: {listed(unknown)}")
        return CaptionSet(caption for caption in self.captions if caption.video_id in wanted)

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[Caption]:
        return iter(self.captions)

    def __contains__(self, video_id: object) -> bool:
        return video_id in self._texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CaptionSet) and self.captions == other.captions

    def __hash__(self) -> int:
        return hash(self.captions)

    def __repr__(self) -> str:
        return f"CaptionSet({len(self)} captions of {len(self.video_ids)} videos)"


def read_captions(path: str | os.PathLike[str], *, id_prefix: str = "") -> CaptionSet:
    """Captions from EmVidCap's CSV or from COCO-caption JSON; the content of the file says which it is.

    CSV: header `VideoID,EmCaptions` (other columns are let be), one caption a row, separated by commas, quoted as usual
        where a caption holds one, or by tabs.
    JSON: an object with "images", each with "id", and "annotations", each with "image_id" and "caption"; ids become
        strings. An image without annotations has no captions, and so no place in the set.
    id_prefix: put before every id that does not begin with it: "vid" makes "1300" the "vid1300" that EmVidCap's name
        mapping and features have.

    Raises FileNotFoundError without the file; CaptionError, with file and line (JSON: which entry), for columns that
    are missing, rows with other numbers of fields, empty ids and captions, image ids that come twice or that no image
    has, text that is not UTF-8, and a file without captions.
    """
    rows = read_caption_rows(path)
    return CaptionSet(
        Caption(video_id if video_id.startswith(id_prefix) else id_prefix + video_id, text) for video_id, text in rows
    )


def merge_captions(*sets: CaptionSet, names: Sequence[str] | None = None) -> CaptionSet:
    """All captions of several data sets: EVC-Combine is EVC-MSVD and EVC-VE.

    names: what the sets are called in messages, such as their files; None counts them.
    Raises CaptionError where two have videos of one id, which may be different videos.
    """
    called = [f"set {number}" for number in range(1, len(sets) + 1)] if names is None else names
    _check_disjoint(list(zip(called, sets, strict=True)), "give one of them an id_prefix")
    return CaptionSet(itertools.chain.from_iterable(sets))


def check_splits(**splits: CaptionSet) -> None:
    """Raises CaptionError where two splits, as in `check_splits(train=..., test=...)`, share a video."""
    _check_disjoint(list(splits.items()), "a video belongs to one split")


def _check_disjoint(sets: Sequence[tuple[str, CaptionSet]], advice: str) -> None:
    for (first, one), (second, other) in itertools.combinations(sets, 2):
        shared = [video_id for video_id in one.video_ids if video_id in other]
        if shared:
            raise CaptionError(f"{first} and {second} both have captions of {listed(shared)}: {advice}")


def differing_ids(wanted: Sequence[str], there: Sequence[str]) -> str:
    """A hint for messages where no id is in both: "; ids of the captions are such as '1300', of the features 'vid1300':
    look at id_prefix". Else "".
    """
    if not wanted or not there or set(wanted) & set(there):
        return ""
    return f"; ids of the captions are such as {wanted[0]!r}, of the features {there[0]!r}: look at id_prefix"


def split_by_video(captions: CaptionSet, share: float, seed: int) -> tuple[CaptionSet, CaptionSet]:
    """(the rest, `share` of the videos), as for a validation split; no video is in both.

    Which videos are taken depends on their ids and the seed alone, not on their order or on the platform. The number is
    rounded, at least 1 and at most all but 1. Raises CaptionError where share is not between 0 and 1, or there is only
    one video.
    """
    if not 0 < share < 1:
        raise CaptionError(f"the share of videos to split off must be between 0 and 1, got {share}")
    total = len(captions.video_ids)
    if total < 2:
        raise CaptionError(f"a split by video needs at least 2 videos, got {total}")
    count = min(max(round(share * total), 1), total - 1)
    drawn = sorted(captions.video_ids, key=lambda video_id: hashlib.sha256(f"{seed} {video_id}".encode()).digest())
    taken = set(drawn[:count])
    rest = [video_id for video_id in captions.video_ids if video_id not in taken]
    return captions.subset(rest), captions.subset(taken)


def video_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The video files anywhere below `folder`, by their suffix (.avi, .mp4, ...), sorted."""
    paths = sorted(Path(folder).rglob("*"))
    return [path for path in paths if path.suffix.lower() in _VIDEO_SUFFIXES and path.is_file()]


def locate_videos(
    video_ids: Iterable[str], folder: str | os.PathLike[str], mapping: Mapping[str, str] | None = None
) -> dict[str, Path]:
    """Video id -> its file, anywhere below `folder`: named by `mapping[id]`, or by the id where the mapping lacks it.

    A file is a video by its suffix (.avi, .mp4, ...). Raises FileNotFoundError without the folder; CaptionError where
    videos have no file, naming all of them, and where one has several files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of videos {folder}")
    files: dict[str, list[Path]] = {}
    for path in video_files(folder):
        files.setdefault(path.stem, []).append(path)
    mapping = mapping or {}
    names = {video_id: mapping.get(video_id, video_id) for video_id in video_ids}
    lacking = {video_id: name for video_id, name in names.items() if name not in files}
    if lacking:
        shown = ", ".join(
            video_id if name == video_id else f"{video_id} ({name})" for video_id, name in lacking.items()
        )
        raise CaptionError(f"{folder} has no video file for {len(lacking)} of {len(names)} ids: {shown}")
    for video_id, name in names.items():
        if len(files[name]) > 1:
            found = " and ".join(str(path) for path in files[name])
            raise CaptionError(f"several files could be video {video_id!r}: {found}")
    return {video_id: files[name][0] for video_id, name in names.items()}
