"""The trainer on a world of twelve videos: the same numbers however a run is cut, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState

from evc_fast.data.captions import CaptionSet
from evc_fast.data.check import Quarantine, Quarantined, TooManyBadVideos
from evc_fast.data.files import lock_folder
from evc_fast.metrics import Scores
from evc_fast.model.captioner import FaceNet
from evc_fast.testing.training_llm import tiny_llm_folder
from evc_fast.testing.training_world import MemoryFeatures, training_config, training_world
from evc_fast.training import trainer as module
from evc_fast.training.checkpoint import CheckpointError
from evc_fast.training.config import ConfigError
from evc_fast.training.dataset import CaptionSampler, DataError
from evc_fast.training.logs import read_log
from evc_fast.training.preparation import RunData, skip_unusable
from evc_fast.training.trainer import RunResult, Trainer, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

NO_DROPOUT = {"model": {"encoder": {"dropout": 0.0}, "decoder": {"name": "lstm", "dropout": 0.0}}}
NUMBERS = ("loss", "caption_loss", "emotion_loss", "gradient_norm", "lr", "tokens", "captions")


@pytest.fixture
def anew() -> Iterator[None]:
    """accelerate takes its precision once a process: forget it."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def world() -> RunData:
    return training_world()


def steps(folder: Path) -> list[list[float]]:
    """The numbers of a run's steps, as its log has them."""
    return [[r[name] for name in NUMBERS] for r in read_log(folder / "log.jsonl") if r["kind"] == "step"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Trainer(training_config(folder), training_world()).checkpoints.load().tensors["model"]


def fit(folder: Path, data: RunData, *, resume: bool = False, **sections: Any) -> RunResult:
    return Trainer(training_config(folder, **sections), data).fit(resume=resume)


def stop_at(step: int):
    """A listener that breaks a run off."""

    def listen(record: dict[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] == step:
            raise KeyboardInterrupt

    return listen


def test_a_run_learns_and_leaves_a_model(tmp_path: Path, world: RunData) -> None:
    result = fit(tmp_path / "run", world, trainer={"epochs": 12})
    log = read_log(result.folder / "log.jsonl")
    assert [log[0]["kind"], log[-1]["kind"]] == ["start", "end"]
    assert (log[0]["captions"], log[0]["videos"], log[0]["validation_videos"]) == (18, 9, 3)
    losses = [record["caption_loss"] for record in log if record["kind"] == "step"]
    assert len(losses) == result.steps == 12 * 5
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    validations = [record for record in log if record["kind"] == "validation"]
    assert len(validations) == 12
    assert result.best_score == max(record["scores"]["CFS"] for record in validations)
    model = FaceNet.from_pretrained(result.best / "model")
    assert not model.random_weights and not model.decoder.random_weights
    assert not model.encoder.random_emotion_features
    assert sorted(path.name for path in (result.best / "emotions").iterdir()) == ["anger.txt", "fear.txt", "joy.txt"]
    assert json.loads((result.best / "scores.json").read_text())["step"] == result.best_step


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path, world: RunData) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(seed * len(name))  # what was drawn before does not matter
        fit(tmp_path / name, world, seed=seed)
    assert steps(tmp_path / "a") == steps(tmp_path / "b")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert steps(tmp_path / "a") != steps(tmp_path / "c")


@pytest.mark.parametrize("broken_at", [2, 3, 7, 10])
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(tmp_path: Path, world: RunData, broken_at: int) -> None:
    sections = {"trainer": {"save_every": 2}}
    fit(tmp_path / "whole", world, **sections)
    config = training_config(tmp_path / "broken", **sections)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, world, listener=stop_at(broken_at)).fit()
    assert (len(Trainer(config, world).checkpoints.complete()) > 0) == (broken_at > 2)  # at 2: begins anew
    torch.rand(broken_at)  # the generator stands elsewhere
    fit(tmp_path / "broken", world, resume=True, **sections)
    assert steps(tmp_path / "broken") == steps(tmp_path / "whole")
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path, world: RunData) -> None:
    fit(tmp_path, world, trainer={"epochs": 1})
    with pytest.raises(FileExistsError, match="has checkpoints of a run"):
        fit(tmp_path, world)


