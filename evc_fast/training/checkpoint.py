"""Checkpoints of a run: safetensors and JSON only; a reader finds whole ones, whenever the writer was killed.

    checkpoints/step-00000400/   model.safetensors  optimiser.safetensors  rng.safetensors  state.json  COMPLETE.json

The files are written into a hidden folder and synced, the folder takes its name, and COMPLETE.json, which holds the
size and digest of each file, comes last. What has none is no checkpoint: a reader passes it over, the next save
removes it. Old ones lose COMPLETE.json first, and only after a newer one has it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from evc_fast.data.files import sync_folder, sync_tree, write_json

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "link_folder",
    "optimiser_tensors",
    "restore_optimiser",
    "restore_weights",
    "trained_tensors",
]

_FORMAT = "evc_fast checkpoint"
_VERSION = 1
_MARKER, _STATE = "COMPLETE.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; tensors on the CPU, each in memory of its own."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """A group of named tensors a file: "model", "optimiser", "rng"."""
    state: dict[str, Any]
    """Fit for JSON."""


class CheckpointFolder:
    """The checkpoints of one run. One process at a time may write.

    Args:
        folder: made on the first save.
        keep: complete checkpoints that a save leaves, its own included.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def complete(self) -> list[Path]:
        """The folders of complete checkpoints, oldest first."""
        return [path for _, path in self._named() if (path / _MARKER).is_file()]

    def newest(self) -> Path | None:
        """The folder of the complete checkpoint of the highest step, None where there is none."""
        return next(iter(reversed(self.complete())), None)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove the old ones. The same step may be saved again; the last one counts.

        Args:
            step: optimiser steps done.
            tensors: a group a file, on any device.
            state: fit for JSON.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        again = max((number[1] + 1 for number, _ in self._named() if number[0] == step), default=0)
        final = self.folder / (f"step-{step:08d}" + (f"-{again}" if again else ""))
        partial = self.folder / f".{final.name}.partial"
        partial.mkdir()
        try:
            for group, named in tensors.items():
                save_file(
                    {name: x.detach().contiguous() for name, x in named.items()}, partial / f"{group}.safetensors"
                )
            content = {"format": _FORMAT, "version": _VERSION, "step": step, "groups": sorted(tensors), **state}
            (partial / _STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            marker = {path.name: _size_and_digest(path, sync=True) for path in sorted(partial.iterdir())}
            sync_folder(partial)
            partial.rename(final)
        except BaseException:  # Ctrl-C and a full disk too
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(self.folder)
        write_json(final / _MARKER, marker)
        for path in self.complete()[: -self.keep]:
            _remove(path)
        return final

    def load(self, path: Path | None = None) -> Checkpoint:
        """A checkpoint, every file of it held against its digest.

        Args:
            path: None takes the newest complete one.

        Raises:
            FileNotFoundError: there is no complete checkpoint.
            CheckpointError: a file is not what was written.
        """
        path = self.newest() if path is None else path
        if path is None or not (path / _MARKER).is_file():
            raise FileNotFoundError(f"there is no complete checkpoint in {self.folder if path is None else path}")
        marker = _read_json(path / _MARKER)
        if not isinstance(marker, dict) or _STATE not in marker:
            raise CheckpointError(f"{path / _MARKER} does not list the files of a checkpoint")
        for name, expected in marker.items():
            file = path / name
            if not file.is_file() or _size_and_digest(file) != expected:
                raise CheckpointError(f"{file} is missing or is not what was written: the checkpoint is damaged")
        state = _read_json(path / _STATE)
        if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path / _STATE} is not that of a checkpoint")
        version = state.pop("version", None)
        if version != _VERSION:
            raise CheckpointError(f"{path} is of version {version}, and this package reads {_VERSION}")
        tensors = {group: _read_tensors(path / f"{group}.safetensors") for group in state.pop("groups")}
        return Checkpoint(path, state.pop("step"), tensors, state)

    def _named(self) -> list[tuple[tuple[int, int], Path]]:
        """((step, how often it had been saved), folder), ascending."""
        if not self.folder.is_dir():
            return []
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if path.is_dir())
        return sorted(((int(match[1]), int(match[2] or 0)), path) for match, path in matches if match)

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)
        for _, path in self._named():
            if not (path / _MARKER).is_file():
                shutil.rmtree(path)


def link_folder(link: Path, write: Callable[[Path], None], name: str) -> Path:
    """Make ``link`` lead to a new folder that ``write`` fills: at any moment to the old one or the new one, whole.

    The folders stand beside it in a hidden one; the one that it led to before is removed afterwards.

    Args:
        link: a symbolic link, made if need be.
        write: is given the folder to write into.
        name: of the new folder.
    """
    home = link.parent / f".{link.name}"
    home.mkdir(parents=True, exist_ok=True)
    before = os.readlink(link) if link.is_symlink() else None
    for path in home.iterdir():  # what a save that was broken off has left
        if before is None or path.name != Path(before).name:
            _remove(path)
    folder = home / (name if before is None or Path(before).name != name else f"{name}-again")
    try:
        folder.mkdir()
        write(folder)
    except BaseException:  # Ctrl-C and a full disk too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_tree(folder)
    sync_folder(home)
    fresh = home / ".link"
    fresh.symlink_to(os.path.join(home.name, folder.name))
    os.replace(fresh, link)
    sync_folder(link.parent)
    if before is not None:
        _remove(home / Path(before).name)
    return folder


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, and the encoder's buffers; of an LLM its adapter alone."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = model.encoder.state_dict(prefix="encoder.")
    return named | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def restore_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the model. CheckpointError where names or shapes are not its own."""
    with torch.no_grad():
        for name, (own, saved) in _pairs(trained_tensors(model), tensors, "weights"):
            if own.shape != saved.shape or own.dtype != saved.dtype:
                raise CheckpointError(
                    f"the checkpoint's {name} is {saved.dtype} {list(saved.shape)}, the model's {own.dtype} "
                    f"{list(own.shape)}"
                )
            own.copy_(saved)


def optimiser_tensors(optimiser: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """State of a PyTorch optimiser, "exp_avg:NAME" for each parameter that has one."""
    return {
        f"{key}:{names[parameter]}": value
        for parameter, state in optimiser.state.items()
        for key, value in state.items()
    }


def restore_optimiser(optimiser: Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimiser_tensors`. CheckpointError on a parameter that the optimiser does not have."""
    positions = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    numbers = {names[parameter]: number for number, parameter in enumerate(positions)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(":")
        if name not in numbers:
            raise CheckpointError(f"the checkpoint has {key} of {name}, which is not trained here")
        state.setdefault(numbers[name], {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _pairs(
    own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    if set(own) != set(saved):
        missing, left = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
        raise CheckpointError(
            f"the checkpoint's {what} are of another model: missing {missing or 'none'}, left over {left or 'none'}"
        )
    return ((name, (tensor, saved[name])) for name, tensor in own.items())


def _size_and_digest(path: Path, *, sync: bool = False) -> list[int | str]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _remove(path: Path) -> None:
    """Remove a folder or file, its marker first, so that half of it never passes for a whole one."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    (path / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copies: tensors of the mapped file are loosely aligned, and products run and round differently on those.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error
