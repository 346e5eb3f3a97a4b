"""Kill a process that saves checkpoints and models, at random moments, and load what it leaves behind.

The writer saves one after the other, as a trainer does: a checkpoint of three files, then the best model. Every tensor
and number of one save holds the number of that save, so that a mixture of two would show. It tells what it has saved;
what is loaded after the kill must be that or newer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evc_fast.training.checkpoint import CheckpointFolder, link_folder

TITLE = "Kills while checkpoints and models are saved"
FULL = 200
GROUPS, TENSORS, ELEMENTS = ("model", "optimiser", "rng"), 6, 40_000  # 3 MB a save
LONGEST_WAIT_S = 0.25
"""After the writer's first save: several saves fit in it, so that a kill may fall on any moment of one."""


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


def keep_saving(folder: Path, first: int) -> None:
    """The writer: until it is killed. Tells each save that is done."""
    for number in itertools.count(first):
        save(folder, number)
        tell(f"saved {number}")


def tell(line: str) -> None:
    """A line to whoever started this process, in one piece."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def serve() -> None:
    """Fork a writer for each line "NUMBER FOLDER" of the input, and wait for its end.

    This process has imported everything and computed nothing, so that a writer starts in milliseconds.
    """
    torch.set_num_threads(1)
    for line in sys.stdin:
        first, _, folder = line.rstrip("\n").partition(" ")
        pid = os.fork()
        if pid == 0:
            keep_saving(Path(folder), int(first))
        tell(f"started {pid}")
        os.waitpid(pid, 0)
        tell("ended")


@contextlib.contextmanager
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that runs `serve`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def heard(process: subprocess.Popen[str]) -> list[str]:
    """The next line, in words. RuntimeError where there is none."""
    line = process.stdout.readline().split()
    if not line:
        raise RuntimeError("the process that starts the writers has ended: see what it printed")
    return line


def save_and_kill(process: subprocess.Popen[str], folder: Path, first: int, wait_s: float) -> int:
    """Start a writer, kill it `wait_s` seconds after its first save, and return the last save that it told."""
    process.stdin.write(f"{first} {folder}\n")
    process.stdin.flush()
    words = [heard(process), heard(process)]  # the two may come in either order
    if ["ended"] in words:
        raise RuntimeError("a writer has ended by itself: see what it printed")
    told = {word: int(number) for word, number in words}
    time.sleep(wait_s)
    os.kill(told["started"], signal.SIGKILL)
    while (line := heard(process)) != ["ended"]:
        told["saved"] = int(line[1])
    return told["saved"]


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


def run(count: int, seed: int, progress: Callable[[int, int], None]) -> dict:
    """Kill the writer `count` times at moments that `seed` draws; after each kill load, check, and start it again."""
    generator = random.Random(seed)
    violations: list[str] = []
    kills: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    newest = 0
    with tempfile.TemporaryDirectory() as name, server() as writers:
        folder = Path(name)
        for kill in range(count):
            told = save_and_kill(writers, folder, newest + 1, generator.uniform(0, LONGEST_WAIT_S))
            moment = left_by_the_kill(folder)
            kills[moment] += 1
            try:
                newest = load(folder)
                if newest < told:
                    raise AssertionError(f"save {told} was done, {newest} is the newest that is found")
                loads[moment] += 1
            except (AssertionError, OSError, ValueError) as error:
                violations.append(f"kill {kill + 1}, {moment}: {error}")
                newest = max(newest, told) + 1
            progress(kill + 1, count)
    rows = [
        {"the kill fell": m, "kills": kills[m], "whole checkpoint and model found": loads[m]} for m in sorted(kills)
    ]
    rows.append({"the kill fell": "all", "kills": count, "whole checkpoint and model found": loads.total()})
    said = [f"{newest} saves of {len(GROUPS)} files with {TENSORS} tensors each, and of a model, were finished."]
    return {"rows": rows, "violations": violations, "said": said}


if __name__ == "__main__":
    serve()
