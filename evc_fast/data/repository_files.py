"""A caption repository on disk: `manifest.json`, `captions.json`, `features.safetensors`; nothing in it can execute.

A repository that is searched by IVF-PQ has `index.safetensors` too, and is of version 2; others stay of version 1,
which older packages read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evc_fast.data.files import sync_folder
from evc_fast.data.repository_index import IvfPqContent

_FORMAT = "evc_fast caption repository"
_EXACT, _INDEXED = 1, 2  # versions
_MANIFEST, _TEXTS, _FEATURES, _INDEX = "manifest.json", "captions.json", "features.safetensors", "index.safetensors"
_MANIFEST_TYPES = {
    "captions": int,
    "parts": int,
    "width": int,
    "encoder_fingerprint": str,
    "random_weights": bool,
    "captions_sha256": str,
}
_INDEX_TYPES = {"lists": int, "code_bytes": int, "probes": int, "candidates": int}


class RepositoryError(ValueError):
    """Base of the errors that a caption repository raises about its content."""


class CorruptRepository(RepositoryError):
    """A saved repository whose files are missing, damaged, or do not belong together."""


@dataclass(frozen=True)
class StoredRepository:
    """What a repository of n captions and m distinct triplet parts consists of.

    captions, video_ids: n; parts: m words
    part_indices: int32 [n, 3] into parts; part_features: float32 [m, D_t], as the text tower gives them
    text_features: float32 [n, D_t] of the captions, L2-normalised
    triplet_extractor: what made the triplets, None where that is not known
    index: what IVF-PQ learnt of the text features; None where search is flat
    """

    captions: list[str]
    video_ids: list[str | None]
    parts: list[str]
    part_indices: torch.Tensor
    part_features: torch.Tensor
    text_features: torch.Tensor
    encoder_fingerprint: str
    random_weights: bool
    triplet_extractor: str | None = None
    index: IvfPqContent | None = None


def write_repository(folder: str | os.PathLike[str], stored: StoredRepository) -> None:
    """Writes the files aside, then puts them in place, the manifest last: what is interrupted leaves no half of a file.

    The manifest vouches for the others, so that a folder in which only some are new does not load.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"captions": stored.captions, "video_ids": stored.video_ids, "parts": stored.parts}
    texts = json.dumps(content, ensure_ascii=False).encode()
    belongs_to = {"captions_sha256": hashlib.sha256(texts).hexdigest()}  # which captions the tensors are of
    tensors = {
        "text_features": stored.text_features,
        "part_features": stored.part_features,
        "part_indices": stored.part_indices,
    }
    manifest = {
        "format": _FORMAT,
        "version": _EXACT,
        "captions": len(stored.captions),
        "parts": len(stored.parts),
        "width": stored.text_features.shape[1],
        "encoder_fingerprint": stored.encoder_fingerprint,
        "random_weights": stored.random_weights,
        **belongs_to,
    }
    if stored.triplet_extractor is not None:
        manifest["triplet_extractor"] = stored.triplet_extractor
    writers: dict[str, Callable[[Path], object]] = {
        _TEXTS: lambda path: path.write_bytes(texts),
        _FEATURES: lambda path: _save_tensors(path, tensors, belongs_to),
    }
    if stored.index is not None:
        index = stored.index
        learnt = {name: getattr(index, name) for name in ("centroids", "codebooks", "lists", "codes")}
        of_encoder = belongs_to | {"encoder_fingerprint": stored.encoder_fingerprint}
        writers[_INDEX] = lambda path: _save_tensors(path, learnt, of_encoder)
        manifest |= {
            "version": _INDEXED,
            "index": {
                "kind": "ivfpq",
                "lists": len(index.centroids),
                "code_bytes": index.codes.shape[1],
                "probes": index.probes,
                "candidates": index.candidates,
            },
        }
    writers[_MANIFEST] = lambda path: path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    aside = {name: folder / f".{name}.{os.getpid()}.tmp" for name in writers}
    try:
        for name, path in aside.items():
            writers[name](path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        # Not over the old files: a repository that was loaded from them has them mapped into memory.
        (folder / _MANIFEST).unlink(missing_ok=True)
        for name, path in aside.items():
            os.replace(path, folder / name)
    except BaseException:  # Ctrl-C too
        for path in aside.values():
            path.unlink(missing_ok=True)
        raise
    if stored.index is None:
        (folder / _INDEX).unlink(missing_ok=True)
    sync_folder(folder)


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def read_repository(folder: str | os.PathLike[str]) -> StoredRepository:
    """Reads and checks the files; the tensors are mapped into memory, not copied.

    Raises FileNotFoundError where there is no folder, CorruptRepository for a file that is missing, damaged or of
    another repository.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no repository folder {folder}")
    manifest = _read_manifest(folder)
    texts = _read_texts(folder, manifest)
    tensors = _read_features(folder, manifest)
    return StoredRepository(
        **texts,
        **tensors,
        encoder_fingerprint=manifest["encoder_fingerprint"],
        random_weights=manifest["random_weights"],
        triplet_extractor=manifest.get("triplet_extractor"),
        index=_read_index(folder, manifest) if manifest["version"] == _INDEXED else None,
    )


def _read_json(path: Path) -> tuple[Any, bytes]:
    try:
        data = path.read_bytes()
        return json.loads(data), data
    except FileNotFoundError:
        raise CorruptRepository(f"{path.parent} is not a whole repository: {path.name} is missing") from None
    except ValueError as error:
        raise CorruptRepository(f"{path} is damaged: {error}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest, _ = _read_json(folder / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CorruptRepository(f"{folder / _MANIFEST} is not that of a caption repository")
    version = manifest.get("version")
    if version not in (_EXACT, _INDEXED):
        raise CorruptRepository(f"{folder} is of version {version}, and this package reads {_EXACT} and {_INDEXED}")
    _check_types(folder / _MANIFEST, manifest, _MANIFEST_TYPES)
    if version == _INDEXED:
        index = manifest.get("index")
        if not isinstance(index, dict) or index.get("kind") != "ivfpq":
            raise CorruptRepository(f"{folder} is of version {version}, but its {_MANIFEST} names no index of ivfpq")
        _check_types(folder / _MANIFEST, index, _INDEX_TYPES)
        if not all(index[key] > 0 for key in _INDEX_TYPES) or manifest["width"] % index["code_bytes"]:
            raise CorruptRepository(f"{folder / _MANIFEST} describes an index that cannot be: {index}")
    return manifest


def _check_types(path: Path, content: dict[str, Any], types: dict[str, type]) -> None:
    for key, kind in types.items():
        if type(content.get(key)) is not kind:
            raise CorruptRepository(f"{path} has no {key} that is {kind.__name__}")


def _read_texts(folder: Path, manifest: dict[str, Any]) -> dict[str, list[Any]]:
    texts, data = _read_json(folder / _TEXTS)
    if hashlib.sha256(data).hexdigest() != manifest["captions_sha256"]:
        raise CorruptRepository(f"{folder / _TEXTS} is not the file that the manifest was written for")
    return texts


def _read_features(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    captions, parts, width = manifest["captions"], manifest["parts"], manifest["width"]
    expected = {
        "text_features": (torch.float32, [captions, width]),
        "part_features": (torch.float32, [parts, width]),
        "part_indices": (torch.int32, [captions, 3]),
    }
    path = folder / _FEATURES
    tensors = _read_tensors(path, expected, {"captions_sha256": manifest["captions_sha256"]})
    indices, lengths = tensors["part_indices"], tensors["text_features"].norm(dim=1)
    if int(indices.min()) < 0 or int(indices.max()) >= parts:
        raise CorruptRepository(f"{path} has part_indices outside of its {parts} parts")
    # NaN fails the comparison too.
    if not bool(((lengths - 1).abs() < 1e-3).all()) or not bool(torch.isfinite(tensors["part_features"]).all()):
        raise CorruptRepository(f"{path} has features that are not finite, or not of length 1")
    return tensors


def _read_index(folder: Path, manifest: dict[str, Any]) -> IvfPqContent:
    captions, width, index = manifest["captions"], manifest["width"], manifest["index"]
    lists, code_bytes = index["lists"], index["code_bytes"]
    expected = {
        "centroids": (torch.float32, [lists, width]),
        "codebooks": (torch.float32, [code_bytes, 256, width // code_bytes]),
        "lists": (torch.int32, [captions]),
        "codes": (torch.uint8, [captions, code_bytes]),
    }
    path = folder / _INDEX
    of = {key: manifest[key] for key in ("captions_sha256", "encoder_fingerprint")}
    tensors = _read_tensors(path, expected, of)
    if int(tensors["lists"].min()) < 0 or int(tensors["lists"].max()) >= lists:
        raise CorruptRepository(f"{path} has captions outside of its {lists} lists")
    if not all(bool(torch.isfinite(tensors[name]).all()) for name in ("centroids", "codebooks")):
        raise CorruptRepository(f"{path} has centroids or codebooks that are not finite")
    return IvfPqContent(**tensors, probes=index["probes"], candidates=index["candidates"])


def _read_tensors(
    path: Path, expected: dict[str, tuple[torch.dtype, list[int]]], belongs_to: dict[str, str]
) -> dict[str, torch.Tensor]:
    """The expected tensors of a file, mapped; `belongs_to` is what its metadata must say."""
    if not path.is_file():
        raise CorruptRepository(f"{path.parent} is not a whole repository: {path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise CorruptRepository(f"{path} is damaged: {error}") from error
    if any(metadata.get(key) != value for key, value in belongs_to.items()):
        raise CorruptRepository(f"{path} holds the features of other captions")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or list(found.shape) != shape:
            raise CorruptRepository(f"{path} has {name} {found.dtype} {list(found.shape)}, expected {dtype} {shape}")
    return tensors
