"""The CPU's image tower against transformers' own, with random biases and norms so that a wrong fold shows."""

from __future__ import annotations

import copy
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from evc_fast.data import image_tower
from evc_fast.data.clip import ClipTowers
from evc_fast.data.image_tower import PRODUCTS, ImageTower, fastest_dtype, obstacle, product_obstacle
from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = {"mean": CLIP_MEAN, "std": CLIP_STD}
TINY = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12}
CASES = {
    "tiny": TINY | {"image_size": 32, "patch_size": 8},
    "one layer": TINY | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1},
    "erf gelu": TINY | {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"},
    "small patches, one head": TINY | {"image_size": 28, "patch_size": 4, "num_attention_heads": 1},
    "pixels beyond the last patch": TINY | {"image_size": 30, "patch_size": 7},
    "one patch": TINY | {"image_size": 16, "patch_size": 16},
    "other epsilon": TINY | {"image_size": 32, "patch_size": 8, "layer_norm_eps": 0.1},
    "true widths of ViT-B/32": WIDE | {"image_size": 64, "patch_size": 32},
    "true widths of ViT-L/14": WIDE
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    | {"image_size": 42, "patch_size": 14},
}


def products(dtype: torch.dtype) -> list:
    return [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(product_obstacle(name, dtype)), reason=f"no {name} product here")
        )
        for name in PRODUCTS
    ]


def make_clip(vision: dict, width: int = 24, seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=text | {"vocab_size": 8}, vision_config=vision, projection_dim=width)
    clip = CLIPModel(config).eval().requires_grad_(False)
    disturb(clip)
    return clip


def disturb(clip: nn.Module) -> None:
    """No biases of 0, no norms of 1, and weights at which layers neither vanish nor saturate."""
    for name, parameter in clip.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
        elif "vision" in name and parameter.dim() > 1:
            parameter.data.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)


def make_levels(count: int, size: int, seed: int = 1) -> torch.Tensor:
    """uint8 [n, 3, S, S], channels last in memory."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def normalise(levels: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return ((levels.double() / 255 - mean) / std).to(dtype).contiguous()


def straight(clip: CLIPModel, levels: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """transformers' features in `dtype`, as float64."""
    clip = copy.deepcopy(clip).to(dtype)
    with torch.no_grad():
        return clip.get_image_features(pixel_values=normalise(levels, dtype)).pooler_output.double()


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return F.cosine_similarity(first.double(), second.double(), dim=-1).min().item()


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return make_clip(CASES["tiny"])


@pytest.fixture(scope="module")
def levels() -> torch.Tensor:
    return make_levels(5, 32)


@pytest.mark.parametrize("product", products(torch.float32))
@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_exact_as_transformers(case, product):
    clip = make_clip(CASES[case])
    levels = make_levels(3, CASES[case]["image_size"])
    exact = straight(clip, levels)
    allowed = 3 * (straight(clip, levels, torch.float32) - exact).abs().max() + 1e-6 * exact.abs().max()
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float32, product=product)
    assert (tower.product, tower.dtype) == (product, torch.float32)
    for features in (tower.encode_levels(levels), tower(normalise(levels, torch.float32))):
        assert features.dtype == torch.float32 and features.shape == exact.shape
        assert (features - exact).abs().max() <= allowed


@pytest.mark.parametrize("product", [p for p in products(torch.float64) if p.values[0] != "onednn"])
@pytest.mark.parametrize("case", CASES)
def test_the_algebra_is_exact(case, product):
    clip = make_clip(CASES[case], seed=2)
    levels = make_levels(2, CASES[case]["image_size"])
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float64, product=product)
    torch.testing.assert_close(tower.encode_levels(levels), straight(clip, levels), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("product", products(torch.bfloat16))
@pytest.mark.parametrize("case", ["tiny", "erf gelu", "true widths of ViT-B/32"])
def test_bfloat16(case, product):
    clip = make_clip(CASES[case])
    levels = make_levels(3, CASES[case]["image_size"])
    exact = straight(clip, levels)
    tower = ImageTower(clip, **STATISTICS, dtype=torch.bfloat16, product=product)
    for features in (tower.encode_levels(levels), tower(normalise(levels, torch.float32))):
        assert features.dtype == torch.float32
        assert cosine(features, exact) >= 0.999
        assert (features - exact).norm() <= 2 * (straight(clip, levels, torch.bfloat16) - exact).norm()


def test_float16(clip, levels):
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float16)
    assert tower.product == "torch" and cosine(tower.encode_levels(levels), straight(clip, levels)) >= 0.9999


