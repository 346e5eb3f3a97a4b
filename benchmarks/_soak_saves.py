"""Kill a process that saves checkpoints and models, at random moments, and load what it leaves behind.

The writer saves one after the other, as a trainer does: a checkpoint of three files, then the best model. Every tensor
and number of one save holds the number of that save, so that a mixture of two would show. It tells through a pipe what
has been saved for good; what is loaded after the kill must be that or newer.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evc_fast.training.checkpoint import CheckpointFolder, link_folder

GROUPS, TENSORS, ELEMENTS = ("model", "optimiser", "rng"), 6, 40_000  # 3 MB a save
LONGEST_WAIT_S = 0.25
"""After the writer's first save: several saves fit in it, so that a kill may fall on any moment of one."""
START_S = 60.0


def content(number: int) -> dict[str, Tensor]:
    """Tensors that all say which save they belong to."""
    return {f"tensor {each}": torch.full((ELEMENTS,), number, dtype=torch.int32) for each in range(TENSORS)}


def save(folder: Path, number: int) -> None:
    """One save as of a trainer."""
    CheckpointFolder(folder / "checkpoints", keep=2).save(
        number, {group: content(number) for group in GROUPS}, {"number": number}
    )

    def write(best: Path) -> None:
        (best / "model").mkdir()
        save_file(content(number), best / "model" / "model.safetensors")
        (best / "scores.json").write_text(json.dumps({"number": number}), encoding="utf-8")

    link_folder(folder / "best", write, f"step-{number:08d}")


def keep_saving(folder: Path, first: int, told: Connection) -> None:
    """The writer: until it is killed."""
    torch.set_num_threads(1)
    number = first
    while True:
        save(folder, number)
        told.send(number)
        number += 1


def numbers_of(tensors: dict[str, Tensor]) -> set[int]:
    """Which saves tensors come from."""
    if len(tensors) != TENSORS:
        raise AssertionError(f"{len(tensors)} tensors where {TENSORS} were saved")
    return {int(number) for tensor in tensors.values() for number in tensor.unique()}


def load(folder: Path) -> int:
    """The newest save in the folder, of which all parts must be. AssertionError where they are not."""
    checkpoint = CheckpointFolder(folder / "checkpoints").load()
    found = set.union(*(numbers_of(tensors) for tensors in checkpoint.tensors.values()))
    if set(checkpoint.tensors) != set(GROUPS) or found != {checkpoint.step} or checkpoint.state["number"] not in found:
        raise AssertionError(f"{checkpoint.path} holds parts of the saves {sorted(found)}")
    best = numbers_of(load_file(folder / "best" / "model" / "model.safetensors"))
    scores = json.loads((folder / "best" / "scores.json").read_text(encoding="utf-8"))
    # The model is saved after the checkpoint: a kill between the two leaves it one save behind.
    if best != {scores["number"]} or not checkpoint.step - 1 <= scores["number"] <= checkpoint.step:
        raise AssertionError(f"the best model is of the saves {sorted(best)}, the checkpoint of {checkpoint.step}")
    return checkpoint.step


def left_by_the_kill(folder: Path) -> str:
    """What the writer was at when it was killed, as its files tell."""
    if list((folder / "checkpoints").glob(".step-*")):
        return "while a checkpoint's files were written"
    named = (folder / "checkpoints").glob("step-*")
    if not all((path / "COMPLETE.json").is_file() for path in named):
        return "between a checkpoint's name and its marker, or while an old one was removed"
    models = len(list((folder / ".best").iterdir()))
    return "while the model was saved" if models != 1 else "between saves"


def run(count: int, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> dict:
    """Kill the writer `count` times at moments that `seed` draws; after each kill load, check, and start it again.

    Returns a record: "kills", "loads" (complete ones), "failures" (sentences), "saves" (all that were begun to the
    end), "moments" (how many kills fell on what), "seconds".
    """
    generator = random.Random(seed)
    # Forked from a process that has imported everything and computed nothing: a writer starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evc_fast.training.checkpoint"])
    failures: list[str] = []
    moments: Counter[str] = Counter()
    start = time.monotonic()
    newest = loads = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kill in range(count):
            ours, theirs = context.Pipe(duplex=False)
            writer = context.Process(target=keep_saving, args=(folder, newest + 1, theirs), daemon=True)
            writer.start()
            theirs.close()
            try:
                if not ours.poll(START_S):
                    raise RuntimeError(f"the writer has saved nothing within {START_S:g} s")
                told = ours.recv()
                time.sleep(generator.uniform(0, LONGEST_WAIT_S))
            finally:
                os.kill(writer.pid, signal.SIGKILL)
                writer.join()
            with contextlib.suppress(EOFError):  # the end of what it told before it was killed
                while ours.poll():
                    told = ours.recv()
            ours.close()
            moments[left_by_the_kill(folder)] += 1
            try:
                newest = load(folder)
                if newest < told:
                    raise AssertionError(f"save {told} was done, {newest} is the newest that is found")
                loads += 1
            except (AssertionError, OSError, ValueError) as error:
                failures.append(f"kill {kill + 1}: {error}")
                newest = max(newest, told) + 1
            if progress is not None:
                progress(kill + 1, count)
    return {
        "kills": count,
        "loads": loads,
        "failures": failures,
        "saves": newest,
        "moments": dict(moments),
        "seconds": time.monotonic() - start,
    }
