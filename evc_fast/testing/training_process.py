"""Runs in processes of their own, for tests: one, or two under torchrun, which may kill themselves.

`python -m evc_fast.testing.training_process FOLDER OPTIONS` is one process of such a run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["run_in_processes"]


def run_in_processes(folder: Path, processes: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    """A run of the training world with its folder in `folder`, and what its processes have printed.

    Every process that comes to the end writes what it counted into `folder`/process-N.json.

    Args:
        folder: of the run.
        processes: more than one are started by torchrun.
        options: "sections" changes the configuration, "world" the data (see `training_world`), "resume" resumes;
            "kill_at" makes the main process kill itself as soon as that step is written down.
    """
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # They find the package where this process does, rather than in the current folder.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, *launcher, "-m", __name__, str(folder), json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def main(folder: str, options: dict[str, Any]) -> None:
    from evc_fast.testing.training_world import training_config, training_world
    from evc_fast.training.trainer import Trainer

    torch.set_num_threads(1)

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == options.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    data = training_world(**options.get("world", {}))
    trainer = Trainer(training_config(folder, **options.get("sections", {})), data, listener=listen)
    result = trainer.fit(resume=options.get("resume", False))
    counts = {
        "steps": result.steps,
        "processes": trainer.accelerator.num_processes,
        "captions": len(trainer.batches),
        "skipped": result.skipped,
        "best_score": result.best_score,
    }
    path = Path(folder, f"process-{trainer.accelerator.process_index}.json")
    path.write_text(json.dumps(counts), encoding="utf-8")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
