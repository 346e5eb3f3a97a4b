"""What surrounds the encoder's mathematics: configuration, errors by name, emotion features, saving and loading."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, ENCODER_WIDTHS, build_encoder, encoder_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 10.0}, TypeError, "dim must be an integer, got 10.0"),
        ({"num_triplets": True}, TypeError, "num_triplets must be an integer, got True"),
        ({"ffn_dim": -1}, ValueError, "ffn_dim must be at least 1, got -1"),
        ({"dim": 10, "num_heads": 4}, ValueError, "dim must be a multiple of num_heads, got dim=10 and num_heads=4"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\), got nan"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
        ({"router": "token"}, ValueError, "router must be one of .*'frame', 'video'.*, got 'token'"),
        ({"order": "both"}, ValueError, "order must be one of .*'fact_first', 'emotion_first'.*, got 'both'"),
        ({"retrieval": 1}, TypeError, "retrieval must be True or False, got 1"),
        ({"order": "emotion_first", "emotion_augmentation": False}, ValueError, "needs emotion_augmentation=True"),
    ],
)
def test_configuration_errors(change, error, message):
    with pytest.raises(error, match=message):
        FaceNetConfig(**change)


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_configuration_round_trip(options):
    config = FaceNetConfig(**(ENCODER_WIDTHS | options))
    assert FaceNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_configuration_refuses_unknown_fields():
    with pytest.raises(ValueError, match="FaceNetConfig has no field named 'num_head'"):
        FaceNetConfig.from_dict({"num_head": 4})


# --- Errors of the forward pass --------------------------------------------------------------------


@pytest.fixture
def no_computing():
    """Fails where an operation runs before the error is raised."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} ran before the arguments were checked")

    return Refuse


BAD_INPUTS = {
    "video_type": ({"video": [1.0]}, TypeError, r"video must be a tensor \[B, N, 24\], got list"),
    "video_rank": ({"video": torch.zeros(5, 24)}, ValueError, r"video must be \[B, N, 24\], got shape \[5, 24\]"),
    "video_width": ({"video": torch.zeros(2, 5, 25)}, ValueError, r"must be \[B, N, 24\], got shape \[2, 5, 25\]"),
    "no_frames": ({"video": torch.zeros(2, 0, 24)}, ValueError, r"at least one frame, got shape \[2, 0, 24\]"),
    "video_ints": ({"video": torch.zeros(2, 5, 24).int()}, TypeError, "must be a floating tensor, got torch.int32"),
    "video_dtype": (
        {"video": torch.zeros(2, 5, 24).half()},
        TypeError,
        "video must be torch.float32 as the encoder's weights are, got torch.float16",
    ),
    "no_triplets": ({"triplets": None}, TypeError, r"triplets must be a tensor \[2, 3, 3, 20\], got NoneType"),
    "triplets_k": (
        {"triplets": torch.zeros(2, 4, 3, 20)},
        ValueError,
        r"triplets must be \[2, 3, 3, 20\], got shape \[2, 4, 3, 20\]",
    ),
    "triplets_parts": ({"triplets": torch.zeros(2, 3, 2, 20)}, ValueError, r"triplets must be \[2, 3, 3, 20\], got"),
    "triplets_batch": ({"triplets": torch.zeros(1, 3, 3, 20)}, ValueError, r"triplets must be \[2, 3, 3, 20\], got"),
    "triplets_dtype": ({"triplets": torch.zeros(2, 3, 3, 20).double()}, TypeError, "triplets must be torch.float32"),
    "no_similarity": ({"similarity": None}, TypeError, r"similarity must be a tensor \[2, 3\], got NoneType"),
    "similarity_rank": (
        {"similarity": torch.zeros(2, 3, 1)},
        ValueError,
        r"similarity must be \[2, 3\], got shape \[2, 3, 1\]",
    ),
    "similarity_ints": (
        {"similarity": torch.zeros(2, 3).long()},
        TypeError,
        "similarity must be a floating tensor, got torch.int64",
    ),
    "no_groups": ({"groups": None}, TypeError, r"groups must be a tensor \[2, 3\], got NoneType"),
    "groups_shape": ({"groups": torch.zeros(2, 2).long()}, ValueError, r"groups must be \[2, 3\], got shape \[2, 2\]"),
    "groups_dtype": ({"groups": torch.zeros(2, 3)}, TypeError, "groups must be torch.int64, got torch.float32"),
    "device": (
        {"triplets": torch.zeros(2, 3, 3, 20, device="meta")},
        ValueError,
        "triplets must be on cpu as the encoder's weights are, it is on meta",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_named_before_any_computing(change, error, message, no_computing):
    encoder = build_encoder(merge_identical_triplets=True).float()
    names = ("video", "triplets", "similarity", "groups")
    arguments = dict(zip(names, encoder_inputs(encoder.config, dtype=torch.float32), strict=True)) | change
    with no_computing(), pytest.raises(error, match=message):
        encoder(**arguments)


def test_autocast_does_not_bridge_float64():
    encoder = build_encoder().float()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"video must be torch\.float32"):
        encoder(*encoder_inputs(encoder.config))


@pytest.mark.parametrize("name", ["triplets", "similarity", "groups"])
def test_without_retrieval_there_is_nothing_to_pass(name):
    encoder = build_encoder(retrieval=False)
    (video, *_), value = encoder_inputs(encoder.config), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"{name} must be None: this encoder's configuration has retrieval=False"):
        encoder(video, **{name: value})


def test_unknown_implementation():
    encoder = build_encoder()
    with pytest.raises(ValueError, match="impl must be"):
        encoder(*encoder_inputs(encoder.config), impl="fast")


