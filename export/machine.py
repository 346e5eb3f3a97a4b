"""The machine that an artefact is compiled for and runs on: its processor's instructions, or its GPU."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evc_fast.export.requirements import ExportError

# Families of instructions that a compiler may use when it compiles for the machine it runs on (-march=native): the
# rest of what the system lists as features says nothing about instructions in compiled code.
_INSTRUCTIONS = re.compile(
    r"sse\w*|ssse3|avx\w*|amx\w*|fma|f16c|bmi[12]|abm|adx|popcnt|movbe|aes|vaes|pclmulqdq|vpclmulqdq|sha_ni|gfni|sha512"
    r"|asimd\w*|sve\w*|i8mm|bf16|fphp|atomics|sm[34]|crc32|pmull"
)


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


def gpu() -> dict[str, str]:
    """Name and compute capability of the current GPU. Raises ExportError where torch finds none."""
    if not torch.cuda.is_available():
        raise ExportError("this needs a GPU, and torch finds none here")
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": card.name, "capability": f"{card.major}.{card.minor}"}


def check_gpu(wanted: Mapping[str, str], file: str) -> None:
    """Raises ExportError where there is no GPU, or one of another kind than ``file`` was built for."""
    here = gpu()
    if here["capability"] != wanted["capability"]:
        raise ExportError(
            f"{file} was built for compute capability {wanted['capability']} ({wanted['name']}), this GPU has "
            f"{here['capability']} ({here['name']}): export it again here"
        )


def cuda_device() -> torch.device:
    """The current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def cuda_stream() -> int:
    """The handle of torch's current stream there."""
    return torch.cuda.current_stream().cuda_stream
