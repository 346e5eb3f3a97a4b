"""Checkpoints: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for a script there

import _soak_saves  # noqa: E402

from evc_fast.training import checkpoint as module  # noqa: E402
from evc_fast.training.checkpoint import (  # noqa: E402
    CheckpointError,
    CheckpointFolder,
    link_folder,
    optimiser_tensors,
    restore_optimiser,
)

KILLS = 8


def tensors(number: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"a": torch.full((3, 2), number), "b": torch.rand(4, 3).T}, "rng": {"cpu": torch.get_rng_state()}}


def test_a_checkpoint_reads_as_it_was_written(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    saved = tensors(1)
    path = folder.save(400, saved, {"epoch": 3, "best": None})
    loaded = folder.load()
    assert (loaded.path, loaded.step, loaded.state) == (path, 400, {"epoch": 3, "best": None})
    assert path.name == "step-00000400"
    assert loaded.tensors.keys() == saved.keys()
    for group, named in saved.items():
        assert_close(loaded.tensors[group], named, rtol=0, atol=0)
    names = {each.name for each in path.iterdir()}
    assert names == {"model.safetensors", "rng.safetensors", "state.json", "COMPLETE.json"}


def test_old_ones_go_and_the_same_step_may_come_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3):
        folder.save(step, tensors(step), {})
    assert [path.name for path in folder.complete()] == ["step-00000002", "step-00000003"]
    for value in (30, 31, 32):
        folder.save(3, tensors(value), {})
        assert int(folder.load().tensors["model"]["a"][0, 0]) == value
    assert [path.name for path in folder.complete()] == ["step-00000003-2", "step-00000003-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003-2", "step-00000003-3"]


@pytest.mark.parametrize("failing", ["save_file", "sync_folder", "write_json"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, tensors(1), {})

    def fail(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, fail)
        with pytest.raises(KeyboardInterrupt):
            folder.save(2, tensors(2), {})
    assert folder.load().step == 1
    folder.save(3, tensors(3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "rng.safetensors", "state.json"])
def test_damage_is_told_by_the_file(tmp_path: Path, name: str) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save(1, tensors(1), {"epoch": 0}) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is missing or is not what was written"):
        folder.load()
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing or is not what was written"):
        folder.load()


def test_what_has_no_marker_is_none(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() is None
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        folder.load()
    first = folder.save(1, tensors(1), {})
    (folder.save(2, tensors(2), {}) / "COMPLETE.json").unlink()
    assert folder.newest() == first


def test_another_version_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save(1, tensors(1), {})
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    (path / "state.json").write_text(json.dumps(state | {"version": 99}), encoding="utf-8")
    marker = json.loads((path / "COMPLETE.json").read_text(encoding="utf-8"))
    marker["state.json"] = module._size_and_digest(path / "state.json")
    (path / "COMPLETE.json").write_text(json.dumps(marker), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is of version 99, and this package reads 1"):
        folder.load()


def test_a_link_leads_to_the_old_folder_or_the_new(tmp_path: Path) -> None:
    link = tmp_path / "best"

    def write(content: str):
        return lambda folder: (folder / "a.txt").write_text(content, encoding="utf-8")

    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    link_folder(link, write("one"), "step-1")
    with pytest.raises(KeyboardInterrupt):
        link_folder(link, fail, "step-2")
    assert (link / "a.txt").read_text(encoding="utf-8") == "one"
    for content in ("two", "three"):
        link_folder(link, write(content), "step-2")
        assert (link / "a.txt").read_text(encoding="utf-8") == content
        assert len(list((tmp_path / ".best").iterdir())) == 1


def test_optimiser_state_goes_there_and_back() -> None:
    def trained() -> tuple[nn.Linear, torch.optim.Adam, dict[nn.Parameter, str]]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), fused=True), {p: n for n, p in layer.named_parameters()}

    def step(layer: nn.Linear, optimiser: torch.optim.Adam) -> None:
        layer(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    layer, optimiser, names = trained()
    step(layer, optimiser)
    saved = {name: tensor.clone() for name, tensor in optimiser_tensors(optimiser, names).items()}
    assert set(saved) == {f"{key}:{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    step(layer, optimiser)
    again, other, other_names = trained()
    again.load_state_dict(weights)
    restore_optimiser(other, other_names, saved)
    step(again, other)
    assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="exp_avg of gain, which is not trained here"):
        restore_optimiser(other, other_names, {"exp_avg:gain": torch.zeros(1)})


def test_kills_while_saving_leave_whole_checkpoints() -> None:
    """A fraction of what benchmarks/soak.py runs in full, 200 kills."""
    seen: list[tuple[int, int]] = []
    found = _soak_saves.run(KILLS, 1, lambda *counted: seen.append(counted))
    assert found["violations"] == []
    assert list(found["rows"][-1].values()) == ["all", KILLS, KILLS]
    assert seen[-1] == (KILLS, KILLS)


def test_the_soak_sees_a_mixture_of_two_saves(tmp_path: Path) -> None:
    _soak_saves.save(tmp_path, 1)
    _soak_saves.save(tmp_path, 2)
    assert _soak_saves.load(tmp_path) == 2
    old, new = sorted((tmp_path / "checkpoints").iterdir())
    (new / "rng.safetensors").write_bytes((old / "rng.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"rng.safetensors is missing or is not what was written"):
        _soak_saves.load(tmp_path)
    (new / "COMPLETE.json").unlink()
    assert CheckpointFolder(tmp_path / "checkpoints").newest() == old
    with pytest.raises(AssertionError, match="the best model is of the saves"):
        _soak_saves.load(tmp_path)
