"""The configuration of a training run: presets, files, overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("yaml")

from evc_fast.model import FaceNetConfig
from evc_fast.training.config import ConfigError, RunConfig, load_config

# Each line holds the one above ten times: 11,115 keys in all, so few that this ends where nothing limits them.
MANY = "a0: &a0 1\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 5))


@pytest.mark.parametrize(
    ("preset", "delta", "lambda_cls"), [("EVC-MSVD", 0.1, 0.1), ("EVC-VE", 0.2, 0.5), ("EVC-Combine", 0.1, 0.2)]
)
def test_presets_are_the_papers(preset: str, delta: float, lambda_cls: float) -> None:
    config = load_config(preset)
    assert (config.loss.delta, config.loss.lambda_e, config.loss.lambda_cls) == (delta, 1.0, lambda_cls)
    assert (config.optimiser.lr, config.trainer.batch_size, config.trainer.num_beams) == (7e-4, 32, 5)
    assert (config.trainer.epochs, config.trainer.clip_norm) == (30, 5.0)
    decoder = config.model.decoder
    assert (decoder.name, decoder.lora.rank, decoder.lora.alpha) == ("t5", 16, 32)
    paper = FaceNetConfig()
    assert config.encoder_config(output_dim=2048) == paper


def test_toy_preset_needs_no_checkpoint() -> None:
    config = load_config("toy")
    assert config.model.decoder.name == "transformer"
    assert config.model.decoder.checkpoint is None


def test_defaults_alone_are_a_configuration() -> None:
    assert load_config(None) == RunConfig()


def test_saved_configuration_reads_as_itself(tmp_path: Path) -> None:
    config = load_config(
        "evc-ve", ["data.captions.0.path=a.csv", "data.captions.1={path: b.csv, id_prefix: vid}", "output=run"]
    )
    assert [(file.path, file.id_prefix) for file in config.data.captions] == [("a.csv", ""), ("b.csv", "vid")]
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_a_file_lies_over_its_preset_and_overrides_over_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: evc-ve\nloss:\n  delta: 3e-1\ntrainer: {epochs: 4, patience: null}\n", encoding="utf-8")
    config = load_config(path, ["trainer.epochs=5", "model.decoder={name: lstm}"])
    assert (config.loss.delta, config.loss.lambda_cls) == (0.3, 0.5)
    assert (config.trainer.epochs, config.trainer.patience) == (5, None)
    assert (config.model.decoder.name, config.model.decoder.checkpoint) == ("lstm", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\ntrainer:\n  epochs: 3\n  batch_sise: 4\n",
            "line 4: trainer.batch_sise is not a key of the configuration; the nearest is trainer.batch_size",
        ),
        ("epochs: 3\n", "line 1: epochs is not a key of the configuration; the nearest is trainer.epochs"),
        ("trainer:\n  epochs: many\n", "line 2: trainer.epochs: input should be a valid integer, got 'many'"),
        ("trainer:\n  epochs: 1.5\n", "line 2: trainer.epochs"),
        ("trainer:\n  tensorboard: 1\n", "line 2: trainer.tensorboard"),
        ("loss:\n  delta: -1\n", "line 2: loss.delta: input should be greater than or equal to 0, got -1"),
        ("loss: 3\n", "line 1: loss: must be a section with keys of its own, got 3"),
        ("loss:\n  delta: 1\n  delta: 2\n", "line 3: loss.delta is there already"),
        ("model:\n  encoder:\n    dim: 301\n", "dim must be a multiple of num_heads"),
        ("model:\n  encoder:\n    num_emotions: 3\n", "line 3: model.encoder.num_emotions is not a key"),
        ("model:\n  decoder:\n    options: {num_layer: 3}\n", "has no field num_layer"),
        ("model:\n  decoder:\n    name: t5\n", "checkpoint must be given for the decoder t5"),
        ("data:\n  captions:\n  - {path: a, prefix: b}\n", "line 3: data.captions.0.prefix is not a key"),
        ("data: [\n", "is not YAML: line 2, column 1"),
        ("- 1\n", "must hold sections with keys, it holds a list"),
        ("preset: evc\n", "line 1: preset must be one of"),
        ("1: 2\n", "1 is not a key of the configuration"),
        ("trainer: &all\n  epochs: *all\n", "line 2: trainer.epochs is an alias of what it stands in"),
        ("seed: " + "[" * 2000 + "]" * 2000, "run.yaml is nested too deeply"),
        (MANY, "run.yaml holds more than 10,000 keys, aliases written out"),
        ("seed: 4294967296\n", "line 1: seed: input should be less than 4294967296"),
    ],
)
def test_a_wrong_file_is_told_by_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "line" in message:
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.captions=&a [*a]", "holds an alias, which only a file may"),
        ("seed=" + "[" * 2000 + "]" * 2000, "the override to seed is nested too deeply"),
        ("trainer.batchsize=3", "override 'trainer.batchsize=3': trainer.batchsize is not a key"),
        ("trainer.epochs", "must have the form section.key=value"),
        ("trainer.epochs=[", "is not YAML"),
        ("data.captions.2.path=a", "data.captions holds no 2"),
        ("seed.a=1", "seed holds no a"),
    ],
)
def test_a_wrong_override_is_told(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["seed=1", override])
    assert message in str(caught.value)


def test_a_section_that_an_override_replaces_is_told_as_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("loss:\n  delta: 0.3\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["loss={delta: -1}"])
    assert "override 'loss={delta: -1}': loss.delta: input should be greater" in str(caught.value)
    assert str(path) not in str(caught.value)


def test_latin_1_is_refused_with_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"output: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"is not UTF-8: .* at byte 11"):
        load_config(path)


def test_what_is_neither_file_nor_preset_lists_the_presets() -> None:
    with pytest.raises(FileNotFoundError, match="presets are evc-combine, evc-msvd, evc-ve, toy"):
        load_config("evc-mvsd")
