"""The command line in this process: from videos to scores by four commands, and every other command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("typer", reason="needs the packages of evc-fast[cli]")
pytest.importorskip("accelerate", reason="needs the packages of evc-fast[all]")
pytest.importorskip("av", reason="needs the packages of evc-fast[all]")
pytest.importorskip("pycocoevalcap", reason="needs the packages of evc-fast[all]")
pytest.importorskip("h5py", reason="needs the packages of evc-fast[all]")
pytest.importorskip("spacy", reason="needs the packages of evc-fast[all]")

import h5py
from typer.testing import CliRunner, Result

from evc_fast.captioner import Captioner
from evc_fast.cli import console as consoles
from evc_fast.cli.app import build_app
from evc_fast.cli.console import Console, duration
from evc_fast.data.check import Quarantine
from evc_fast.data.features import FeatureStore
from evc_fast.data.repository import CaptionRepository
from evc_fast.testing.cli_world import TEST_IDS, TRAIN_IDS, write_world
from evc_fast.training.config import load_config
from evc_fast.training.logs import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

APP = build_app()


def evc_fast(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = evc_fast(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.output, "colours where there is no terminal"
    return result


def document(*arguments: object) -> Any:
    """What a command prints with --json: one JSON document and nothing else."""
    return json.loads(done(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, captions, CLIP, and what three commands make of them: features/, repository/, run/; *.json say what."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    clip = ("--clip", folder / "clip")
    commands = {
        "features": ("features", folder / "videos", *clip, "--frames", 4, "-o", folder / "features", "--workers", 1),
        "index": ("index", folder / "captions_train.csv", *clip, "-o", folder / "repository"),
        "train": ("train", folder / "config.yaml", *training(folder), "-o", folder / "run"),
    }
    for name, command in commands.items():
        result = done(*command, "--json")
        (folder / f"{name}.json").write_text(result.stdout)
        (folder / f"{name}.err").write_text(result.stderr)
    return folder


def training(world: Path) -> list[object]:
    """Options of `train` for the world's data."""
    return [
        *("--captions", world / "captions_train.csv", "--features", world / "features"),
        *("--repository", world / "repository", "--clip", world / "clip", "--set", "data.validation_share=0.25"),
    ]


def test_four_commands_go_from_videos_to_scores(world: Path) -> None:
    made = {name: json.loads((world / f"{name}.json").read_text()) for name in ("features", "index", "train")}
    assert (made["features"]["requested"], made["features"]["extracted"], made["features"]["failed"]) == (11, 11, [])
    assert FeatureStore.open(world / "features").video_ids == (*TRAIN_IDS, *TEST_IDS)
    assert (made["index"]["captions"], made["index"]["videos"], made["index"]["search"]) == (16, 8, "flat")
    assert len(CaptionRepository.load(world / "repository")) == 16
    assert (made["train"]["steps"], made["train"]["epochs"], made["train"]["skipped"]) == (4, 2, [])
    assert made["train"]["validation"]["CFS"] == made["train"]["best_cfs"]
    assert "features: 11 of 11 videos, took" in (world / "features.err").read_text()
    said = (world / "train.err").read_text()
    assert said.startswith("training: 12 captions of 6 videos, 2 for validation, ") and "process" not in said
    assert "training: 4 of 4 steps, took" in said and "epoch 2, validation: CFS" in said
    assert load_config(world / "run" / "config.yaml").trainer.epochs == 2
    scores = document("evaluate", world / "run", "--captions", world / "captions_test.csv", "--no-meteor")
    assert scores["videos"] == 3 and list(scores["per_video"]) == list(TEST_IDS)
    assert scores["overall"]["METEOR"] is None and 0 <= scores["overall"]["BLEU-1"] <= 100
    assert json.loads((world / "run" / "scores-captions_test.json").read_text())["overall"] == scores["overall"]


