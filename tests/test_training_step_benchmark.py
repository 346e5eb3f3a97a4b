"""benchmarks/training_step.py: a small run as a user makes it, its check, and Amdahl's limit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for a script there

import training_step  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "encoder": {
        "video_dim": 24,
        "text_dim": 24,
        "dim": 16,
        "emotion_dim": 12,
        "num_frames": 4,
        "num_emotions": 7,
        "num_queries": 6,
        "output_dim": 16,
    },
    "decoder": {"num_layers": 1, "ffn_dim": 32},
    "words": 60,
}


def test_a_small_run(tmp_path, capsys):
    argv = ["--batch", "32", "1", "--words", "5", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert training_step.main(argv, SIZES) == 0
    report = json.loads((tmp_path / "training_step.json").read_text())
    large, small = report["records"]
    assert (large["batch"], small["batch"], large["failed"], large["turns"]) == (32, 1, {}, 5)
    for seconds in large["seconds"].values():
        assert set(seconds) == {*training_step.PARTS, "step"}
        assert sum(seconds[part] for part in training_step.PARTS) <= seconds["step"] * 1.01
    page = (tmp_path / "training_step.md").read_text()
    assert page.count("Amdahl's limit") == 2
    assert page.count("Target: a step >= 1.15x") == 1
    for part in training_step.PARTS:
        assert f"| {part} |" in page
    assert "encoder backward" in capsys.readouterr().out


def test_the_cut_step_has_the_gradients_of_the_whole():
    model = training_step.build(0.0, SIZES)
    batches = training_step.make_batches(model, words=5)
    batch, denominators = batches.batch([0, 1, 2]), batches.denominators([0, 1, 2])
    assert denominators == (18, 3)
    contender = training_step.Contender(model, None)
    contender.losses(batch, denominators).total.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    seen: dict[str, torch.Tensor] = {}
    contender.optimiser.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    norm = torch.nn.utils.get_total_norm(whole.values())
    contender.step(batches, [0, 1, 2])
    scale = min(1.0, training_step.CLIP_NORM / float(norm))
    torch.testing.assert_close(seen, {name: scale * gradient for name, gradient in whole.items()})


def test_a_wrong_encoder_is_not_timed(monkeypatch, tmp_path):
    def off(self, batch, denominators):
        losses = true_losses(self, batch, denominators)
        return losses._replace(total=losses.total * (1.001 if self.impl is None else 1.0))

    true_losses = training_step.Contender.losses
    monkeypatch.setattr(training_step.Contender, "losses", off)
    argv = ["--words", "5", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert training_step.main(argv, SIZES) == 1
    record = json.loads((tmp_path / "training_step.json").read_text())["records"][0]
    assert record["failed"].keys() == {training_step.OURS}
    assert record["seconds"].keys() == {training_step.STRAIGHT}
    assert "ours was not timed: loss errs by" in (tmp_path / "training_step.md").read_text()


def test_amdahl():
    seconds = dict.fromkeys(training_step.PARTS, 1.0) | {"encoder forward": 4.0, "encoder backward": 8.0}
    assert training_step.amdahl_limit(seconds) == 18 / 6
