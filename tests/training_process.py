"""One process of a run that a test starts, by itself or under torchrun: `training_process.py RUN OPTIONS`.

OPTIONS is JSON: "sections" changes the configuration, "world" the data, "resume" resumes; "kill_at" makes the process
kill itself when that step has been written down. Every process writes its counts into RUN/process-N.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from evc_fast.testing.training_world import training_config, training_world
from evc_fast.training.trainer import Trainer


def main(folder: str, options: dict[str, Any]) -> None:
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