@pytest.mark.parametrize("size", [1, 3])
def test_pieces_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path, world: RunData, size: int) -> None:
    fit(tmp_path / "whole", world, **NO_DROPOUT)
    fit(tmp_path / "pieces", world, trainer={"micro_batch_size": size}, **NO_DROPOUT)
    assert_close(torch.tensor(steps(tmp_path / "pieces")), torch.tensor(steps(tmp_path / "whole")), rtol=2e-4, atol=0)
    gradients = []
    for pieces in ([[0, 1, 2, 3]], [[3], [0, 2], [1]]):
        trainer = Trainer(training_config(tmp_path / "one", **NO_DROPOUT), world)
        for rows in pieces:
            trainer._backward(trainer.batches.batch(rows), trainer.batches.denominators([0, 1, 2, 3]))
        gradients.append({name: parameter.grad for parameter, name in trainer.names.items()})
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["transformer", "t5", "opt"])
def test_recomputed_activations_change_nothing(tmp_path: Path, world: RunData, name: str) -> None:
    decoder: dict[str, Any] = {"name": name}
    if name == "transformer":
        decoder["options"] = {"num_layers": 1, "num_heads": 2}
    else:
        decoder |= {"checkpoint": str(tiny_llm_folder(name, tmp_path / "llm")), "dtype": "float32"}
    fit(tmp_path / "kept", world, model={"decoder": decoder}, trainer={"epochs": 1})
    calls = []
    trainer = Trainer(
        training_config(
            tmp_path / "recomputed", model={"decoder": decoder}, trainer={"epochs": 1, "gradient_checkpointing": True}
        ),
        world,
    )
    trainer.model.encoder.register_forward_pre_hook(lambda *given: calls.append(torch.is_grad_enabled()))
    trainer.fit()
    assert calls.count(True) == 2 * 5  # forward, and again in each backward
    assert steps(tmp_path / "recomputed") == steps(tmp_path / "kept")


@pytest.mark.usefixtures("anew")
def test_bfloat16_comes_near_float32(tmp_path: Path, world: RunData) -> None:
    AcceleratorState._reset_state(True)
    fit(tmp_path / "bf16", world, trainer={"precision": "bf16"}, **NO_DROPOUT)
    AcceleratorState._reset_state(True)
    fit(tmp_path / "fp32", world, **NO_DROPOUT)
    near, exact = (torch.tensor(steps(tmp_path / name))[:, 0] for name in ("bf16", "fp32"))
    assert not torch.equal(near, exact)
    assert_close(near, exact, rtol=0.05, atol=0.05)
    tensors = Trainer(training_config(tmp_path / "fp32", **NO_DROPOUT), world).checkpoints.load().tensors
    assert {tensor.dtype for tensor in tensors["model"].values()} == {torch.float32}


def test_fp16_needs_a_gpu(tmp_path: Path, world: RunData) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Trainer(training_config(tmp_path, trainer={"precision": "fp16"}), world)


@pytest.mark.parametrize("family", ["t5", "opt"])
def test_an_llm_stays_frozen_and_its_adapter_is_saved_apart(tmp_path: Path, family: str) -> None:
    world = training_world(num_videos=9, share=0)  # no validation: the last model is the best
    source = tiny_llm_folder(family, tmp_path / "llm")
    decoder = {"name": family, "checkpoint": str(source), "lora": {"rank": 2, "alpha": 4}, "dtype": "float32"}
    sections = {"model": {"decoder": decoder}, "trainer": {"save_every": 2}}
    trainer = Trainer(training_config(tmp_path / "run", **sections), world)
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert before and all("lora" in name for name in trainer.names.values() if name.startswith("decoder"))
    start = {name: p.detach().clone() for p, name in trainer.names.items()}
    result = trainer.fit()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(not torch.equal(tensor, after[name]) for name, tensor in start.items() if "lora_B" in name)
    saved = trainer.checkpoints.load().tensors["model"]
    assert not set(before) & set(saved)
    files = {path.name for path in (result.best / "model" / "decoder").rglob("*") if path.is_file()}
    assert files - {"README.md"} == {"config.json", "adapter_config.json", "adapter_model.safetensors"}

    model = FaceNet.from_pretrained(result.best / "model")
    trainer.model.eval()
    batch = trainer.batches.batch([0, 5])
    with torch.no_grad():
        read, kept = (each(*batch[:3], batch.target_ids).logits for each in (model, trainer.model))
    assert_close(read, kept)
    read, kept = (each.generate(*batch[:3], num_beams=2, max_new_tokens=8).ids for each in (model, trainer.model))
    assert torch.equal(read, kept)
    config = training_config(tmp_path / "broken", **sections)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, world, listener=stop_at(7)).fit()
    Trainer(config, world).fit(resume=True)
    assert steps(tmp_path / "broken") == steps(tmp_path / "run")


@pytest.mark.parametrize(
    "encoder",
    [
        {"emotion_augmentation": False},
        {"bias_adjustment": False},
        {"self_refine": False, "cross_refine": False},
        {"order": "emotion_first", "router": "video", "merge_identical_triplets": True},
    ],
)
def test_ablations_train(tmp_path: Path, world: RunData, encoder: dict[str, Any]) -> None:
    if not encoder.get("emotion_augmentation", True):
        world = dataclasses.replace(world, emotion_features=None)
    result = fit(tmp_path, world, model={"encoder": encoder}, trainer={"epochs": 1})
    emotion_losses = [row[2] for row in steps(result.folder)]
    assert (max(emotion_losses) == 0) == (world.emotion_features is None)