@pytest.mark.parametrize("product", products(torch.float32))
def test_batches(clip, product):
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float32, product=product)
    levels = make_levels(131, 32)  # two passes and a part: 17 tokens a frame
    exact = straight(clip, levels)
    for count in (0, 1, 7, 131):
        features = tower.encode_levels(levels[:count])
        assert features.shape == (count, 24)
        torch.testing.assert_close(features.double(), exact[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(bool(product_obstacle("own", torch.float32)), reason="needs the compiled library")
@pytest.mark.parametrize("case", ["tiny", "true widths of ViT-B/32"])
def test_a_frame_has_one_feature_wherever_it_stands(case):
    tower = ImageTower(make_clip(CASES[case]), **STATISTICS, dtype=torch.float32, product="own")
    levels = make_levels(16, CASES[case]["image_size"])
    features = tower.encode_levels(levels)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tower.encode_levels(levels[order]), features[order])
    for start, stop in ((0, 1), (3, 4), (14, 16), (2, 5), (0, 9)):
        assert torch.equal(tower.encode_levels(levels[start:stop]), features[start:stop])
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(tower.encode_levels(levels), features)


def test_layouts_and_types_of_levels(clip, levels):
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float32)
    features = tower.encode_levels(levels)
    assert torch.equal(tower.encode_levels(levels.contiguous()), features)
    assert torch.equal(tower.encode_levels(levels.float()), features)
    wider = torch.zeros(5, 3, 40, 50, dtype=torch.uint8).to(memory_format=torch.channels_last)
    wider[..., 4:36, 9:41] = levels
    assert torch.equal(tower.encode_levels(wider[..., 4:36, 9:41]), features)
    before = levels.clone()
    tower.encode_levels(levels)
    assert torch.equal(levels, before)


def test_no_gradients_and_inference_mode(clip, levels):
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float32)
    assert not tower.training and not list(tower.parameters())
    features = tower.encode_levels(levels)
    assert not features.requires_grad
    with torch.inference_mode():
        assert torch.equal(tower.encode_levels(levels), features)
    assert not tower(normalise(levels, torch.float32).requires_grad_()).requires_grad


@pytest.mark.parametrize("product", products(torch.float32))
def test_copies(clip, levels, product):
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float32, product=product)
    features = tower.encode_levels(levels)
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(tower))):
        assert torch.equal(other.encode_levels(levels), features)


def test_release_frees_the_weights_and_keeps_the_shapes(clip, levels):
    kept = copy.deepcopy(clip)
    given = copy.deepcopy(clip)
    tower = ImageTower(given, **STATISTICS, dtype=torch.bfloat16, product="torch", release=True)
    for name, parameter in given.named_parameters():
        ours = name.startswith(("vision_model", "visual_projection"))
        assert parameter.is_meta == ours and parameter.dtype == (torch.bfloat16 if ours else torch.float32)
        assert parameter.shape == kept.get_parameter(name).shape
    expected = ImageTower(kept, **STATISTICS, dtype=torch.bfloat16, product="torch").encode_levels(levels)
    assert torch.equal(tower.encode_levels(levels), expected)
    assert not any(parameter.is_meta for parameter in kept.parameters())


