"""A caption repository on disk: `manifest.json`, `captions.json`, `features.safetensors`; nothing in it can execute."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_FORMAT = "evc_fast caption repository"
_VERSION = 1
_MANIFEST, _TEXTS, _FEATURES = "manifest.json", "captions.json", "features.safetensors"
_MANIFEST_TYPES = {
    "captions": int,
    "parts": int,
    "width": int,
    "encoder_fingerprint": str,
    "random_weights": bool,
    "captions_sha256": str,
}


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
    """

    captions: list[str]
    video_ids: list[str | None]
    parts: list[str]
    part_indices: torch.Tensor
    part_features: torch.Tensor
    text_features: torch.Tensor
    encoder_fingerprint: str
    random_weights: bool


def write_repository(folder: str | os.PathLike[str], stored: StoredRepository) -> None:
    """Writes the three files; the manifest vouches for the others and comes last, so that half a save does not load."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    content = {"captions": stored.captions, "video_ids": stored.video_ids, "parts": stored.parts}
    texts = json.dumps(content, ensure_ascii=False).encode()
    (folder / _TEXTS).write_bytes(texts)
    tensors = {
        "text_features": stored.text_features,
        "part_features": stored.part_features,
        "part_indices": stored.part_indices,
    }
    # Not over the old file: a repository that was loaded from it has it mapped into memory.
    replacement = folder / f"{_FEATURES}.new"
    digest = hashlib.sha256(texts).hexdigest()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, replacement, metadata={"captions_sha256": digest})  # which captions these features are of
    os.replace(replacement, folder / _FEATURES)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "captions": len(stored.captions),
        "parts": len(stored.parts),
        "width": stored.text_features.shape[1],
        "encoder_fingerprint": stored.encoder_fingerprint,
        "random_weights": stored.random_weights,
        "captions_sha256": digest,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_repository(folder: str | os.PathLike[str]) -> StoredRepository:
    """Reads and checks the three files; the tensors are mapped into memory, not copied.

    Raises FileNotFoundError where there is no folder, CorruptRepository for a file that is missing, damaged or of
    another repository.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no repository folder {folder}")
    manifest = _read_manifest(folder)
    texts = _read_texts(folder, manifest)
    tensors = _read_tensors(folder, manifest)
    return StoredRepository(
        **texts,
        **tensors,
        encoder_fingerprint=manifest["encoder_fingerprint"],
        random_weights=manifest["random_weights"],
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
    if manifest.get("version") != _VERSION:
        raise CorruptRepository(f"{folder} is of version {manifest.get('version')}, and this package reads {_VERSION}")
    for key, kind in _MANIFEST_TYPES.items():
        if type(manifest.get(key)) is not kind:
            raise CorruptRepository(f"{folder / _MANIFEST} has no {key} that is {kind.__name__}")
    return manifest


def _read_texts(folder: Path, manifest: dict[str, Any]) -> dict[str, list[Any]]:
    texts, data = _read_json(folder / _TEXTS)
    if hashlib.sha256(data).hexdigest() != manifest["captions_sha256"]:
        raise CorruptRepository(f"{folder / _TEXTS} is not the file that the manifest was written for")
    return texts


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / _FEATURES
    captions, parts, width = manifest["captions"], manifest["parts"], manifest["width"]
    expected = {
        "text_features": (torch.float32, [captions, width]),
        "part_features": (torch.float32, [parts, width]),
        "part_indices": (torch.int32, [captions, 3]),
    }
    if not path.is_file():
        raise CorruptRepository(f"{folder} is not a whole repository: {_FEATURES} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            belongs = (file.metadata() or {}).get("captions_sha256") == manifest["captions_sha256"]
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise CorruptRepository(f"{path} is damaged: {error}") from error
    if not belongs:
        raise CorruptRepository(f"{path} holds the features of other captions")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or list(found.shape) != shape:
            raise CorruptRepository(f"{path} has {name} {found.dtype} {list(found.shape)}, expected {dtype} {shape}")
    indices, lengths = tensors["part_indices"], tensors["text_features"].norm(dim=1)
    if int(indices.min()) < 0 or int(indices.max()) >= parts:
        raise CorruptRepository(f"{path} has part_indices outside of its {parts} parts")
    # NaN fails the comparison too.
    if not bool(((lengths - 1).abs() < 1e-3).all()) or not bool(torch.isfinite(tensors["part_features"]).all()):
        raise CorruptRepository(f"{path} has features that are not finite, or not of length 1")
    return tensors