def test_without_retrieval_and_without_validation(tmp_path: Path) -> None:
    data = training_world(share=0, retrieval=False)
    result = fit(tmp_path, data, model={"encoder": {"retrieval": False}})
    assert (result.best_score, result.best_step, result.steps) == (None, 12, 12)
    assert FaceNet.from_pretrained(result.best / "model").encoder.config.retrieval is False


def test_early_stopping_and_the_best_model(tmp_path: Path, world: RunData, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0, 3.0, 1.0])
    monkeypatch.setattr(module, "evaluate", lambda *given, **options: Scores({"CFS": next(scores)}, {}))
    result = fit(tmp_path, world, trainer={"epochs": 9, "patience": 2})
    assert (result.epochs, result.stopped_early, result.best_score) == (4, True, 3.0)
    assert result.best_step == 4 * 5  # of two equal ones the later
    again = fit(tmp_path, world, resume=True, trainer={"epochs": 9, "patience": 2})
    assert (again.epochs, again.stopped_early, again.steps) == (4, True, 20)


def test_longer_is_no_other_configuration(tmp_path: Path, world: RunData) -> None:
    fit(tmp_path / "long", world, trainer={"epochs": 2})
    fit(tmp_path / "short", world, trainer={"epochs": 1})
    fit(tmp_path / "short", world, resume=True, trainer={"epochs": 2})
    assert steps(tmp_path / "short") == steps(tmp_path / "long")


def test_another_configuration_or_other_data_do_not_resume(tmp_path: Path, world: RunData) -> None:
    fit(tmp_path, world, trainer={"epochs": 1})
    with pytest.raises(CheckpointError, match=r"another configuration: optimiser.lr was 0.003, is 0.1; trainer.batch"):
        fit(tmp_path, world, resume=True, optimiser={"lr": 0.1}, trainer={"batch_size": 3})
    fewer = world.train.subset(world.train.video_ids[:-1])
    with pytest.raises(CheckpointError, match="other data"):
        fit(tmp_path, dataclasses.replace(world, train=fewer), resume=True)


def test_other_features_references_or_word_vectors_do_not_resume(tmp_path: Path, world: RunData) -> None:
    config = training_config(tmp_path, data={"word_vectors": "glove.txt"}, trainer={"epochs": 1})
    Trainer(config, world).fit()
    features = {video_id: world.features[video_id].clone() for video_id in world.features.video_ids}
    features[world.train.video_ids[0]][0, 0] += 1e-3
    assert world.validation is not None and world.emotion_features is not None
    validation = CaptionSet(dataclasses.replace(c, text=f"{c.text} again") for c in world.validation)
    for other in (
        {"features": MemoryFeatures(features)},
        {"validation": validation},
        {"emotion_features": world.emotion_features.flip(0)},
    ):
        with pytest.raises(CheckpointError, match="other data"):
            Trainer(config, dataclasses.replace(world, **other)).fit(resume=True)


def test_a_checkpoint_of_a_gpu_does_not_go_on_without_one(tmp_path: Path, world: RunData) -> None:
    fit(tmp_path, world, trainer={"epochs": 1})
    trainer = Trainer(training_config(tmp_path, trainer={"epochs": 1}), world)
    saved = trainer.checkpoints.load(trainer.checkpoints.newest())
    saved.tensors["rng"]["cuda"] = saved.tensors["rng"]["cpu"]
    with pytest.raises(CheckpointError, match="was saved on cuda and can only go on there, this run is on cpu"):
        trainer._restore(saved)


def test_two_runs_do_not_train_into_one_folder(tmp_path: Path, world: RunData) -> None:
    with lock_folder(tmp_path), pytest.raises(FileExistsError, match="another process is training into"):
        fit(tmp_path, world)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    fit(tmp_path, world, trainer={"epochs": 1})


def test_a_schedule_that_ends_with_the_epochs_keeps_them(tmp_path: Path, world: RunData) -> None:
    cosine = {"schedule": "cosine", "warmup_steps": 0}
    fit(tmp_path, world, optimiser=cosine, trainer={"epochs": 1})
    with pytest.raises(CheckpointError, match=r"trainer.epochs was 1, is 2"):
        fit(tmp_path, world, resume=True, optimiser=cosine, trainer={"epochs": 2})


def test_a_loss_that_is_no_number_stops_with_the_videos(tmp_path: Path) -> None:
    data = training_world(share=0, retrieval=False)
    video_id = data.train.video_ids[0]
    data.features[video_id].fill_(torch.nan)
    with pytest.raises(TrainingError, match=rf"the loss of step \d+ is nan: look at .*\b{video_id}\b"):
        fit(tmp_path, data, model={"encoder": {"retrieval": False}})