def test_flops_are_counted_and_fewer(clip, levels):
    tower = ImageTower(clip, **STATISTICS, dtype=torch.float32)
    vision = clip.config.vision_config
    d, hidden, layers, tokens, n = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, 17, 5
    attention = 4 * tokens**2 * d  # which the counter of torch does not see in its fused kernel for the CPU
    with FlopCounterMode(display=False) as counter:
        tower.encode_levels(levels)
    patches = 2 * (tokens - 1) * 3 * 8 * 8 * d
    layer = 2 * tokens * (4 * d * d + 2 * d * hidden)
    scores = 2 * 2 * tokens * vision.num_attention_heads * d  # both products with the tokens, in their full width
    last = 2 * (4 * d * d + 2 * d * hidden) + scores
    expected = n * (patches + (layers - 1) * layer + last + 2 * d * 24)
    assert counter.get_total_flops() in (expected, expected + n * (layers - 1) * attention)


def test_dtype_follows_the_processor(clip, monkeypatch):
    def machine(bf16: bool, amx: bool, packed: str) -> torch.dtype:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(
            image_tower, "product_obstacle", lambda product, dtype: "" if product == "torch" else packed
        )
        return fastest_dtype()

    assert machine(False, False, "") == torch.float32
    assert machine(True, False, "") == machine(False, True, "") == torch.bfloat16
    assert machine(True, True, "nothing packs") == torch.float32
    monkeypatch.undo()
    monkeypatch.setattr(image_tower, "fastest_dtype", lambda: torch.bfloat16)
    tower = ImageTower(clip, **STATISTICS, product="torch")
    assert tower.dtype == torch.bfloat16


def test_choice_of_the_product(clip, monkeypatch):
    lacking: set[str] = set()
    monkeypatch.setattr(
        image_tower, "product_obstacle", lambda product, dtype: "there is none" if product in lacking else ""
    )
    choose = image_tower.choose_product
    assert (choose(None, torch.float32), choose(None, torch.bfloat16)) == ("own", "onednn")
    assert (choose(None, torch.float64), choose(None, torch.float16)) == ("own", "torch")
    lacking.add("onednn")
    assert choose(None, torch.bfloat16) == "own" and choose("torch", torch.bfloat16) == "torch"
    with pytest.raises(RuntimeError, match="product 'onednn' cannot run: there is none"):
        ImageTower(clip, **STATISTICS, dtype=torch.float32, product="onednn")
    lacking.add("own")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert choose(None, dtype) == "torch"
    assert ImageTower(clip, **STATISTICS, dtype=torch.float32).product == "torch"
    with pytest.raises(ValueError, match="product must be one of 'own', 'onednn', 'torch' or None, not 'mkl'"):
        ImageTower(clip, **STATISTICS, product="mkl")


