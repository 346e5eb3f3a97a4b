"""The command line in processes of its own: what it loads, Ctrl-C, no network, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="needs the packages of evc-fast[cli]")
pytest.importorskip("accelerate", reason="needs the packages of evc-fast[all]")
pytest.importorskip("av", reason="needs the packages of evc-fast[all]")
pytest.importorskip("pycocoevalcap", reason="needs the packages of evc-fast[all]")

from typer.testing import CliRunner

from evc_fast.captioner import Captioner
from evc_fast.cli.app import build_app
from evc_fast.data.captions import read_captions
from evc_fast.data.clip import ClipTowers
from evc_fast.data.features import FeatureStore, extract_features
from evc_fast.data.index import build_repository
from evc_fast.testing.cli_world import TRAIN_IDS, SameTriplet, write_world
from evc_fast.training.checkpoint import CheckpointFolder
from evc_fast.training.logs import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

# Whoever asks for an address or a connection is noted, and refused.
OFFLINE = """
import os, socket, sys
def refuse(*arguments, **options):
    open(os.environ["NETWORK_LOG"], "a").write(f"{arguments}\\n")
    raise OSError("no network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
"""
MAIN = "from evc_fast.cli import main; main()"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, captions, CLIP, features and a repository."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    towers = ClipTowers.from_pretrained(folder / "clip")
    videos = {video_id: folder / "videos" / f"{video_id}.mp4" for video_id in TRAIN_IDS}
    extract_features(videos, towers, folder / "features", num_frames=4, workers=1)
    captions = read_captions(folder / "captions_train.csv")
    build_repository(captions, towers, SameTriplet()).save(folder / "repository")
    return folder


def environment(**variables: object) -> dict[str, str]:
    """Of a process that finds the package where this one does, rather than in the current folder."""
    found = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    found.pop("HF_HUB_OFFLINE", None)
    return found | {name: str(value) for name, value in variables.items()}


def interrupted(folder: Path, ready: Callable[[], bool], *arguments: object) -> str:
    """What a command says that gets Ctrl-C as soon as `ready` holds, and that must not have asked for the network."""
    log = folder / "network.log"
    command = [sys.executable, "-c", OFFLINE + MAIN, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(NETWORK_LOG=log)
    )
    while not ready() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert output == "" and "Traceback" not in errors
    assert not log.exists(), log.read_text()
    return errors


def test_help_loads_neither_torch_nor_transformers() -> None:
    commands = [[], ["caption"], ["features"], ["index"], ["train"], ["evaluate"], ["report"], ["doctor"]]
    commands += [["data"], ["data", "check"], ["data", "stats"], ["data", "toy"]]
    script = (
        "import json, sys\n"
        "from evc_fast.cli.app import build_app\n"
        f"for command in {commands}:\n"
        "    try:\n"
        "        build_app()([*command, '--help'], prog_name='evc-fast')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, command\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'numpy', 'av', 'spacy'} & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == []
    assert lines[0] == "Usage: evc-fast [OPTIONS] COMMAND [ARGS]..." and "\x1b" not in done.stdout
    assert done.stdout.count("Exit codes: 0 done") == 11  # the group `data` has commands, and no codes of its own
    assert sum(line.strip().startswith("evc-fast") for line in lines) >= len(commands) - 2, "examples"


def test_without_typer_the_error_says_what_to_install() -> None:
    script = "import sys\nsys.modules['typer'] = None\n" + MAIN
    done = subprocess.run([sys.executable, "-c", script, "doctor"], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the command line needs typer: pip install 'evc-fast[cli]'\n"


def test_features_stopped_by_ctrl_c_go_on(world: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(160):  # one file under many names
        os.link(world / "videos" / "clip0.mp4", videos / f"v{number:03}.mp4")
    store = tmp_path / "features"
    command = ("features", videos, "--clip", world / "clip", "--frames", 4, "--workers", 1, "-o", store)
    said = interrupted(tmp_path, (store / "features-00000.safetensors").exists, *command)
    assert said.endswith("\nstopped; nothing half-written is left; the same command goes on from there\n")
    assert not [path.name for path in store.iterdir() if "partial" in path.name or path.name.endswith(".tmp")]
    result = CliRunner().invoke(build_app(), [*map(str, command), "--json"])
    found = json.loads(result.stdout)
    assert found["reused"] >= 64 and found["reused"] + found["extracted"] == 160
    features = FeatureStore.open(store)
    first = FeatureStore.open(world / "features")["clip0"]
    assert len(features) == 160
    assert torch.stack([features[video_id] for video_id in features.video_ids]).sub(first).abs().max() < 1e-4


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_log(run / "log.jsonl") if record["kind"] == "step"]


def training(world: Path, run: Path, *settings: str) -> list[str]:
    files = {"captions": world / "captions_train.csv", "clip": world / "clip", "output": run}
    files |= {name: world / name for name in ("features", "repository")}
    settings = ("data.validation_share=0.25", "trainer.patience=null", *settings)
    return [
        *("train", str(world / "config.yaml")),
        *(part for name, path in files.items() for part in (f"--{name}", str(path))),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def test_training_stopped_by_ctrl_c_goes_on(world: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    log = run / "log.jsonl"
    command = training(world, run, "trainer.epochs=1000", "trainer.save_every=1")
    said = interrupted(tmp_path, lambda: log.exists() and len(losses(run)) >= 3, *command)
    assert said.endswith("stopped; nothing half-written is left; --resume goes on from the run's newest checkpoint\n")
    folder = CheckpointFolder(run / "checkpoints")
    assert folder.complete() and sorted((run / "checkpoints").iterdir()) == folder.complete()
    epochs = folder.load().state["sampler"]["epoch"] + 2
    setting = f"trainer.epochs={epochs}"
    result = CliRunner().invoke(build_app(), ["train", str(run), "--resume", "--set", setting, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["epochs"] == epochs
    assert CliRunner().invoke(build_app(), training(world, whole, setting)).exit_code == 0
    assert losses(run) == losses(whole)
    assert Captioner.from_pretrained(run)(world / "videos" / "clip0.mp4").text


@pytest.mark.slow
def test_two_processes_print_one_document(world: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "evc_fast.cli"]
    command = [sys.executable, *launcher, *training(world, tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    assert "2 processes" in done.stderr and done.stderr.count("epoch 1, validation: ") == 1
