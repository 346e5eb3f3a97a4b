"""A model's folder: ``config.json`` and ``model.safetensors``, no pickle; strict in both directions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def write_folder(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into ``folder``, which is made if absent.

    Each file is complete before it takes its name, so an interrupted save leaves no half-written file behind that name.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory to save into, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    staged = {name: folder / f".{name}.{os.getpid()}.partial" for name in (WEIGHTS_NAME, CONFIG_NAME)}
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, staged[WEIGHTS_NAME])
        staged[CONFIG_NAME].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, path in staged.items():
            path.replace(folder / name)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. Raises ValueError, which names the file, where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_folder` wrote: the configuration, and the tensors on the CPU in their stored types.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is there but is not JSON with an object, or not safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: expected what save_pretrained writes")
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_NAME} must hold a JSON object, it holds a {type(config).__name__}")
    try:
        # Copies: in the mapped file tensors are loosely aligned, and products round and run differently on those.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_NAME).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is not a complete safetensors file: {error}") from error
    return config, tensors


def assign_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Give ``module`` (on the meta device) the ``tensors`` as its parameters and buffers, in their own type.

    Raises:
        ValueError: names missing or left over, shapes that differ, or types that are not one and the same floating
            type; all offenders of a kind are listed.
    """
    expected = module.state_dict()
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit its configuration: missing tensors {missing or 'none'}, "
            f"unexpected tensors {unexpected or 'none'}"
        )
    wrong = [
        f"{name} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit its configuration: {'; '.join(wrong)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes.pop().is_floating_point:
        found = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
        raise ValueError(f"{source} must hold tensors of one floating type, it holds {found}")
    module.load_state_dict(tensors, strict=True, assign=True)
