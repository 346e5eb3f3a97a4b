"""Frame features on disk: safetensors shards that say what is in them, and a manifest that is written last.

A shard holds the features of consecutive videos, [V, N, D] float32, and beside them, in its header, their ids and the
videos of that stretch that could not be decoded. So an interrupted extraction goes on behind its last whole shard, and
gives the same bytes as one that was not interrupted. Nothing in the files can execute.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evc_fast.data.check import Quarantine, Quarantined, QuarantineError
from evc_fast.data.files import lock_folder, write_atomically, write_json

_FORMAT = "evc_fast frame features"
_VERSION = 1
_MANIFEST, _SHARD = "manifest.json", "features-{:05d}.safetensors"


class FeatureError(ValueError):
    """Base of the errors that frame features raise about their content."""


class CorruptFeatures(FeatureError):
    """A feature store whose files are missing, damaged, unfinished, or do not belong together."""


class FeatureMismatch(FeatureError):
    """Features of another encoder, number of frames or width than those wanted."""


class UnknownVideo(FeatureError):
    """A video id that the store has no features of."""


@dataclass(frozen=True)
class FeatureKind:
    """What all features of a store have in common.

    fingerprint: of the encoder (`ClipTowers.fingerprint`); encoder: its name; random_weights: whether it was noise
    num_frames, width: N, D
    """

    fingerprint: str
    encoder: str
    random_weights: bool
    num_frames: int
    width: int

    def __post_init__(self) -> None:
        for name, kind in (("fingerprint", str), ("encoder", str), ("random_weights", bool)):
            if type(getattr(self, name)) is not kind:
                raise FeatureError(f"{name} must be {kind.__name__}, not {getattr(self, name)!r}")
        for name in ("num_frames", "width"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise FeatureError(f"{name} must be an integer of at least 1, not {getattr(self, name)!r}")

    def require(self, wanted: FeatureKind, folder: Path) -> None:
        """Raises FeatureMismatch where features of kind `wanted` cannot stand beside these."""
        if self.fingerprint != wanted.fingerprint:
            raise FeatureMismatch(
                f"{folder} holds features of another encoder: {self.encoder} (fingerprint {self.fingerprint[:12]}), "
                f"not {wanted.encoder} ({wanted.fingerprint[:12]})"
            )
        for name in ("num_frames", "width"):
            if getattr(self, name) != getattr(wanted, name):
                raise FeatureMismatch(
                    f"{folder} holds features with {name} = {getattr(self, name)}, not {getattr(wanted, name)}"
                )


@dataclass(frozen=True)
class Shard:
    """One file: features float32 [V, N, D], mapped into memory, of the V videos of `sizes`.

    sizes: video id -> bytes of the video file, or frames of the imported features; failed_sizes: of those in `failed`
    """

    path: Path
    kind: FeatureKind
    features: torch.Tensor
    sizes: Mapping[str, int]
    failed: Quarantine
    failed_sizes: Mapping[str, int]


def read_shard(path: Path) -> Shard:
    """Maps a shard; CorruptFeatures where it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            features = file.get_tensor("features")
        if record["format"] != _FORMAT or record["version"] != _VERSION:
            raise CorruptFeatures(f"{path} is of format {record['format']!r}, version {record['version']}")
        kind = FeatureKind(**record["kind"])
        sizes, failed_sizes = dict(record["sizes"]), dict(record["failed_sizes"])
        failed = Quarantine.from_json(record["failed"])
    except FileNotFoundError:
        raise CorruptFeatures(f"{path.parent} is not a whole feature store: {path.name} is missing") from None
    except CorruptFeatures:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CorruptFeatures(f"{path} is damaged: {error}") from error
    expected = [len(sizes), kind.num_frames, kind.width]
    if features.dtype != torch.float32 or list(features.shape) != expected or len(record["sizes"]) != len(sizes):
        raise CorruptFeatures(
            f"{path} has features {features.dtype} {list(features.shape)}, expected torch.float32 {expected}"
        )
    return Shard(path, kind, features, sizes, failed, failed_sizes)


