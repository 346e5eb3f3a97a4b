"""The CLIP towers: preprocessing against an independent computation, features against transformers' own calls."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evc_fast.data import preprocessing
from evc_fast.data.clip import ClipTowers, _mean_over_time
from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from evc_fast.data.torchvision_ops import make_torchvision_importable

make_torchvision_importable()
from transformers import BertConfig, CLIPConfig, CLIPModel, CLIPTokenizerFast  # noqa: E402

# One level of 255 behind the division by std. The 8-bit kernel rounds after each direction, and so do PIL and the
# computation here: a pixel differs by one level where a sum lies between two, rarely by two, where both directions do.
ONE_LEVEL = 1 / 255 / min(CLIP_STD) + 1e-4


def assert_same_levels(got: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (got.double() - expected.double()).abs()
    assert difference.max() <= 2 * ONE_LEVEL
    assert (difference > ONE_LEVEL).double().mean() <= 1e-4
    assert difference.mean() <= ONE_LEVEL / 20


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth content with noise on it, as video has it: uint8 [*shape, 3]."""
    generator = torch.Generator().manual_seed(seed)
    *leading, height, width = shape
    coarse = torch.rand(int(np.prod(leading)), 3, 6, 9, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False) * 255
    noisy = smooth + 12 * torch.randn(smooth.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(*leading, height, width, 3)


def bicubic(samples: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic (a = -1/2) along the last axis, in float64, rounded to levels."""
    length = samples.shape[-1]
    scale = max(length / size, 1.0)
    weights = np.zeros((size, length))
    for target in range(size):
        centre = (target + 0.5) * length / size
        x = np.abs((np.arange(length) + 0.5 - centre) / scale)
        kernel = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        # The window is cut to whole pixels around the centre before the weights are normalised.
        low, high = max(0, int(centre - 2 * scale + 0.5)), min(length, int(centre + 2 * scale + 0.5))
        kernel[:low], kernel[high:] = 0, 0
        weights[target] = kernel / kernel.sum()
    return np.clip(np.rint(samples @ weights.T), 0, 255)


def independent_preprocess(frame: torch.Tensor, size: int) -> np.ndarray:
    height, width = frame.shape[:2]
    new_height = size if height <= width else int(size * height / width)
    new_width = size if width <= height else int(size * width / height)
    pixels = frame.numpy().astype(np.float64).transpose(2, 0, 1)
    pixels = bicubic(pixels, new_width) if new_width != width else pixels
    pixels = bicubic(pixels.swapaxes(1, 2), new_height).swapaxes(1, 2) if new_height != height else pixels
    top, left = (new_height - size) // 2, (new_width - size) // 2
    pixels = pixels[:, top : top + size, left : left + size]
    return (pixels / 255 - np.reshape(CLIP_MEAN, (3, 1, 1))) / np.reshape(CLIP_STD, (3, 1, 1))


SIZES = [(360, 640), (640, 360), (225, 399), (224, 224), (224, 301), (100, 150), (65, 47), (500, 500)]


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_against_an_independent_computation(size):
    frames = random_frames(2, *size)
    got = Preprocessing(224, 224)(frames)
    assert got.shape == (2, 3, 224, 224) and got.dtype == torch.float32
    for row, frame in zip(got, frames, strict=True):
        assert_same_levels(row, torch.from_numpy(independent_preprocess(frame, 224)))


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")
@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_against_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    frames = random_frames(2, *size)
    expected = CLIPImageProcessorPil()(list(frames.numpy()), return_tensors="pt")["pixel_values"]
    assert_same_levels(Preprocessing(224, 224)(frames), expected)


def test_preprocessing_without_an_8_bit_kernel_agrees():
    for frames in (random_frames(2, 180, 320), torch.randint(0, 256, (2, 180, 320, 3), dtype=torch.uint8)):
        images = frames.permute(0, 3, 1, 2)
        exact, other = (
            resize(images, 64, 113).float() for resize in (preprocessing._resize, preprocessing._resize_by_direction)
        )
        torch.testing.assert_close(exact, other, rtol=0, atol=1.001)


def view(statistics: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(statistics).view(3, 1, 1)


def test_preprocessing_of_batches_and_views():
    frames = random_frames(2, 3, 40, 60)
    whole = Preprocessing(32, 32)(frames)
    assert whole.shape == (2, 3, 3, 32, 32) and whole.is_contiguous()
    for batch in range(2):
        for index in range(3):
            torch.testing.assert_close(Preprocessing(32, 32)(frames[batch, index : index + 1])[0], whole[batch, index])
    levels = Preprocessing(32, 32).levels(frames.contiguous())
    assert levels.shape == (2, 3, 3, 32, 32) and levels.dtype == torch.uint8 and levels.stride(2) == 1
    torch.testing.assert_close((levels / 255 - view(CLIP_MEAN)) / view(CLIP_STD), whole, rtol=1e-5, atol=1e-5)
    turned = frames.transpose(2, 3)
    torch.testing.assert_close(Preprocessing(32, 32)(turned), Preprocessing(32, 32)(turned.contiguous()))
    assert Preprocessing(32, 32)(frames, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("frames", "error", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), TypeError, "frames must be a uint8 tensor .*not ndarray"),
        (torch.zeros(2, 8, 8, 3), TypeError, "not torch.float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"not \[8, 8, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, r"not \[2, 3, 8, 8\]"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), ValueError, r"not \[0, 8, 8, 3\]"),
    ],
)
def test_frames_are_checked(tiny, frames, error, words):
    with pytest.raises(error, match=words):
        tiny.encode_frames(frames)


def test_preprocessor_configurations():
    config = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3]}
    assert Preprocessing.from_config(config, 32) == Preprocessing(32, 36, (0.1, 0.2, 0.3), CLIP_STD)
    assert Preprocessing.from_config({"size": 32, "crop_size": 32}, 32) == Preprocessing(32, 32)
    assert Preprocessing.from_config({}, 224) == Preprocessing(224, 224)
    for change, words in [
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"size": {"height": 32, "width": 32}}, "size must be one number"),
        ({"crop_size": 24}, "crops to 24 pixels, but the image tower takes 32"),
        ({"size": 30}, "resizes to 30 pixels, less than the 32"),
    ]:
        with pytest.raises(ValueError, match=words):
            Preprocessing.from_config(config | change, 32)


@pytest.fixture(scope="module")
def tiny() -> ClipTowers:
    return ClipTowers.random("tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny CLIP as transformers saves it, with a byte-pair tokenizer and a preprocessor of its own."""
    path = str(tmp_path_factory.mktemp("clip"))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>"]
    tokenizer = CLIPTokenizerFast(
        vocab={word: index for index, word in enumerate(words)}, merges=[("c", "a"), ("ca", "t</w>")]
    )
    tokenizer.save_pretrained(path)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=24)
    model = CLIPModel(config)
    for parameter in model.parameters():  # no biases of 0, no norms of 1
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    with open(os.path.join(path, "preprocessor_config.json"), "w") as file:
        json.dump(
            {"size": {"shortest_edge": 32}, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, file
        )
    return path


def test_features_of_a_saved_model_are_those_of_transformers(folder):
    towers = ClipTowers.from_pretrained(folder, dtype=torch.float32)
    assert (towers.image_dim, towers.text_dim, towers.image_size) == (24, 24, 32)
    assert towers.preprocess == Preprocessing(32, 32, (0.5,) * 3, (0.25,) * 3)
    assert towers.has_tokenizer and not towers.random_weights
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizerFast.from_pretrained(folder)
    frames = random_frames(2, 5, 48, 40)
    with torch.no_grad():
        pixel_values = towers.preprocess(frames)
        expected = clip.get_image_features(pixel_values=pixel_values.flatten(0, 1)).pooler_output
        for batch_size in (1, 3, 64):
            got = towers.encode_frames(frames, batch_size=batch_size)
            assert got.shape == (2, 5, 24) and got.dtype == torch.float32
            torch.testing.assert_close(got.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
        sentences = ["a cat", "cat", "the cat sat on a mat and then it went on and on and on", "A CAT", "dog eats"]
        calls = []
        texts = towers.encode_text(sentences, batch_size=2, progress=lambda done, total: calls.append((done, total)))
        for row, sentence in zip(texts, sentences, strict=True):
            tokens = tokenizer(sentence, truncation=True, max_length=16, return_tensors="pt")
            expected = clip.get_text_features(**tokens).pooler_output[0]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(texts[0], texts[3])
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert not torch.allclose(texts[0], texts[1])


def test_sources_beside_the_weights(folder, tmp_path):
    towers = ClipTowers.from_pretrained(folder)
    CLIPModel.from_pretrained(folder).save_pretrained(tmp_path)
    bare = ClipTowers.from_pretrained(tmp_path)  # no tokenizer, no preprocessor
    assert bare.preprocess == Preprocessing(32, 32) and not bare.has_tokenizer
    assert bare.fingerprint != towers.fingerprint, "another mean gives other features"
    with pytest.raises(ValueError, match="came without tokenizer files"):
        bare.encode_text(["a cat"])
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": [0.5] * 3}}))
    assert ClipTowers.from_pretrained(tmp_path).preprocess.mean == (0.5,) * 3


def test_folders_that_are_no_clip(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CLIP folder .*nowhere"):
        ClipTowers.from_pretrained(tmp_path / "nowhere")
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model of type 'bert', not 'clip'"):
        ClipTowers.from_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(folder)
    weights = model.state_dict()
    del weights["visual_projection.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks weights of CLIP: visual_projection\.weight"):
        ClipTowers.from_pretrained(tmp_path)


def test_random_towers_are_seeded_frozen_and_usable_in_training(tiny):
    frames = random_frames(3, 40, 50)
    features = tiny.encode_frames(frames)
    assert tiny.random_weights and "random" in tiny.name
    assert features.shape == (3, tiny.image_dim) and torch.isfinite(features).all()
    torch.testing.assert_close(ClipTowers.random("tiny", dtype=torch.float32).encode_frames(frames), features)
    assert not tiny.model.training and not any(parameter.requires_grad for parameter in tiny.model.parameters())
    layer = torch.nn.Linear(tiny.image_dim, 4)
    layer(features).sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], features.sum(0))
    with pytest.raises(ValueError, match="shape must be one of 'ViT-B/32'"):
        ClipTowers.random("ViT-Z")
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        ClipTowers.random("tiny", dtype=torch.int8)


def test_stand_in_tokenizer(tiny):
    sentences = ["A man talks.", "a man talks .", "a man", "a man " * 100, "a man " * 200, "", "ein Mädchen weint"]
    texts = tiny.encode_text(sentences)
    assert texts.shape == (7, tiny.text_dim) and torch.isfinite(texts).all()
    torch.testing.assert_close(texts[0], texts[1])
    torch.testing.assert_close(texts[3], texts[4])  # both are cut to the tower's length
    for index, sentence in enumerate(sentences):  # what fills up a shorter row does not count
        torch.testing.assert_close(tiny.encode_text([sentence])[0], texts[index], rtol=1e-4, atol=1e-5)
    assert torch.pdist(texts[[0, 2, 3, 5, 6]]).min() > 1e-2
    assert tiny.encode_text([]).shape == (0, tiny.text_dim)
    for wrong in ("a man", [1, 2], [b"a man"]):
        with pytest.raises(TypeError, match="sentences must be a sequence of strings"):
            tiny.encode_text(wrong)


def test_other_types(tiny):
    frames = random_frames(4, 40, 50)
    exact = tiny.encode_frames(frames)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float64, 1e-4)):
        towers = ClipTowers.random("tiny", dtype=dtype)
        got = towers.encode_frames(frames)
        assert got.dtype == towers.encode_text(["a man"]).dtype == torch.float32
        assert (got - exact).norm() <= tolerance * exact.norm()
        assert towers.fingerprint == tiny.fingerprint, "the type that weights are cast to is no other encoder"