# --- Emotion features ------------------------------------------------------------------------------


def test_random_emotion_features_say_so_and_leave_the_global_generator_alone():
    config = FaceNetConfig(**ENCODER_WIDTHS, num_emotions=7)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = FaceNetEncoder(config)
    after_first = torch.get_rng_state()
    torch.set_rng_state(state)
    given = FaceNetEncoder(config, torch.ones(7, 12))
    assert torch.equal(after_first, torch.get_rng_state())  # drawing E_0 took nothing from the weights' generator
    torch.manual_seed(99)
    assert torch.equal(first.emotion_features, FaceNetEncoder(config).emotion_features)
    assert first.random_emotion_features and not given.random_emotion_features
    assert not first.emotion_features.requires_grad
    assert not build_encoder(emotion_augmentation=False).random_emotion_features


def test_emotion_features_are_copied():
    e_0 = torch.ones(7, 12)
    encoder = FaceNetEncoder(FaceNetConfig(**ENCODER_WIDTHS, num_emotions=7), e_0)
    e_0.zero_()
    assert (encoder.emotion_features == 1).all()


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (torch.zeros(7, 13), {}, ValueError, r"\[num_emotions, emotion_dim\] = \[7, 12\], got shape \[7, 13\]"),
        (torch.zeros(12), {}, ValueError, r"\[num_emotions, emotion_dim\] = \[7, 12\], got shape \[12\]"),
        (torch.zeros(7, 12).long(), {}, TypeError, "must be a floating tensor .* got torch.int64"),
        ([[0.0]], {}, TypeError, "must be a floating tensor .* got list"),
        (torch.ones(7, 12).index_fill(0, torch.tensor([2]), float("nan")), {}, ValueError, r"finite, rows \[2\] hold"),
        (torch.ones(7, 12).index_fill(0, torch.tensor([6]), float("-inf")), {}, ValueError, r"finite, rows \[6\] hold"),
        (torch.zeros(7, 12), {"emotion_augmentation": False}, ValueError, "emotion_features must be None"),
    ],
)
def test_emotion_feature_errors(value, options, error, message):
    with pytest.raises(error, match=message):
        FaceNetEncoder(FaceNetConfig(**ENCODER_WIDTHS, num_emotions=7, **options), value)


# --- Saving and loading ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    list(itertools.product(ENCODER_OPTIONS.values(), (torch.float32, torch.bfloat16, torch.float64))),
)
def test_round_trip_is_bit_exact(tmp_path, options, dtype):
    encoder = build_encoder(**options).to(dtype)
    encoder.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = FaceNetEncoder.from_pretrained(tmp_path / "model")
    assert loaded.config == encoder.config and not loaded.training
    assert loaded.random_emotion_features == encoder.random_emotion_features
    state = loaded.state_dict()
    assert list(state) == list(encoder.state_dict())
    for name, tensor in encoder.state_dict().items():
        assert state[name].dtype == dtype and torch.equal(state[name], tensor), name
    assert all(p.requires_grad for p in loaded.parameters())
    arguments = encoder_inputs(encoder.config, dtype=dtype)
    output = loaded(*arguments)
    assert torch.equal(output.tokens, encoder(*arguments).tokens)


def test_saving_again_replaces_and_keeps_the_random_flag(tmp_path):
    build_encoder().save_pretrained(tmp_path)
    stand_in = FaceNetEncoder(FaceNetConfig(**ENCODER_WIDTHS))
    stand_in.save_pretrained(str(tmp_path))
    loaded = FaceNetEncoder.from_pretrained(str(tmp_path))
    assert loaded.random_emotion_features and loaded.config == stand_in.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    encoder = build_encoder()
    encoder.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def disk_full(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("evc_fast.model.checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        build_encoder(seed=5).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.fixture
def saved(tmp_path):
    build_encoder().float().save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, change) -> None:
    stored = json.loads((folder / "config.json").read_text())
    change(stored)
    (folder / "config.json").write_text(json.dumps(stored))


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_FOLDERS = {
    "no_folder": (shutil.rmtree, FileNotFoundError, "no folder .*expected one with config.json and model.safetensors"),
    "no_config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
    "broken_json": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
    "json_list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold a JSON object, .* list"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), ValueError, "not a complete safetensors file"),
    "other_class": (lambda f: edit_config(f, lambda s: s.update({"class": "A"})), ValueError, "not describe a FaceNet"),
    "no_class": (lambda f: (f / "config.json").write_text("{}"), ValueError, "does not describe a FaceNetEncoder"),
    "unknown_field": (
        lambda f: edit_config(f, lambda s: s["config"].update(layers=2)),
        ValueError,
        "no field named 'layers'",
    ),
    "missing_tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("phi_e.bias")),
        ValueError,
        r"missing tensors \['phi_e.bias'\], unexpected tensors none",
    ),
    "extra_tensor": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        ValueError,
        r"missing tensors none, unexpected tensors \['extra'\]",
    ),
    "wrong_shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"phi_e.bias": torch.zeros(15)})),
        ValueError,
        r"phi_e.bias is \[15\], expected \[16\]",
    ),
    "two_types": (
        lambda f: edit_tensors(f, lambda t: t.update({"phi_e.bias": t["phi_e.bias"].half()})),
        ValueError,
        "tensors of one floating type, it holds torch.float16, torch.float32",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_damaged_checkpoints(saved, damage, error, message):
    damage(saved)
    with pytest.raises(error, match=message):
        FaceNetEncoder.from_pretrained(saved)


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="folder must be a directory"):
        build_encoder().save_pretrained(tmp_path / "model")