class FeatureWriter:
    """Adds shards to a folder, which it keeps for itself as long as it is open; a context manager.

    sizes: video id -> size (see `Shard`) of all that is there; failed, failed_sizes: what could not be decoded so far
    """

    def __init__(self, folder: str | os.PathLike[str], kind: FeatureKind, *, resume: bool) -> None:
        """Goes on from the shards that are there, or with `resume=False` removes them.

        Raises FeatureMismatch where they are of another kind, FeatureError where another process is writing there.
        """
        self.folder = Path(folder)
        self.kind = kind
        try:
            self._lock = lock_folder(self.folder)
        except BlockingIOError:
            raise FeatureError(f"another process is writing features into {self.folder}") from None
        try:
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            if not resume:
                (self.folder / _MANIFEST).unlink(missing_ok=True)
                for path in _shard_paths(self.folder):
                    path.unlink()
            self._paths = _shard_paths(self.folder)
            self.sizes: dict[str, int] = {}
            self.failed: dict[str, Quarantined] = {}
            self.failed_sizes: dict[str, int] = {}
            for path in self._paths:
                shard = read_shard(path)
                shard.kind.require(kind, self.folder)
                self._take(shard.sizes, shard.failed, shard.failed_sizes)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def add(
        self,
        sizes: Mapping[str, int],
        features: torch.Tensor,
        failed: Sequence[Quarantined] = (),
        failed_sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Writes one shard: features float32 [V, N, D] of the V videos of `sizes`, and who failed beside them.

        FeatureError for features that are not finite, naming the videos.
        """
        finite = features.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            bad = [video_id for video_id, good in zip(sizes, finite, strict=True) if not good]
            raise FeatureError(f"the features of {_some(bad)} are not finite: they hold NaN or infinity")
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": asdict(self.kind),
            "sizes": list(sizes.items()),
            "failed": Quarantine(failed).to_json(),
            "failed_sizes": list((failed_sizes or {}).items()),
        }
        number = int(self._paths[-1].stem.split("-")[1]) + 1 if self._paths else 0
        path = self.folder / _SHARD.format(number)
        metadata = {"record": json.dumps(record)}  # one entry: safetensors writes several in any order
        write_atomically(path, save({"features": features.contiguous()}, metadata=metadata))
        self._paths.append(path)
        self._take(sizes, failed, failed_sizes or {})

    def finish(self) -> None:
        """Writes the manifest, which makes a store of the shards."""
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            **asdict(self.kind),
            "videos": len(self.sizes),
            "shards": [{"file": path.name, "sha256": _sha256(path)} for path in self._paths],
            "failed": Quarantine(self.failed.values()).to_json(),
        }
        write_json(self.folder / _MANIFEST, manifest)

    def _take(
        self, sizes: Mapping[str, int], failed: Quarantine | Sequence[Quarantined], failed_sizes: Mapping[str, int]
    ) -> None:
        twice = [video_id for video_id in sizes if video_id in self.sizes]
        if twice:
            raise CorruptFeatures(f"{self.folder} holds features of {_some(twice)} twice")
        self.sizes |= sizes
        self.failed |= {entry.video_id: entry for entry in failed}
        self.failed_sizes |= failed_sizes
        for video_id in sizes:  # it failed once, and was mended
            self.failed.pop(video_id, None)
            self.failed_sizes.pop(video_id, None)


class FeatureStore:
    """Frame features by video id, mapped into memory: `store[video_id]` is float32 [N, D].

    Made by `open`; pickles as its folder, so that worker processes map the same files.
    video_ids: tuple, in the order of extraction; fingerprint: of the encoder that made the features; encoder: its name
    random_weights: whether that encoder was noise; num_frames, width: N, D
    failed: `Quarantine` of the videos that could not be decoded
    """

    def __init__(self, folder: Path, kind: FeatureKind, shards: Sequence[Shard], failed: Quarantine) -> None:
        """From content that `open` has checked."""
        self.folder = folder
        self.kind = kind
        self.failed = failed
        self._shards = shards
        self._places = {
            video_id: (number, row) for number, shard in enumerate(shards) for row, video_id in enumerate(shard.sizes)
        }

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> FeatureStore:
        """Opens a finished store. Raises FileNotFoundError where there is no folder, CorruptFeatures where it is not a
        whole one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no feature folder {folder}")
        kind, names, failed, count = _read_manifest(folder)
        shards = [read_shard(folder / name) for name in names]
        for shard in shards:
            shard.kind.require(kind, folder)
        store = cls(folder, kind, shards, failed)
        if len(store) != count or sum(len(shard.sizes) for shard in shards) != count:
            raise CorruptFeatures(f"{folder / _MANIFEST} promises {count} videos, the shards hold {len(store)}")
        return store

    @property
    def video_ids(self) -> tuple[str, ...]:
        return tuple(self._places)

    @property
    def fingerprint(self) -> str:
        return self.kind.fingerprint

    @property
    def encoder(self) -> str:
        return self.kind.encoder

    @property
    def random_weights(self) -> bool:
        return self.kind.random_weights

    @property
    def num_frames(self) -> int:
        return self.kind.num_frames

    @property
    def width(self) -> int:
        return self.kind.width

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, video_id: object) -> bool:
        return video_id in self._places

    def __getitem__(self, video_id: str) -> torch.Tensor:
        """A video's features, copied, float32 [N, D]; UnknownVideo, or CorruptFeatures where they are not finite."""
        if video_id not in self._places:
            self.require_videos([video_id])
        number, row = self._places[video_id]
        features = self._shards[number].features[row].clone()
        if not bool(features.isfinite().all()):
            raise CorruptFeatures(f"{self._shards[number].path} has features of {video_id} that are not finite")
        return features

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self.folder,)

    def require_encoder(self, fingerprint: str) -> None:
        """Raises FeatureMismatch unless `fingerprint` (of `ClipTowers`) is that of the encoder of these features."""
        if fingerprint != self.fingerprint:
            raise FeatureMismatch(
                f"{self.folder} holds features of another encoder: {self.encoder} (fingerprint "
                f"{self.fingerprint[:12]}), and {fingerprint[:12]} is wanted"
            )

    def require_videos(self, video_ids: Sequence[str]) -> None:
        """Raises UnknownVideo, naming all of `video_ids` that the store has no features of."""
        unknown = [video_id for video_id in video_ids if video_id not in self]
        if not unknown:
            return
        reasons = [self.failed[video_id].kind for video_id in unknown if video_id in self.failed]
        known = f", {len(reasons)} of them because they could not be decoded ({reasons[0]})" if reasons else ""
        raise UnknownVideo(f"{self.folder} has no features of {_some(unknown)}{known}")

    def verify(self) -> None:
        """Reads every byte: CorruptFeatures where a shard is not the file that the manifest was written for."""
        manifest = json.loads((self.folder / _MANIFEST).read_bytes())
        for entry in manifest["shards"]:
            if _sha256(self.folder / entry["file"]) != entry["sha256"]:
                raise CorruptFeatures(f"{self.folder / entry['file']} is damaged: its checksum is another")


def _read_manifest(folder: Path) -> tuple[FeatureKind, list[str], Quarantine, int]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        begun = _shard_paths(folder)
        if not begun:
            raise CorruptFeatures(f"{folder} is not a feature store: it has no {_MANIFEST}") from None
        raise CorruptFeatures(
            f"the extraction into {folder} was not finished: {len(begun)} shards are there; run it again to go on"
        ) from None
    except ValueError as error:
        raise CorruptFeatures(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CorruptFeatures(f"{path} is not that of a feature store")
    if manifest.get("version") != _VERSION:
        raise CorruptFeatures(f"{folder} is of version {manifest.get('version')}, and this package reads {_VERSION}")
    try:
        kind = FeatureKind(**{name: manifest[name] for name in FeatureKind.__dataclass_fields__})
        names = [entry["file"] for entry in manifest["shards"]]
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise FeatureError("a shard's name must be that of a file in the same folder")
        return kind, names, Quarantine.from_json(manifest["failed"]), int(manifest["videos"])
    except (KeyError, TypeError, FeatureError, QuarantineError) as error:
        raise CorruptFeatures(f"{path} is damaged: {error}") from error


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: Sequence[str], most: int = 10) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