def test_fingerprint_tells_encoders_apart(folder, tmp_path):
    prints = {ClipTowers.random("tiny", seed=seed).fingerprint for seed in range(3)}
    assert len(prints) == 3 and all(len(text) == 64 for text in prints)
    first = ClipTowers.from_pretrained(folder).fingerprint
    assert first == ClipTowers.from_pretrained(folder).fingerprint
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.visual_projection.weight.mul_(1.001)  # as a step of fine-tuning would
    model.save_pretrained(tmp_path)
    with open(os.path.join(folder, "preprocessor_config.json")) as file:
        (tmp_path / "preprocessor_config.json").write_text(file.read())
    assert ClipTowers.from_pretrained(tmp_path).fingerprint != first


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
def test_temporal_kernel_is_a_3d_patch_projection(kernel):
    pixel_values = torch.randn(2, 5, 3, 16, 16, dtype=torch.float64)
    weight = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    inflated = weight.unsqueeze(2).expand(-1, -1, kernel, -1, -1) / kernel
    volume = F.pad(pixel_values.transpose(1, 2), (0, 0, 0, 0, (kernel - 1) // 2, kernel // 2), mode="replicate")
    expected = F.conv3d(volume, inflated, stride=(1, 8, 8)).transpose(1, 2)  # [B, N, 6, 2, 2]
    mean = _mean_over_time(pixel_values, kernel)
    got = F.conv2d(mean.flatten(0, 1), weight, stride=8).view(2, 5, 6, 2, 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_temporal_kernel_of_the_tower(tiny):
    frames = random_frames(2, 6, 40, 50)
    plain = tiny.encode_frames(frames)
    assert torch.equal(tiny.encode_frames(frames, temporal_kernel=1), plain)
    with_time = tiny.encode_frames(frames, temporal_kernel=3)
    assert with_time.shape == plain.shape and not torch.allclose(with_time, plain, atol=1e-3)
    still = frames[:, :1].expand(-1, 6, -1, -1, -1)
    for kernel in (1, 2, 3, 5, 9):
        torch.testing.assert_close(
            tiny.encode_frames(still, temporal_kernel=kernel), plain[:, :1].expand(-1, 6, -1), rtol=1e-3, atol=1e-4
        )
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="temporal_kernel must be an integer of at least 1"):
            tiny.encode_frames(frames, temporal_kernel=wrong)
    with pytest.raises(ValueError, match=r"pixel_values must be \[..., N, 3, 32, 32\], not \[2, 3, 16, 16\]"):
        tiny.encode_pixels(torch.zeros(2, 3, 16, 16))


def test_true_shapes():
    towers = ClipTowers.random("ViT-B/32")
    # The published size of CLIP ViT-B/32, both towers, projections and temperature.
    assert sum(parameter.numel() for parameter in towers.model.parameters()) == 151_277_313
    features = towers.encode_frames(random_frames(2, 90, 160))
    assert features.shape == (2, 512) and torch.isfinite(features).all()


@pytest.mark.slow
def test_true_shape_of_the_large_towers():
    towers = ClipTowers.random("ViT-L/14")
    assert sum(parameter.numel() for parameter in towers.model.parameters()) == 427_616_513
    assert towers.encode_frames(random_frames(1, 90, 160)).shape == (1, 768)
    assert towers.encode_text(["a man"]).shape == (1, 768)


def test_without_open_clip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"needs open_clip .*pip install 'evc-fast\[clip\]'"):
        ClipTowers.from_open_clip("ViT-B-32", None)


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed: the clip extra")
def test_open_clip():
    towers = ClipTowers.from_open_clip("ViT-B-32", None)
    assert towers.random_weights and towers.image_dim == towers.text_dim == 512
    frames, sentences = random_frames(2, 90, 160), ["a cat", "a much longer sentence about a cat"]
    open_clip = importlib.import_module("open_clip")
    with torch.no_grad():
        expected = towers.model.encode_image(towers.preprocess(frames))
        torch.testing.assert_close(towers.encode_frames(frames), expected)
        expected = towers.model.encode_text(open_clip.get_tokenizer("ViT-B-32")(sentences))
        torch.testing.assert_close(towers.encode_text(sentences), expected)
    with pytest.raises(ValueError, match="open_clip has no model 'nothing'"):
        ClipTowers.from_open_clip("nothing", None)
