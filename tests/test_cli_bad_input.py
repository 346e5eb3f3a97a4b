"""The command line and input that does not do: one sentence on standard error, what and where, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="needs the packages of evc-fast[cli]")
pytest.importorskip("accelerate", reason="needs the packages of evc-fast[all]")
pytest.importorskip("av", reason="needs the packages of evc-fast[all]")
pytest.importorskip("h5py", reason="needs the packages of evc-fast[all]")
pytest.importorskip("spacy", reason="needs the packages of evc-fast[all]")

from typer.testing import CliRunner

from evc_fast.cli import data as data_commands
from evc_fast.cli.app import build_app
from evc_fast.data.captions import Caption, CaptionSet
from evc_fast.data.clip import ClipTowers
from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.feature_files import FeatureKind, FeatureWriter
from evc_fast.data.index import build_repository
from evc_fast.testing.cli_world import TRAIN_IDS, SameTriplet, write_clip_folder, write_world

pytestmark = pytest.mark.usefixtures("one_thread")

APP = build_app()
WORDS = EmotionDictionary.default().words
HEADER = "VideoID,EmCaptions\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, CLIP and another CLIP, random features, and a repository of each CLIP."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    write_clip_folder(folder / "clip-2", seed=1)
    captions = CaptionSet([Caption(video_id, "a man runs") for video_id in TRAIN_IDS])
    for suffix in ("", "-2"):
        towers = ClipTowers.from_pretrained(folder / f"clip{suffix}")
        build_repository(captions, towers, SameTriplet()).save(folder / f"repository{suffix}")
        if not suffix:
            kind = FeatureKind(towers.fingerprint, towers.name, False, 4, towers.image_dim)
            with FeatureWriter(folder / "features", kind, resume=False) as writer:
                features = torch.randn(len(TRAIN_IDS), 4, 24, generator=torch.Generator().manual_seed(0))
                writer.add(dict.fromkeys(TRAIN_IDS, 1), features)
                writer.finish()
    return folder


def refused(code: int, *arguments: object) -> str:
    """The one sentence that a command says before it exits with this code."""
    result = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1 and said == lines[-1:], result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    return said[0].removeprefix("error: ")


def train(world: Path, code: int, *arguments: object, **replaced: object) -> str:
    """What `train` says; `replaced` names other files than the world's."""
    files = {name: world / name for name in ("features", "repository", "clip")}
    files |= {"captions": world / "captions_train.csv", "output": world / "run"} | replaced
    given = [part for name, path in files.items() if path is not None for part in (f"--{name}", path)]
    said = refused(code, "train", world / "config.yaml", *given, *arguments)
    assert not (world / "run").exists(), "a run that cannot begin leaves no folder"
    return said


CAPTION_FILES = {
    "columns": ("Video,Text\nclip0,a man\n", "bad.csv, line 1: no column VideoID and no column EmCaptions; expected"),
    "one column": ("VideoID,Text\nclip0,a man\n", "bad.csv, line 1: no column EmCaptions"),
    "empty caption": (f"{HEADER}clip0,a man\nclip1,  \n", "bad.csv, line 3: the caption of 'clip1' is empty"),
    "no ASCII": (f"{HEADER}clip0,ты\n", "bad.csv, line 2: the caption of 'clip0' is empty, or without ASCII letters"),
    "empty id": (f"{HEADER},a man\n", "bad.csv, line 2: the video id is empty"),
    "no captions": (HEADER, "bad.csv holds no captions"),
    "too many fields": (f"{HEADER}clip0,a man, a dog\n", "bad.csv, line 2: "),
    "not UTF-8": (f"{HEADER}clip0,a café\n".encode("latin-1"), "bad.csv, line 2: not UTF-8 (byte 0xe9); save the file"),
    "two images": (
        '{"images": [{"id": 1}, {"id": 1}], "annotations": [{"image_id": 1, "caption": "a man"}]}',
        "bad.csv: images[1]: id '1' comes twice",
    ),
    "unknown image": (
        '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a man"}]}',
        "bad.csv: annotations[0]: unknown image_id '2'",
    ),
}


