"""`manifest.json`: what an artefact folder holds, from what it was made, where it runs, and how exact it was found."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import evc_fast
from evc_fast.export.requirements import ExportError

NAME = "manifest.json"
FORMAT = "evc_fast.export"
VERSION = 1

_PACKAGES = ("numpy", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Of evc_fast, Python, torch, and of what is installed of the packages that make or run artefacts."""
    found = {"evc_fast": evc_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # what is not installed took no part
    return found


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` into ``folder``."""
    text = json.dumps({"format": FORMAT, "format_version": VERSION, **manifest}, indent=2, allow_nan=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What :func:`write` wrote. Raises ExportError where the folder has no manifest, or one that is not ours."""
    path = folder / NAME
    if not folder.is_dir():
        raise ExportError(f"there is no folder {folder}: expected what `python -m evc_fast.export` writes")
    if not path.is_file():
        raise ExportError(f"{folder} has no {NAME}: expected what `python -m evc_fast.export` writes")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(f"{path} is not a manifest of evc_fast.export")
    if manifest.get("format_version") != VERSION:
        raise ExportError(
            f"{path} has format_version {manifest.get('format_version')!r}, this evc_fast reads {VERSION}"
        )
    entries = manifest.get("artefacts")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise ExportError(f"{path} lists no artefacts")
    return manifest


def check_file(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The path of an artefact. Raises ExportError where it is missing or is not the file that was exported."""
    path = folder / entry["name"]
    if not path.is_file():
        raise ExportError(f"{folder} has no {entry['name']}, which its {NAME} lists")
    if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
        raise ExportError(f"{path} is not the file that was exported: its SHA-256 differs from that in {NAME}")
    return path
