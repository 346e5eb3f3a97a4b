"""Training from files alone, as `evc-fast train` does, and what is said of files that do not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from evc_fast.data.captions import CaptionError
from evc_fast.data.check import Quarantine, Quarantined, TooManyBadVideos
from evc_fast.data.emotions import EmotionError
from evc_fast.data.feature_files import FeatureKind, FeatureWriter
from evc_fast.data.repository import EncoderMismatch, RepositoryTooSmall
from evc_fast.model.captioner import FaceNet
from evc_fast.testing.training_world import FINGERPRINT, training_config, training_world
from evc_fast.training.config import ConfigError, RunConfig, load_config
from evc_fast.training.dataset import DataError
from evc_fast.training.logs import LOG_NAME, RunLog, read_log
from evc_fast.training.preparation import read_data
from evc_fast.training.targets import TargetError
from evc_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The world of twelve videos on disk: captions, features, repository, emotion words and their vectors."""
    world = training_world(share=0)
    paths = {
        "captions": tmp_path / "train.csv",
        "features": tmp_path / "features",
        "repository": tmp_path / "repository",
        "emotions": tmp_path / "emotions",
        "word_vectors": tmp_path / "glove.txt",
    }
    rows = [f"{caption.video_id},{caption.text}" for caption in world.train]
    paths["captions"].write_bytes("\r\n".join(["VideoID,EmCaptions", *rows, ""]).encode())
    write_features(paths["features"], FINGERPRINT)
    world.repository.save(paths["repository"])
    world.dictionary.save(paths["emotions"])
    vectors = zip(world.dictionary.words, world.emotion_features.tolist(), strict=True)
    paths["word_vectors"].write_text("\n".join(f"{w} {' '.join(map(str, v))}" for w, v in vectors), encoding="utf-8")
    return paths


def write_features(folder: Path, fingerprint: str) -> None:
    features = training_world(share=0).features
    kind = FeatureKind(fingerprint, "none", True, features.num_frames, features.width)
    with FeatureWriter(folder, kind, resume=False) as writer:
        ids = features.video_ids
        writer.add(dict.fromkeys(ids, 1), torch.stack([features[video_id] for video_id in ids]))
        writer.finish()


def configuration(files: dict[str, Path], *overrides: str) -> RunConfig:
    """As a user gives it: a file, and overrides."""
    path = files["captions"].parent / "run.yaml"
    data = {name: str(place) for name, place in files.items() if name != "captions"}
    tree = training_config(path.parent / "run").model_dump(mode="json")
    tree["data"] = data | {"captions": [{"path": str(files["captions"])}], "validation_share": 0.25}
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return load_config(path, overrides)


def test_files_give_the_run_that_memory_gives(files: dict[str, Path], tmp_path: Path) -> None:
    result = Trainer(configuration(files)).fit()
    Trainer(training_config(tmp_path / "memory"), training_world()).fit()
    read, kept = (
        [record["loss"] for record in read_log(folder / LOG_NAME) if record["kind"] == "step"]
        for folder in (result.folder, tmp_path / "memory")
    )
    assert len(read) == 10
    torch.testing.assert_close(read, kept, rtol=1e-5, atol=0)
    assert load_config(result.folder / "config.yaml") == configuration(files)
    assert FaceNet.from_pretrained(result.best / "model").encoder.config.num_emotions == 4


def test_validation_captions_of_their_own(files: dict[str, Path], tmp_path: Path) -> None:
    lines = files["captions"].read_text(encoding="utf-8").splitlines()
    held_out = tmp_path / "val.csv"
    held_out.write_text("\n".join([lines[0], *lines[-4:]]), encoding="utf-8")
    validation = f"data.validation_captions.0.path={held_out}"
    with pytest.raises(CaptionError, match="v10, v11"):
        read_data(configuration(files, validation))
    files["captions"].write_text("\n".join(lines[:-4]), encoding="utf-8")
    data = read_data(configuration(files, validation))
    assert data.validation.video_ids == ("v10", "v11")
    assert len(data.train.video_ids) == 10


def test_quarantined_videos_are_left_out(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "quarantine.json"
    Quarantine([Quarantined("v2", "v2.mp4", "DecodingTimeout", "10 s")]).write(path)
    data = read_data(configuration(files, f"data.quarantine={path}"))
    assert [entry.video_id for entry in data.skipped] == ["v2"]
    assert "v2" not in {*data.train.video_ids, *data.validation.video_ids}
    with pytest.raises(TooManyBadVideos, match=r"1 of 12 videos cannot be used, 8.3%, and 5.0% are allowed: v2"):
        read_data(configuration(files, f"data.quarantine={path}", "data.max_skipped=0.05"))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.captions=[]", ConfigError, "data.captions must be given"),
        ("data.features=null", ConfigError, "data.features must be given"),
        ("data.repository=null", ConfigError, "data.repository must be given"),
        ("data.word_vectors=null", ConfigError, "data.word_vectors .* or data.clip .* is needed"),
        ("model.encoder.retrieval=false", ConfigError, "data.repository must be left out"),
        ("data.features=nowhere", FileNotFoundError, "nowhere"),
        ("data.word_vector_dim=300", EmotionError, "300"),
        ("model.encoder.num_frames=4", DataError, "the features have 3 frames a video, model.encoder.num_frames is 4"),
        ("model.encoder.num_triplets=30", RepositoryTooSmall, "fewer than k = 30"),
        ("output=null", ConfigError, "output must be given"),
    ],
)
def test_what_does_not_do_is_told(files: dict[str, Path], override: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Trainer(configuration(files, override))


def test_features_and_repository_of_different_towers(files: dict[str, Path]) -> None:
    write_features(files["features"], "f" * 64)
    with pytest.raises(EncoderMismatch, match="was built with the encoder"):
        Trainer(configuration(files))


def test_an_llm_without_a_tokenizer_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    from evc_fast.model.decoders.llm_random import random_llm

    random_llm("tiny-t5").save_pretrained(tmp_path / "llm")
    with pytest.raises(TargetError, match="the decoder has no tokenizer"):
        Trainer(configuration(files, f"model.decoder={{name: t5, checkpoint: {tmp_path / 'llm'}}}"))
    with pytest.raises(ValueError, match='must be of the "opt" family'):
        Trainer(configuration(files, f"model.decoder={{name: opt, checkpoint: {tmp_path / 'llm'}}}"))


def test_a_log_forgets_what_follows_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in range(1, 5):
        log.write({"kind": "step", "step": step})
    log.close()
    path = tmp_path / LOG_NAME
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"kind": "step", "st')  # a kill in the middle of a line
    assert [record["step"] for record in read_log(path)] == [1, 2, 3, 4]
    RunLog(tmp_path, 2, tensorboard=False).close()
    assert [record["step"] for record in read_log(path)] == [1, 2]
    path.write_text("{}\nx\n{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{LOG_NAME}, line 2 is not JSON"):
        read_log(path)