def test_what_products_lack(monkeypatch):
    assert product_obstacle("torch", torch.float16) == ""
    monkeypatch.setattr(image_tower.platform, "machine", lambda: "aarch64")
    assert "no oneDNN for x86-64" in product_obstacle("onednn", torch.float32)
    monkeypatch.setattr(image_tower.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "no oneDNN for x86-64" in product_obstacle("onednn", torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert "oneDNN does not multiply torch.float64" in product_obstacle("onednn", torch.float64)
    monkeypatch.setattr(image_tower, "EXTENSION_MISSING", "")
    assert "the compiled library has no torch.float16" in product_obstacle("own", torch.float16)
    monkeypatch.setattr(image_tower, "EXTENSION_MISSING", "it was not built")
    assert product_obstacle("own", torch.float32) == "it was not built"


def test_errors(clip, levels):
    with pytest.raises(ValueError, match=r"dtype must be a floating-point type, not torch\.int8"):
        ImageTower(clip, **STATISTICS, dtype=torch.int8)
    with pytest.raises(ValueError, match="clip must be on a CPU, not on meta"):
        ImageTower(copy.deepcopy(clip).to("meta"), **STATISTICS)
    with pytest.raises(ValueError, match="made of clip: Linear is not transformers' CLIPModel"):
        ImageTower(nn.Linear(2, 2), **STATISTICS)
    for change, words in [({"hidden_act": "relu"}, "activation is 'relu'"), ({"num_channels": 1}, "have 1 channels")]:
        other = SimpleNamespace(vision_config=SimpleNamespace(**(clip.config.vision_config.to_dict() | change)))
        fake = SimpleNamespace(config=other, vision_model=None, visual_projection=None)
        assert words in obstacle(fake)
    assert obstacle(clip) == ""
    tower = ImageTower(clip, **STATISTICS)
    for wrong in (levels[0], levels[:, :2], levels[..., :16]):
        with pytest.raises(ValueError, match=r"levels must be \[n, 3, 32, 32\], not \["):
            tower.encode_levels(wrong)
        with pytest.raises(ValueError, match=r"pixel_values must be \[n, 3, 32, 32\], not \["):
            tower(wrong)


def random_frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("temporal_kernel", [1, 3])
def test_towers_have_both_engines(temporal_kernel):
    own, library = (ClipTowers.random("tiny", dtype=torch.float32, engine=name) for name in ("own", "library"))
    assert ClipTowers.random("tiny").engine == own.engine == "own" and library.engine == "library"
    assert library.image_tower is None and isinstance(own.image_tower, ImageTower)
    assert own.fingerprint == library.fingerprint
    counts = [sum(parameter.numel() for parameter in towers.model.parameters()) for towers in (own, library)]
    assert counts[0] == counts[1]
    frames = random_frames(2, 3, 40, 50)
    expected = library.encode_frames(frames, temporal_kernel=temporal_kernel)
    for batch_size in (1, 4, 64):
        got = own.encode_frames(frames, temporal_kernel=temporal_kernel, batch_size=batch_size)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        pixels = own.preprocess(frames)
        got = own.encode_pixels(pixels, temporal_kernel=temporal_kernel, batch_size=batch_size)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    pixels = pixels.flatten(0, 1)
    torch.testing.assert_close(own.model.encode_image(pixels), library.model.encode_image(pixels))
    torch.testing.assert_close(own.encode_text(["a man"]), library.encode_text(["a man"]))


def test_engines_that_cannot_serve():
    with pytest.raises(ValueError, match="engine must be 'own', 'library' or None, not 'fast'"):
        ClipTowers.random("tiny", engine="fast")
    with pytest.raises(ValueError, match="engine 'own' cannot serve: it runs on a CPU, not on meta"):
        ClipTowers.random("tiny", engine="own", device="meta")

    class Other(nn.Module):  # as open_clip's model: two calls, no transformers inside
        encode_image = encode_text = None

    options = {"name": "other", "width": 4, "preprocess": ClipTowers.random("tiny").preprocess, "tokenize": None}
    options |= {"architecture": {}, "random_weights": True, "device": "cpu", "dtype": None}
    with pytest.raises(ValueError, match="engine 'own' cannot serve: Other is not transformers' CLIPModel"):
        ClipTowers(Other(), engine="own", **options)
    assert ClipTowers(Other(), engine=None, **options).engine == "library"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "product", "count"),
    [
        ("ViT-B/32", torch.float32, None, 16),
        ("ViT-B/32", torch.float32, "own", 4),
        ("ViT-B/32", torch.bfloat16, "own", 4),
        ("ViT-B/32", torch.bfloat16, "torch", 2),
        ("ViT-L/14", torch.float32, None, 2),
    ],
)
def test_whole_towers(shape, dtype, product, count):
    if product is not None and product_obstacle(product, dtype):
        pytest.skip(f"no {product} product here")
    torch.set_num_threads(os.cpu_count() or 1)
    clip = ClipTowers.random(shape, engine="library").model.clip
    torch.manual_seed(0)
    for name, parameter in clip.vision_model.named_parameters():
        if parameter.dim() == 1 and "class" not in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    levels = make_levels(count, 224)
    with torch.no_grad():
        pixels = normalise(levels, torch.float32)
        expected = clip.get_image_features(pixel_values=pixels).pooler_output
    tower = ImageTower(clip, **STATISTICS, dtype=dtype, product=product, release=True)
    assert cosine(tower.encode_levels(levels), expected) >= (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)
    assert cosine(tower(pixels), expected) >= (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)