def test_plain_lines(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "scores.json"
    command = ("evaluate", world / "run", "--captions", world / "captions_test.csv", "--no-meteor", "-o", output)
    lines = done(*command).stdout.splitlines()
    assert lines[0] == "in percent" and lines[1].split()[:3] == ["Acc_sw", "Acc_c", "BLEU-1"]
    assert lines[2].startswith("ours, 3 videos") and lines[-1] == f"scores and captions: {output}"
    again = done("features", world / "videos", "--clip", world / "clip", "--frames", 4, "-o", world / "features")
    assert again.stdout.startswith("11 videos: 0 extracted, 11 there before, 0 not usable")
    assert again.stdout.endswith(f"features: {world / 'features'}\n")


def test_two_runs_compared(world: Path, tmp_path: Path) -> None:
    rows = (world / "captions_test.csv").read_text().splitlines()[2::2]
    perfect = dict(row.split(",") for row in rows)
    (tmp_path / "perfect.json").write_text(json.dumps(perfect))
    command = ("evaluate", "--compare", world / "run", tmp_path / "perfect.json", "--no-meteor", "--samples", 50)
    found = document(*command, "--captions", world / "captions_test.csv", "-o", tmp_path / "compared.json")
    assert found["differences"]["BLEU-1"]["second"] == pytest.approx(100)
    assert found["differences"]["BLEU-1"]["difference"] > 0 and found["bootstrap"]["samples"] == 50
    assert json.loads((tmp_path / "compared.json").read_text()) == found
    assert "perfect.json" in done(*command, "--captions", world / "captions_test.csv").stdout.splitlines()[1]


def test_captions_and_what_explains_them(world: Path, tmp_path: Path) -> None:
    videos = [world / "videos" / f"{name}.mp4" for name in TEST_IDS]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(videos[0].read_bytes()[:200])
    page = tmp_path / "page.html"
    command = ("caption", videos[0], broken, *videos[1:], "--model", world / "run", "--num-beams", 2)
    result = evc_fast(*command, "--json", "--report", page, "--batch-size", 2)
    assert result.exit_code == 1, "one video cannot be read"
    found = json.loads(result.stdout)
    assert [Path(entry["source"]).stem for entry in found["captions"]] == list(TEST_IDS)
    assert [entry["source"] for entry in found["failed"]] == [str(broken)]
    assert f"error: {broken}" in result.stderr and "Traceback" not in result.stderr
    assert found["report"] == str(page) and page.read_text(encoding="utf-8").startswith("<!")
    first = found["captions"][0]
    assert len(first["retrieved"]) == 2 and first["caption"]
    lines = done("caption", videos[0], "--model", world / "run", "--num-beams", 2).stdout.splitlines()
    assert lines[:2] == [str(videos[0]), f"  caption: {first['caption']}"]
    assert "  emotions:" in lines and any(line.endswith("#" * 24) for line in lines)
    assert any(line.startswith("  gates: facts ") for line in lines)


def test_a_video_is_not_told_its_own_captions(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    caption = Captioner.caption
    monkeypatch.setattr(
        Captioner, "caption", lambda self, videos, **options: told.append(options) or caption(self, videos, **options)
    )
    videos = [world / "videos" / f"{name}.mp4" for name in TRAIN_IDS[:2]]
    for command in (("caption",), ("report", "-o", tmp_path / "page.html")):
        done(*command, *videos, "--model", world / "run", "--num-beams", 1)
        assert told.pop()["video_ids"] == list(TRAIN_IDS[:2])


def test_the_clip_of_a_model_that_names_none(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "run" / "best", model)
    manifest = json.loads((model / "captioner.json").read_text()) | {"clip": None}
    (model / "captioner.json").write_text(json.dumps(manifest))
    command = ("caption", world / "videos" / f"{TEST_IDS[0]}.mp4", "--model", model, "--num-beams", 1)
    assert evc_fast(*command).exit_code == 1
    assert "caption: " in done(*command, "--clip", world / "clip").stdout


def test_a_caption_drawn_for_a_terminal(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evc_fast.captioner import Captioner
    from evc_fast.cli.caption_view import print_rich

    result = Captioner.from_pretrained(world / "run")(world / "videos" / "held0.mp4")
    monkeypatch.setenv("COLUMNS", "200")
    print_rich(result)
    drawn = capsys.readouterr().out
    wanted = (result.text, "retrieved", "weight", "gates: facts", "decoder", *result.retrieved[0].triplet)
    assert [part for part in wanted if part not in drawn] == []


def test_a_page_alone(world: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = document("report", world / "videos" / "held0.mp4", "--model", world / "run", "-o", page)
    assert found == {"report": str(page), "videos": 1, "failed": []}
    assert "held0" in page.read_text(encoding="utf-8")


def test_videos_of_one_name_in_two_folders(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "held0.mp4"
    shutil.copy(world / "videos" / "held0.mp4", copy)
    found = document("caption", world / "videos" / "held0.mp4", copy, "--model", world / "run", "--num-beams", 1)
    assert [entry["source"] for entry in found["captions"]] == [str(world / "videos" / "held0.mp4"), str(copy)]
    assert found["captions"][0]["caption"] == found["captions"][1]["caption"]


def test_what_is_checked_is_left_out(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = shutil.copytree(world / "videos", tmp_path / "videos")
    (videos / "clip0.mp4").write_bytes(b"nothing")
    listed = tmp_path / "bad.json"
    found = document("data", "check", videos, "--quarantine", listed, "--workers", 1)
    assert (found["videos"], found["usable"], found["kinds"]) == (11, 10, {"UnreadableVideo": 1})
    assert [entry["id"] for entry in found["bad"]] == ["clip0"] and "clip0" in Quarantine.read(listed)
    some = [videos / "clip0.mp4", videos / "clip1.mp4"]
    monkeypatch.chdir(tmp_path)
    too_many = evc_fast("data", "check", *some, "--max-bad", 0.1, "--workers", 1)
    assert too_many.exit_code == 1 and "more than the 10.0% of --max-bad" in too_many.stderr
    assert too_many.stdout.startswith("2 videos: 1 usable, 1 not\nUnreadableVideo: 1\nclip0: ")
    assert too_many.stdout.endswith("quarantine list: quarantine.json\n") and "clip0" in Quarantine.read(
        "quarantine.json"
    )
    run = ("train", world / "config.yaml", *training(world), "--quarantine", listed, "-o", tmp_path / "run")
    stopped = evc_fast(*run)
    assert stopped.exit_code == 1
    assert "1 of 8 videos cannot be used, 12.5%, and 10.0% are allowed: clip0" in stopped.stderr
    went_on = document(*run, "--set", "data.max_skipped=0.2", "--set", "trainer.epochs=1")
    assert went_on["skipped"] == ["clip0"]


def test_other_decoders_and_options_by_set(world: Path, tmp_path: Path) -> None:
    lstm = "model.decoder={name: lstm, options: {hidden_dim: 16}}"
    command = ("train", world / "config.yaml", *training(world), "--set", lstm, "--set", "trainer.epochs=1")
    found = document(*command, "--set", "optimiser.lr=1e-3", "-o", tmp_path / "run")
    assert found["epochs"] == 1
    assert "hidden_dim" in json.loads((tmp_path / "run/best/model/decoder/config.json").read_text())
    assert load_config(tmp_path / "run" / "config.yaml").optimiser.lr == 1e-3


def test_a_run_goes_on(world: Path, tmp_path: Path) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run", symlinks=True)
    refused = evc_fast("train", run, "--set", f"output={run}")
    assert refused.exit_code == 1 and f"{run} has checkpoints of a run" in refused.stderr
    result = done("train", run, "-o", run, "--resume", "--set", "trainer.epochs=3")
    assert "going on at step 4" in result.stderr
    assert result.stdout.startswith("3 epochs, 6 steps\nbest on validation, step ")
    assert result.stdout.endswith(f"model: {run / 'best'}\n")
    assert [record["step"] for record in read_log(run / "log.jsonl") if record["kind"] == "step"] == list(range(1, 7))
    other = evc_fast("train", run, "-o", run, "--resume", "--set", "optimiser.lr=0.1")
    assert other.exit_code == 1 and "optimiser.lr was 0.0007, is 0.1" in other.stderr


def test_the_resolved_configuration(world: Path, tmp_path: Path) -> None:
    command = ("train", "evc-ve", *training(world), "--set", "trainer.epochs=7", "--dry-run")
    resolved = document(*command)
    assert (resolved["trainer"]["epochs"], resolved["loss"]["delta"], resolved["optimiser"]["lr"]) == (7, 0.2, 7e-4)
    assert resolved["data"]["captions"] == [{"path": str(world / "captions_train.csv"), "id_prefix": ""}]
    path = tmp_path / "again.yaml"
    path.write_text(done(*command).stdout)
    assert load_config(path).model_dump(mode="json") == resolved


def test_ids_of_emvidcap(world: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("VideoID\tEmCaptions\n1\ta man runs\nvid2\ta dog sleeps\n")
    (tmp_path / "names.txt").write_text("vid1 clip3\nvid2 clip5\nvid3 elsewhere\n")
    clip = ("--clip", world / "clip", "--frames", 4, "--workers", 1, "-o", tmp_path / "features")
    ids = ("--captions", tmp_path / "captions.csv", "--id-prefix", "vid", "--mapping", tmp_path / "names.txt")
    assert document("features", world / "videos", *clip, *ids)["extracted"] == 2
    store = FeatureStore.open(tmp_path / "features")
    assert store.video_ids == ("vid1", "vid2")
    assert_close(store["vid1"], FeatureStore.open(world / "features")["clip3"], rtol=1e-4, atol=1e-5)


def test_a_prefix_for_each_file(world: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for path in files:
        path.write_text("VideoID,EmCaptions\n1,a man runs\n2,a dog sleeps\n")
    given = [part for path in files for part in ("--captions", path)]
    prefixes = ("--id-prefix", "", "--id-prefix", "vid")
    train = document("train", "toy", *given, *prefixes, "--dry-run")
    assert [file["id_prefix"] for file in train["data"]["captions"]] == ["", "vid"]
    held_out = document("train", "toy", *given[:2], "--validation", files[1], *prefixes, "--dry-run")
    assert held_out["data"]["validation_captions"] == [{"path": str(files[1]), "id_prefix": "vid"}]
    assert document("data", "stats", *files, *prefixes)["videos"] == 4
    assert document("data", "stats", files[0], "--factual", files[1], "--id-prefix", "vid")["videos"] == 2


def test_videos_that_cannot_be_scored_are_left_out_where_it_is_asked(world: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text((world / "captions_test.csv").read_text() + "elsewhere,a dog sleeps\n")
    command = ("evaluate", world / "run", "--captions", captions, "--no-meteor")
    strict = evc_fast(*command)
    assert strict.exit_code == 1
    assert "has no features of 1 of 4 videos: elsewhere; --skip-missing scores the others" in strict.stderr
    result = done(*command, "--skip-missing", "--json")
    found = json.loads(result.stdout)
    assert (found["videos"], found["missing"]) == (3, ["elsewhere"])
    assert "1 video left out, elsewhere first" in result.stderr
    whole = document("evaluate", world / "run", "--captions", world / "captions_test.csv", "--no-meteor")
    assert found["overall"] == whole["overall"] and whole["missing"] == []
    made = {"held1": "a man runs", "elsewhere": "a dog sleeps"}
    (tmp_path / "made.json").write_text(json.dumps(made))
    both = ("evaluate", "--compare", world / "run", tmp_path / "made.json", *command[2:], "--samples", 10)
    found = document(*both, "--skip-missing")
    assert (found["videos"], found["missing"]) == (1, ["elsewhere", "held0", "held2"])
    (tmp_path / "made.json").write_text(json.dumps({"elsewhere": "a dog sleeps"}))
    assert "no video that both runs can be scored on" in evc_fast(*both, "--skip-missing").stderr
    prefixed = evc_fast(*command[:2], *command[2:], "--id-prefix", "vid")
    assert "such as 'vidheld0', of the features 'clip0': look at id_prefix" in prefixed.stderr
    more = dict.fromkeys([*TEST_IDS, "else"], "a dog")
    (tmp_path / "made.json").write_text(json.dumps(more))
    command = ("evaluate", tmp_path / "made.json", "--captions", world / "captions_test.csv", "--no-meteor")
    assert "made.json has captions of 1 videos without references: else; --skip-missing" in evc_fast(*command).stderr
    assert document(*command, "--skip-missing")["videos"] == 3


def test_runs_of_two_dictionaries_are_compared_by_the_one_that_is_named(world: Path, tmp_path: Path) -> None:
    other = shutil.copytree(world / "run" / "best", tmp_path / "other")
    emotions = other / "emotions"
    shutil.rmtree(emotions)
    emotions.mkdir()
    (emotions / "joy.txt").write_text("happy\n")
    options = ("--features", world / "features", "--no-meteor", "--samples", 10)
    command = ("evaluate", "--compare", world / "run", other, "--captions", world / "captions_test.csv", *options)
    refused = evc_fast(*command)
    assert refused.exit_code == 2 and "different emotion dictionaries: name one by --emotions" in refused.stderr
    assert document(*command, "--emotions", emotions)["videos"] == 3


def test_features_that_others_have_extracted(world: Path, tmp_path: Path) -> None:
    made = FeatureStore.open(world / "features")
    with h5py.File(tmp_path / "features.h5", "w") as file:
        for video_id in made.video_ids:
            file[video_id] = made[video_id].repeat_interleave(2, dim=0).numpy()  # eight frames, each of four twice
    command = ("features", "--hdf5", tmp_path / "features.h5", "--clip", world / "clip", "--frames", 4)
    found = document(*command, "-o", tmp_path / "imported")
    assert (found["imported"], found["frames"], found["width"]) == (11, 4, 24)
    store = FeatureStore.open(tmp_path / "imported")
    assert store.fingerprint == made.fingerprint and torch.equal(store["held0"], made["held0"])
    again = (*command, "-o", tmp_path / "imported")
    assert "holds features: name another --output, or replace them by --restart" in evc_fast(*again).stderr
    assert document(*again, "--restart") == found
    with h5py.File(tmp_path / "wide.h5", "w") as file:
        file["vid1"] = torch.zeros(5, 32).numpy()
    refused = evc_fast("features", "--hdf5", tmp_path / "wide.h5", *command[3:], "-o", tmp_path / "wide")
    assert refused.exit_code == 1 and "holds features of width 32, and those of" in refused.stderr
    assert not list(tmp_path.glob("wide/features-*"))
    scores = ("evaluate", world / "run", "--captions", world / "captions_test.csv", "--no-meteor")
    own, imported = (document(*scores, *more) for more in ((), ("--features", tmp_path / "imported")))
    assert own == imported


def test_statistics(world: Path) -> None:
    found = document("data", "stats", world / "captions_train.csv")
    assert (found["captions"], found["videos"]) == (16, 8)
    both = done("data", "stats", world / "captions_train.csv", world / "captions_test.csv").stdout
    assert both.startswith("22 captions of 11 videos\n")


def test_a_toy_world(tmp_path: Path) -> None:
    found = document("data", "toy", tmp_path / "toy", "--limit", 1, "--workers", 1)
    assert found["clips"] == {"train": 1, "val": 1, "test": 1}
    assert len(list((tmp_path / "toy" / "videos").glob("*.mp4"))) == 3
    again = evc_fast("data", "toy", tmp_path / "toy", "--limit", 1)
    assert again.exit_code == 1 and "is not an empty folder" in again.stderr


def test_doctor() -> None:
    found = document("doctor")
    assert {"versions", "devices", "isa", "ops", "extras"} <= set(found)
    assert "implementation" in done("doctor").stdout


def test_times() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 61, 3723)] == ["0 s", "59 s", "1:01 min", "1:02:03"]


def test_progress_as_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(consoles.time, "monotonic", lambda: now[0])
    with Console().stages("videos") as update:
        for done_, seconds in ((10, 0), (11, 4), (20, 20), (30, 1), (40, 20), (40, 1)):
            now[0] += seconds
            update("work", done_, 40, "a note" if done_ == 20 else "")
    assert capsys.readouterr().err.splitlines() == [
        "work: 20 of 40 videos, 48 s left, a note",
        "work: 40 of 40 videos, took 45 s",
    ]


def test_progress_as_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Console().progress("work", "videos") as update:
        update(0, 3)
        update(3, 3, "a note")
    captured = capsys.readouterr()
    assert captured.out == "" and "3/3" in captured.err and "a note" in captured.err


def test_processes_but_the_first_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = Console(as_json=True, quiet=True)
    quiet.show({}, "")
    quiet.say("a remark")
    with quiet.progress("work") as update:
        update(1, 1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "1")
    quiet.fail("there is no file x")
    assert capsys.readouterr().err == "error in process 1: there is no file x\n"
