"""Kill training runs at random steps and resume them; train on two processes with 5 % of the videos corrupt.

Each count is a run of three epochs of five steps, on one process or, every other time, on two, that is killed once or
twice at steps that the seed draws and resumed until it comes to its end. Its losses, validation scores and gradient
norms must then be those of the run that nothing happened to, bit for bit. One run more has 5 % corrupt videos.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evc_fast.testing.training_process import run_in_processes
from evc_fast.training.logs import LOG_NAME, read_log

TITLE = "Training runs that are killed and resumed"
FULL = 20
STEPS, SAVE_EVERY = 15, 2
SECTIONS = {"trainer": {"epochs": 3, "save_every": SAVE_EVERY}}
CORRUPT = {"num_videos": 40, "corrupt": 2, "max_skipped": 0.05}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Every number of a run that does not tell the time."""
    kept = ("step", "epoch", "loss", "caption_loss", "emotion_loss", "gradient_norm", "lr", "tokens", "scores")
    records = [record for record in read_log(folder / LOG_NAME) if record["kind"] in ("step", "validation")]
    return [{name: record[name] for name in kept if name in record} for record in records]


def finish(folder: Path, processes: int, kills: list[int]) -> str:
    """A run that is killed after these steps and resumed each time; what went wrong, or ""."""
    for number, step in enumerate([*kills, None]):
        done = run_in_processes(folder, processes, sections=SECTIONS, resume=number > 0, kill_at=step)
        if step is None and done.returncode != 0:
            return f"it did not come to its end: {done.stderr[-300:]}"
        if step is not None and numbers(folder)[-1]["step"] != step:
            return f"it was to be killed at step {step}, its log ends with {numbers(folder)[-1]}"
    return ""


def corrupt_videos(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Two processes, 5 % corrupt videos: the row, and what went wrong."""
    done = run_in_processes(folder, 2, world=CORRUPT, sections=SECTIONS)
    faults = [] if done.returncode == 0 else [f"5 % corrupt videos: {done.stderr[-300:]}"]
    counts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("process-*.json"))]
    if not faults and (len(counts) != 2 or counts[0] != counts[1]):
        faults.append(f"5 % corrupt videos: the processes count {counts}")
    listed = [f"v{number}: UnreadableVideo" in done.stderr for number in range(CORRUPT["corrupt"])]
    if not faults and (counts[0]["skipped"] != ["v0", "v1"] or not all(listed)):
        faults.append(f"5 % corrupt videos: the list was {counts[0]['skipped']}")
    return row("2 processes, 2 of 40 videos corrupt: finished, counts equal, list printed", 1, 0, not faults), faults


def row(what: str, runs: int, kills: int, right: int) -> dict[str, Any]:
    return {"runs": what, "count": runs, "kills": kills, "as they must be": int(right)}


def run(count: int, seed: int, progress: Callable[[int, int], None]) -> dict:
    """`count` runs that are killed and resumed, and one with corrupt videos."""
    generator = random.Random(seed)
    violations: list[str] = []
    runs, kills, right = {1: 0, 2: 0}, {1: 0, 2: 0}, {1: 0, 2: 0}
    with tempfile.TemporaryDirectory() as name:
        whole: dict[int, list[dict[str, Any]]] = {}
        for number in range(count):
            processes = 1 + number % 2
            if processes not in whole:
                folder = Path(name, f"whole-{processes}")
                fault = finish(folder, processes, [])
                if fault:
                    raise RuntimeError(f"the run that nothing happens to: {fault}")
                whole[processes] = numbers(folder)
            steps = sorted(generator.sample(range(1, STEPS + 1), generator.choice((1, 2))))
            folder = Path(name, f"killed-{number}")
            fault = finish(folder, processes, steps)
            if not fault and numbers(folder) != whole[processes]:
                pairs = zip(numbers(folder), whole[processes], strict=False)
                first = next(((ours, theirs) for ours, theirs in pairs if ours != theirs), "their number")
                fault = f"its numbers differ from the unbroken run's, first in {first}"
            if fault:
                violations.append(f"{processes} processes, killed after steps {steps}: {fault}")
            runs[processes] += 1
            kills[processes] += len(steps)
            right[processes] += not fault
            progress(number + 1, count)
        corrupt, faults = corrupt_videos(Path(name, "corrupt"))
    rows = [
        row(f"{p} process{'es' * (p > 1)}, killed, resumed", runs[p], kills[p], right[p]) for p in (1, 2) if runs[p]
    ]
    said = [
        f"A run: {STEPS} steps in three epochs, a checkpoint every {SAVE_EVERY} steps and after each epoch; SIGKILL "
        "within an epoch or at its end. Losses, gradient norms and validation scores are compared bit for bit."
    ]
    return {"rows": [*rows, corrupt], "violations": [*violations, *faults], "said": said}
