"""`manifest.json`: what an artefact folder holds, from what it was made, where it runs, and how exact it was found."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from evc_fast.export.requirements import ExportError

import evc_fast

NAME = "manifest.json"
FORMAT = "evc_fast.export"
VERSION = 1

_PACKAGES = ("numpy", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt")
# Families of instructions that a compiler may use when it compiles for the machine it runs on (-march=native): the
# rest of what the system lists as features says nothing about instructions in compiled code.
_INSTRUCTIONS = re.compile(
    r"sse\w*|ssse3|avx\w*|amx\w*|fma|f16c|bmi[12]|abm|adx|popcnt|movbe|aes|vaes|pclmulqdq|vpclmulqdq|sha_ni|gfni|sha512"
    r"|asimd\w*|sve\w*|i8mm|bf16|fphp|atomics|sm[34]|crc32|pmull"
)


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


def cpu_isa() -> dict[str, Any]:
    """The machine's architecture, and the instruction-set extensions that compiled code may use on it, sorted."""
    info = Path("/proc/cpuinfo")
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    words = listed.group(1).split() if listed else []
    return {
        "system": sys.platform,
        "machine": platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "extensions": sorted({word for word in words if _INSTRUCTIONS.fullmatch(word)}),
    }


def check_isa(isa: Mapping[str, Any], file: str) -> None:
    """Raises ExportError where this machine lacks instructions that ``file`` was compiled with."""
    here = cpu_isa()
    for key in ("system", "machine"):
        if isa[key] != here[key]:
            raise ExportError(f"{file} was compiled for {isa[key]}, this machine is {here[key]}: export it again here")
    missing = sorted(set(isa["extensions"]) - set(here["extensions"]))
    if missing:
        raise ExportError(
            f"{file} was compiled for a CPU with {', '.join(missing)}, which this machine lacks: export it again here"
        )


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