@pytest.mark.parametrize(("content", "said"), CAPTION_FILES.values(), ids=CAPTION_FILES)
def test_caption_files(world: Path, tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for message in (train(world, 1, captions=path), refused(1, "data", "stats", path)):
        assert f"{tmp_path}/{said}" in message


def test_videos_that_nothing_knows(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(f"{HEADER}clip0,a man\nelsewhere,a dog\n")
    assert train(world, 1, captions=path) == (
        "1 of 2 videos cannot be used, 50.0%, and 10.0% are allowed: elsewhere (NoFeatures); of the features in "
        f"{world / 'features'}, allowed by data.max_skipped"
    )
    said = refused(1, "features", world / "videos", "--clip", world / "clip", "--captions", path, "-o", tmp_path / "f")
    assert said == f"{world / 'videos'} has no video file for 1 of 2 ids: elsewhere"
    assert not (tmp_path / "f").exists()


def test_features_of_no_video(world: Path, tmp_path: Path) -> None:
    (tmp_path / "clip0.mp4").write_bytes(b"nothing")
    made = ("features", tmp_path, "--clip", world / "clip", "--max-bad", 1, "--workers", 1, "-o", tmp_path / "f")
    assert CliRunner().invoke(APP, [str(each) for each in made]).exit_code == 0
    assert "8 of 8 videos cannot be used" in train(world, 1, features=tmp_path / "f")


def test_videos_that_are_there_twice(world: Path, tmp_path: Path) -> None:
    captions = world / "captions_train.csv"
    said = train(world, 1, "--validation", captions)
    assert "training and validation both have captions of clip0, clip1" in said
    assert "both have captions of clip0, clip1" in train(world, 1, "--captions", captions)
    copies = [tmp_path / name / "clip0.mp4" for name in ("one", "two")]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(world / "videos" / "clip0.mp4", copy)
    command = ("features", tmp_path, "--clip", world / "clip", "-o", tmp_path / "f")
    assert f"{copies[0]} and {copies[1]} would both be video 'clip0'" in refused(2, *command)
    (tmp_path / "names.txt").write_text("vid1 clip0\nvid1 clip1\n")
    assert "names.txt, line 2: 'vid1' comes twice" in refused(1, *command, "--mapping", tmp_path / "names.txt")


def write_vectors(path: Path, words: tuple[str, ...], width: Callable[[int], int]) -> Path:
    rows = [f"{word} {' '.join(['0.5'] * width(number))}" for number, word in enumerate(words)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_word_vectors(world: Path, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "glove.txt", WORDS, lambda number: 50)
    given = ("--set", f"data.word_vectors={path}")
    said = train(world, 1, *given, "--set", "data.word_vector_dim=300")
    assert said == f"{path}, line 1: the vectors are 50 wide, expected 300"
    write_vectors(path, WORDS, lambda number: 50 + (number == 5))
    assert train(world, 1, *given) == f"{path}, line 6: the vector of {WORDS[5]!r} is 51 wide, expected 50"
    write_vectors(path, WORDS[3:], lambda number: 50)
    assert train(world, 1, *given) == f"{path} has no vector for 3 of 179 words: {', '.join(WORDS[:3])}"
    assert "data.word_vectors (a GloVe file) or data.clip" in train(world, 2, clip=None)


def test_another_encoder(world: Path, tmp_path: Path) -> None:
    said = train(world, 1, repository=world / "repository-2")
    assert said.startswith(f"the repository in {world / 'repository-2'} was built with the encoder ")
    said = train(world, 1, clip=world / "clip-2")
    assert said == (
        f"data.clip names other towers ({world / 'clip-2'}) than those that made the features in "
        f"{world / 'features'} ({world / 'clip'})"
    )
    other = ("--clip", world / "clip-2", "--frames", 4, "-o", world / "features")
    said = refused(1, "features", world / "videos", *other)
    assert said.startswith(f"{world / 'features'} holds features of another encoder: ")


def test_what_is_not_there(world: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert train(world, 1, captions=nowhere) == f"there is no file {nowhere}"
    assert train(world, 1, features=nowhere) == f"there is no feature folder {nowhere}"
    assert train(world, 1, repository=nowhere) == f"there is no repository folder {nowhere}"
    assert "data.repository must be given" in train(world, 2, repository=None)
    assert "presets are evc-combine, evc-msvd, evc-ve, toy" in refused(1, "train", "nothing", "-o", nowhere)
    clip = ("--clip", world / "clip", "-o", tmp_path / "f")
    assert refused(1, "features", nowhere, *clip) == f"there is no file or folder {nowhere}"
    assert refused(1, "data", "check", nowhere) == f"there is no file or folder {nowhere}"
    assert refused(1, "caption", nowhere, "--model", world / "run") == f"there is no file or folder {nowhere}"
    video = world / "videos" / "clip0.mp4"
    assert f"there is no model folder {nowhere}" in refused(1, "caption", video, "--model", nowhere)
    assert "is no model folder: it has no captioner.json" in refused(1, "caption", video, "--model", world / "clip")
    assert refused(1, "features", "--hdf5", nowhere, *clip) == f"there is no HDF5 file {nowhere}"
    test = ("--captions", world / "captions_test.csv")
    assert f"there is no model folder {nowhere}" in refused(1, "evaluate", nowhere, *test)
    (tmp_path / "made.json").write_text(json.dumps({"held0": "a man runs"}))
    said = refused(1, "evaluate", tmp_path / "made.json", *test, "--no-meteor")
    assert "held1" in said and "held2" in said, "no captions of two of three videos"


def test_configuration_files(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text, said in {
        "preset: toy\ntrainer:\n  epcohs: 3\n": "line 3: trainer.epcohs is not a key of the configuration; the nearest "
        "is trainer.epochs",
        "optimizer: {lr: 1}\n": "line 1: optimizer is not a key of the configuration; the nearest is optimiser",
        "trainer:\n  epochs: three\n": "line 2: trainer.epochs: input should be a valid integer, got 'three'",
        "trainer: [\n": "is not YAML: line 2, column 1: ",
        "trainer: {epochs: 2}\ntrainer: {epochs: 3}\n": "line 2: trainer is there already",
    }.items():
        path.write_text(text)
        assert said in refused(2, "train", path, "-o", tmp_path / "run")
    for override, said in {
        "trainer.epoch=3": "'trainer.epoch=3': trainer.epoch is not a key of the configuration; the nearest is "
        "trainer.epochs",
        "optimizer.lr=1": "'optimizer.lr=1': optimizer is not a key of the configuration; the nearest is optimiser",
        "trainer.epochs": "the override 'trainer.epochs' must have the form section.key=value",
        "trainer.epochs=0": "trainer.epochs: input should be greater than or equal to 1, got 0",
        "model.decoder={name: t5}": "checkpoint must be given for the decoder t5",
    }.items():
        assert said in refused(2, "train", "toy", "--set", override, "-o", tmp_path / "run")
    assert refused(2, "train", "toy") == "name the folder of the run by --output"
    assert not (tmp_path / "run").exists()


def test_wrong_usage(world: Path, tmp_path: Path) -> None:
    clip = ("--clip", world / "clip", "-o", tmp_path / "f")
    assert refused(2, "features", *clip) == "name the videos, or a file by --hdf5, and not both"
    train = world / "captions_train.csv"
    other = refused(2, "index", train, "--clip", world / "clip", "-o", world / "features", "--overwrite")
    assert other.endswith("features holds something else than a repository: name another folder by --output")
    assert refused(2, "index", train, "--clip", world / "clip", "-o", train) == (
        f"{train} is a file: name a folder by --output"
    )
    unused = refused(2, "features", "--hdf5", "x.h5", "--mapping", "names.txt", "--skip-missing", *clip)
    assert unused == "--mapping and --skip-missing say how videos are read: --hdf5 takes all features of its file"
    assert refused(2, "features", world / "clip", *clip) == f"there are no videos in {world / 'clip'}"
    assert "--device must be auto, cpu, or cuda, not 'gpu7'" in refused(
        2, "features", world / "videos", *clip, "--device", "gpu7"
    )
    used = ("index", world / "captions_train.csv", "--clip", world / "clip", "-o", world / "repository")
    assert refused(2, *used) == (
        f"{world / 'repository'} is in use: name another folder by --output, or give --overwrite"
    )
    assert refused(2, "evaluate", world / "run") == "name the captions to compare with by --captions"
    test = ("--captions", world / "captions_test.csv")
    assert refused(2, "evaluate", "a", "b", *test) == "name one run, or two with --compare"
    assert refused(2, "evaluate", "a", "--compare", *test) == "name two runs with --compare"
    for wrong in (("trian",), ("train",), ("train", "toy", "--epochs", "3"), ("caption", "x", "--num-beams", "0")):
        result = CliRunner().invoke(APP, wrong)
        assert result.exit_code == 2 and "Usage: evc-fast" in result.stderr and result.stdout == ""


def test_outputs_are_looked_at_before_the_work(world: Path, tmp_path: Path) -> None:
    test, file = ("--captions", world / "captions_test.csv"), tmp_path / "file"
    file.write_text("")
    os.mkfifo(tmp_path / "pipe")
    commands = (
        ("evaluate", "nothing is opened", *test, "--output"),
        ("data", "check", world / "videos", "--quarantine"),
        ("caption", world / "videos", "--report"),
        ("report", world / "videos", "--output"),
    )
    for command in commands:
        assert refused(2, *command, tmp_path) == f"{tmp_path} is a folder: name the file to write"
        assert refused(2, *command, tmp_path / "pipe") == f"{tmp_path}/pipe is no regular file: name the file to write"
        assert refused(2, *command, file / "x" / "y") == f"{file} is a file: {file}/x/y cannot be written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


def test_a_list_is_not_written_over_unasked(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quarantine.json").write_text("[1]")
    said = refused(2, "data", "check", world / "videos")
    assert said == "quarantine.json is there already: name the file by --quarantine, which is written over"
    assert (tmp_path / "quarantine.json").read_text() == "[1]"


def test_prefixes(world: Path, tmp_path: Path) -> None:
    two = ("--id-prefix", "a", "--id-prefix", "b")
    assert refused(2, "data", "stats", world / "captions_train.csv", *two) == (
        "give --id-prefix once, or once a file of captions, not 2 for 1"
    )
    assert "--id-prefix goes with --captions" in refused(
        2, "train", "toy", "--id-prefix", "vid", "-o", tmp_path / "run"
    )
    said = train(world, 1, "--id-prefix", "vid")
    assert said.endswith("; ids of the captions are such as 'vidclip0', of the features 'clip0': look at id_prefix")


def test_names_of_files_that_are_not_utf_8(world: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    try:
        shutil.copy(world / "videos" / "clip0.mp4", name)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    wrong = f"the name of {os.fsdecode(name)!a} is not UTF-8: rename it"
    for command in (("data", "check"), ("features", "--clip", world / "clip")):
        assert refused(2, *command, tmp_path, "-o", tmp_path / "out") == wrong
    shutil.copy(world / "videos" / "clip0.mp4", tmp_path)
    result = CliRunner().invoke(APP, ["caption", str(tmp_path), "--num-beams", "1", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and f"error: {wrong}" in result.stderr
    assert [each["source"] for each in found["captions"]] == [str(tmp_path / "clip0.mp4")]
    assert [each["reason"] for each in found["failed"]] == [wrong]
    (tmp_path / "captions.csv").write_text(f"{HEADER}clip0,a man runs\n")
    options = (
        "--captions",
        tmp_path / "captions.csv",
        "--clip",
        world / "clip",
        "-o",
        tmp_path / "out",
        "--workers",
        1,
    )
    result = CliRunner().invoke(APP, [str(each) for each in ("features", tmp_path, *options)])
    assert result.exit_code == 0, "a name that no caption has"


def test_one_video_cannot_be_split(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(f"{HEADER}clip0,a man runs\n")
    assert train(world, 1, captions=path) == (
        "one video cannot be split for validation: data.validation_share=0 trains without"
    )


def test_where_an_error_arose_and_errors_that_nobody_foresaw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "nowhere.csv")
    result = CliRunner().invoke(APP, ["data", "stats", missing, "--traceback"])
    assert result.exit_code == 1 and result.stderr.startswith("Traceback (most recent call last)")
    assert result.stderr.endswith(f"error: there is no file {missing}\n")

    def fail(*arguments: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(data_commands.o, "read_all_captions", fail)
    result = CliRunner().invoke(APP, ["data", "stats", missing])
    assert result.exit_code == 1 and result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: KeyError: nobody foresaw this, so it is a mistake in evc_fast\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'spacy'", name="spacy"), "pip install 'evc-fast[data]'"),
        (ModuleNotFoundError("training needs yaml: pip install 'evc-fast[train]'", name="yaml"), "training needs yaml"),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), "there is no x.csv"),
        (MemoryError(), "take a smaller batch size"),
        (ValueError("two\n lines"), "two lines"),
    ],
)
def test_errors_as_sentences(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(data_commands.o, "read_all_captions", fail)
    assert said in refused(1, "data", "stats", "x.csv")
