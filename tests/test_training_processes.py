"""Runs in processes of their own: two that train together, and one that is killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("accelerate")

from evc_fast.testing.training_process import run_in_processes
from evc_fast.testing.training_world import training_config, training_world
from evc_fast.training.checkpoint import CheckpointError
from evc_fast.training.logs import read_log
from evc_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# 18 captions in batches of 17: unequal shares, and a last batch of one caption, of which a process has none.
UNEVEN: dict[str, Any] = {
    "model": {"encoder": {"dropout": 0.0}, "decoder": {"name": "transformer", "dropout": 0.0}},
    "trainer": {"batch_size": 17, "epochs": 3},
}


def losses(folder: Path) -> list[list[float]]:
    names = ("loss", "caption_loss", "emotion_loss", "gradient_norm", "tokens", "captions")
    return [[r[name] for name in names] for r in read_log(folder / "log.jsonl") if r["kind"] == "step"]


def validations(folder: Path) -> list[dict[str, Any]]:
    return [record["scores"] for record in read_log(folder / "log.jsonl") if record["kind"] == "validation"]


def counts(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes has counted."""
    return [json.loads((folder / f"process-{number}.json").read_text(encoding="utf-8")) for number in range(2)]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    done = run_in_processes(tmp_path / "two", processes=2, sections=UNEVEN)
    assert done.returncode == 0, done.stderr
    first, second = counts(tmp_path / "two")
    assert first == second
    assert (first["steps"], first["processes"], first["captions"]) == (6, 2, 18)
    Trainer(training_config(tmp_path / "one", **UNEVEN), training_world()).fit()
    one, two = (torch.tensor(losses(tmp_path / name), dtype=torch.float64) for name in ("one", "two"))
    assert_close(two, one, rtol=2e-4, atol=1e-6)
    assert one[:, 5].tolist() == [17, 1] * 3
    assert len(validations(tmp_path / "two")) == 3
    with pytest.raises(CheckpointError, match="was saved by 2 processes and can only go on with as many"):
        Trainer(training_config(tmp_path / "two", **UNEVEN), training_world()).fit(resume=True)


@pytest.mark.slow
def test_corrupt_videos_are_left_out_by_both_processes(tmp_path: Path) -> None:
    world = {"num_videos": 40, "corrupt": 2, "max_skipped": 0.05}
    done = run_in_processes(tmp_path, processes=2, world=world, sections={"trainer": {"epochs": 1}})
    assert done.returncode == 0, done.stderr
    first, second = counts(tmp_path)
    assert first == second
    assert first["skipped"] == ["v0", "v1"]
    assert first["captions"] == 2 * round(0.75 * 38)
    assert done.stderr.count("v0: UnreadableVideo: made so") == 1
    assert [entry["id"] for entry in read_log(tmp_path / "log.jsonl")[0]["skipped"]] == ["v0", "v1"]
    refused = run_in_processes(tmp_path / "more", processes=2, world=world | {"corrupt": 3})
    assert refused.returncode != 0
    assert "3 of 40 videos cannot be used, 7.5%, and 5.0% are allowed" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, processes: int) -> None:
    sections = {"trainer": {"save_every": 2, "epochs": 3}}
    whole = run_in_processes(tmp_path / "whole", processes, sections=sections)
    assert whole.returncode == 0, whole.stderr
    killed = run_in_processes(tmp_path / "killed", processes, sections=sections, kill_at=8)
    assert killed.returncode == (-signal.SIGKILL if processes == 1 else 1), killed.stderr
    assert len(losses(tmp_path / "killed")) == 8
    resumed = run_in_processes(tmp_path / "killed", processes, sections=sections, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert validations(tmp_path / "killed") == validations(tmp_path / "whole")
    assert read_log(tmp_path / "killed" / "log.jsonl")[-1]["step"] == 15