def test_a_gradient_that_is_no_number_stops(tmp_path: Path, world: RunData) -> None:
    trainer = Trainer(training_config(tmp_path), world)
    next(iter(trainer.names)).register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"the gradient of step 1 has norm (inf|nan)"):
        trainer.fit()


@pytest.mark.parametrize("clip_norm", [0.01, 0.0])
def test_gradients_are_clipped(tmp_path: Path, world: RunData, clip_norm: float) -> None:
    trainer = Trainer(training_config(tmp_path, trainer={"epochs": 1, "clip_norm": clip_norm}), world)
    norms: list[float] = []

    def note(*_: object) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    trainer.optimiser.register_step_pre_hook(note)
    trainer.fit()
    computed = [r["gradient_norm"] for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "step"]
    assert min(computed) > 0.01 and len(norms) == len(computed)
    assert norms == pytest.approx([clip_norm or norm for norm in computed], rel=1e-3)


def test_learning_rate(tmp_path: Path, world: RunData) -> None:
    fit(tmp_path, world, optimiser={"lr": 0.1, "warmup_steps": 4, "schedule": "cosine"})
    rates = [row[4] for row in steps(tmp_path)]
    assert_close(rates[:5], [0.025, 0.05, 0.075, 0.1, 0.1])
    assert all(late < early for early, late in itertools.pairwise(rates[4:]))
    assert_close(rates[7], 0.05)  # half of the cosine's six steps


def test_tensorboard_has_what_is_shown(tmp_path: Path, world: RunData) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, world, trainer={"tensorboard": True, "log_every": 5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert [step for step, _ in shown] == [5, 10]
    assert_close([value for _, value in shown], [steps(tmp_path)[place][0] for place in (4, 9)])
    assert len(events.Scalars("validation/CFS")) == 2


def test_the_sampler_gives_every_caption_once_an_epoch() -> None:
    sampler = CaptionSampler(10, 4, seed=3)
    first = list(sampler)
    assert [len(rows) for rows in first] == [4, 4, 2]
    assert sorted(row for rows in first for row in rows) == list(range(10))
    assert list(sampler) == []
    sampler.next_epoch()
    start = next(sampler)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = list(sampler)
    assert [start, *rest] != first
    again = CaptionSampler(10, 4, seed=3)
    again.load_state_dict(state)
    assert list(again) == rest
    with pytest.raises(DataError, match="batch_size is 5, its saved state has 4"):
        CaptionSampler(10, 5, seed=3).load_state_dict(state)


def test_own_captions_are_never_retrieved(tmp_path: Path, world: RunData) -> None:
    trainer = Trainer(training_config(tmp_path), world)
    for videos in (trainer.batches._videos, trainer.validation):
        for video_id in videos.video_ids:
            row = videos.video_ids.index(video_id)
            similarity = videos.inputs([row])[2]
            found = world.repository.search(world.features[video_id], 2, video_id)
            assert torch.equal(similarity, found.similarity)
            own = {i for i, other in enumerate(world.repository.video_ids) if other == video_id}
            assert not own & set(found.indices[0].tolist())


def test_unusable_videos_are_skipped_up_to_a_share(world: RunData) -> None:
    features = {video_id: world.features[video_id] for video_id in world.features.video_ids if video_id != "v3"}
    failed = Quarantine([Quarantined("v4", "v4.mp4", "EmptyVideo", "no frames")])
    del features["v4"]
    listed = Quarantine([Quarantined("v5", "v5.mp4", "DecodingTimeout", "10 s"), Quarantined("x", "", "A", "b")])
    captions = training_world(share=0).train
    used, skipped = skip_unusable(captions, MemoryFeatures(features, failed), listed, 0.25)
    assert [(entry.video_id, entry.kind) for entry in skipped] == [
        ("v3", "NoFeatures"),
        ("v4", "EmptyVideo"),
        ("v5", "DecodingTimeout"),
    ]
    assert len(used) == 18 and not {"v3", "v4", "v5"} & set(used.video_ids)
    with pytest.raises(TooManyBadVideos, match=r"3 of 12 videos cannot be used, 25.0%, and 20.0% are allowed"):
        skip_unusable(captions, MemoryFeatures(features, failed), listed, 0.2)


def test_skipped_videos_are_listed(tmp_path: Path, world: RunData, caplog: pytest.LogCaptureFixture) -> None:
    skipped = Quarantine([Quarantined("v99", "v99.mp4", "EmptyVideo", "no frames")])
    result = fit(tmp_path, dataclasses.replace(world, skipped=skipped), trainer={"epochs": 1})
    assert result.skipped == ("v99",)
    assert read_log(tmp_path / "log.jsonl")[0]["skipped"][0]["id"] == "v99"
    assert "v99: EmptyVideo: no frames" in caplog.text
