"""The folded encoder against the straight one, whose equations tests/test_encoder.py holds against the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.ops import dispatch
from evc_fast.testing.encoder_cases import (
    ENCODER_OPTIONS,
    ENCODER_SIZES,
    ODD_WIDTHS,
    build_encoder,
    cast_inputs,
    encoder_inputs,
    named_outputs,
)
from evc_fast.testing.tolerances import FORWARD_FACTOR, assert_as_good_as_plain, error_bound, largest_error

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = (0, 1, 2, 3, 5)
HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
IMPLS = ["cpp", "reference"] if HAS_CPP else ["reference"]
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: there is no compiled encoder")
# Options whose products have other shapes than the paper's model; the rest only skip a normalisation.
SHAPES_OF_OPTIONS = [
    "paper",
    "no_retrieval",
    "no_emotion",
    "router_video",
    "emotion_first",
    "emotion_first_video_merge",
]


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """Of the largest value; inf where only one of them is NaN."""
    if oracle.numel() == 0:
        return 0.0
    return largest_error(actual, oracle) / max(oracle.abs().max().item(), 1e-300)


def assert_same_fields(got: dict[str, Tensor | None], want: dict[str, Tensor | None], what: str) -> None:
    assert got.keys() == want.keys(), what
    for name, expected in want.items():
        assert (got[name] is None) == (expected is None), f"{what}: {name}"
        if expected is not None:
            assert got[name].shape == expected.shape, f"{what}: {name} {got[name].shape}, {expected.shape} expected"


def assert_as_good(actual: Tensor, plain: Tensor, oracle: Tensor, few: float, what: str) -> None:
    """As good as plain PyTorch; where that is exact to a few roundings by luck, ``few`` of the largest value pass.

    The folded products do not round at the same places as the straight ones: of a handful of values either side may
    come out ahead.
    """
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, the straight encoder gives {plain.dtype}"
    error, bound = largest_error(actual, oracle), error_bound(actual.dtype, plain, oracle, FORWARD_FACTOR)
    bound = max(bound, few * oracle.abs().max().item())
    assert error <= bound, f"{what}: error {error:.3g} against float64, at most {bound:.3g} allowed"


@torch.no_grad()
def check_everything(sizes: dict, batches: tuple[int, ...], what: str) -> None:
    """One configuration in all types by all implementations, with and without explanation."""
    encoder = build_encoder(**sizes)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        folded, straight = encoder.fold(dtype=dtype), build_encoder(**sizes).to(dtype)
        assert folded.dtype == dtype
        fields: dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for batch in batches:
            arguments = cast_inputs(encoder_inputs(encoder.config, batch), dtype)
            wide = cast_inputs(arguments, torch.float64)
            oracle = named_outputs(encoder(*wide, explain=True, impl="reference"))
            plain = named_outputs(straight(*arguments, explain=True, impl="reference"))
            for impl in IMPLS:
                case = f"{what}, {dtype}, B = {batch}, {impl}"
                short, output = folded(*arguments, impl=impl), folded(*arguments, explain=True, impl=impl)
                assert short.explanation is None
                assert torch.equal(short.tokens, output.tokens), f"{case}: an explanation changes the tokens"
                got = named_outputs(output)
                assert_same_fields(got, oracle, case)
                if got["emotion_logits"] is not None:
                    assert torch.equal(short.emotion_logits, got["emotion_logits"]), case
                for name, expected in oracle.items():
                    if expected is not None:
                        fields.setdefault((impl, name), []).append((got[name], plain[name], expected))
        for (impl, name), triples in fields.items():
            case = f"{what}, {dtype}, {impl}: {name}"
            actual, plain, oracle = (torch.cat(parts) for parts in zip(*triples, strict=True))
            if dtype == torch.float64:
                assert relative_error(actual, oracle) <= 1e-12, case
                continue
            if dtype == torch.float32 and impl == "cpp":
                assert relative_error(actual, oracle) <= 1e-5, case
            few = 8 * torch.finfo(torch.float32).eps
            if dtype == torch.bfloat16 and impl == "reference":  # which stores what the compiled one keeps in float32
                few = 2 * torch.finfo(dtype).eps
            assert_as_good(actual, plain, oracle, few, case)


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_every_option_and_size(options):
    for k, n, w in ENCODER_SIZES:
        check_everything({**options, "k": k, "n": n, "w": w}, (0, 1, 3), f"(K, N, W) = {(k, n, w)}")


@pytest.mark.slow
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_every_option_size_and_batch(options):
    for k, n, w in ENCODER_SIZES:
        check_everything({**options, "k": k, "n": n, "w": w}, BATCHES, f"(K, N, W) = {(k, n, w)}")


@pytest.mark.parametrize("widths", ODD_WIDTHS.values(), ids=ODD_WIDTHS)
def test_widths(widths):
    check_everything(widths, (1, 3), "paper")


@pytest.mark.slow
@pytest.mark.parametrize("widths", ODD_WIDTHS.values(), ids=ODD_WIDTHS)
def test_widths_with_every_option(widths):
    for name, options in ENCODER_OPTIONS.items():
        check_everything({**options, **widths}, BATCHES, name)


@needs_cpp
@torch.no_grad()
def test_the_papers_sizes():
    config = FaceNetConfig()
    torch.manual_seed(0)
    encoder = FaceNetEncoder(config).eval()
    for parameter in encoder.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    wide = FaceNetEncoder(config).double().eval()
    wide.load_state_dict(encoder.state_dict())
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, None)):
        arguments = encoder_inputs(config, 2, dtype=dtype)
        oracle = named_outputs(wide(*cast_inputs(arguments, torch.float64), explain=True, impl="reference"))
        straight = encoder.to(dtype) if dtype != torch.float32 else encoder
        plain = named_outputs(straight(*arguments, explain=True, impl="reference"))
        for impl in IMPLS:
            got = named_outputs(wide.fold(dtype=dtype)(*arguments, explain=True, impl=impl))
            assert_same_fields(got, oracle, f"{dtype}")
            for name, expected in oracle.items():
                if bound is not None:
                    assert relative_error(got[name], expected) <= bound, f"{name}, {impl}"
                assert_as_good_as_plain(got[name], plain[name], expected, FORWARD_FACTOR, f"{dtype} {name}, {impl}")


@pytest.mark.parametrize("options", SHAPES_OF_OPTIONS)
def test_another_number_of_frames_than_the_configurations(options):
    encoder = build_encoder(**ENCODER_OPTIONS[options])
    for frames in (1, 2, 17, 65):
        folded = encoder.fold(num_frames=frames)
        assert folded.num_frames == frames
        config = FaceNetConfig.from_dict(encoder.config.to_dict() | {"num_frames": frames})
        arguments = encoder_inputs(config, 2)
        with torch.no_grad():
            oracle = named_outputs(encoder(*arguments, explain=True, impl="reference"))
            for impl in (*IMPLS, None):
                for name, got in named_outputs(folded(*arguments, explain=True, impl=impl)).items():
                    if oracle[name] is not None:
                        assert relative_error(got, oracle[name]) <= 1e-12, f"{frames} frames, {impl}: {name}"


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_extreme_features(impl):
    """Sharp softmaxes, saturated gates, constant features: finite results, as good as plain PyTorch's."""
    for options in ("paper", "emotion_first", "no_emotion"):
        encoder = build_encoder(**ENCODER_OPTIONS[options])
        plain_encoder = build_encoder(**ENCODER_OPTIONS[options]).float()
        folded = encoder.fold(dtype=torch.float32)
        for scale in (0.0, 1e-30, 30.0, 1e4):
            video, *rest = encoder_inputs(encoder.config, 3, dtype=torch.float32)
            arguments = [video * scale, rest[0] * min(scale, 30.0), *rest[1:]]
            oracle = named_outputs(encoder(*cast_inputs(arguments, torch.float64), explain=True, impl="reference"))
            plain = named_outputs(plain_encoder(*arguments, explain=True, impl="reference"))
            for name, got in named_outputs(folded(*arguments, explain=True, impl=impl)).items():
                if oracle[name] is None:
                    continue
                what = f"{options}, scale {scale}: {name}"
                assert got.isfinite().all(), what
                # Large scores: a softmax of their rounding is the result, so that errors are draws of another order.
                factor = FORWARD_FACTOR if scale < 30 else 8 * FORWARD_FACTOR
                assert_as_good_as_plain(got, plain[name], oracle[name], factor, what)


@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_sums_of_the_explanation(impl):
    encoder = build_encoder()
    shown = encoder.fold(dtype=torch.float32)(
        *encoder_inputs(encoder.config, 3, dtype=torch.float32), explain=True, impl=impl
    ).explanation
    for name in ("component_weights", "triplet_weights", "routing_weights", "emotion_distribution"):
        sums = getattr(shown, name).sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), msg=lambda m, name=name: f"{name}: {m}")
    assert (shown.fact_gate.abs() < 1).all()
    assert math.isclose(shown.routing_weights.sum().item(), 3 * encoder.config.num_frames, rel_tol=1e-5)


@pytest.mark.parametrize("options", SHAPES_OF_OPTIONS)
def test_gradients_of_the_features_are_the_straight_encoders(options):
    encoder = build_encoder(**ENCODER_OPTIONS[options])
    folded = encoder.fold()
    arguments = encoder_inputs(encoder.config, 3)
    leaves = [x.requires_grad_() for x in arguments if x is not None and x.is_floating_point()]

    def gradients(output) -> list[Tensor | None]:
        terms = [x for x in (output.tokens, output.emotion_logits) if x is not None]
        weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x) for x in terms]
        loss = sum((x * weight).sum() for x, weight in zip(terms, weights, strict=True))
        return list(torch.autograd.grad(loss, leaves, allow_unused=True))

    want = gradients(encoder(*arguments, impl="reference"))
    for impl in (None, "reference"):
        for got, expected in zip(gradients(folded(*arguments, impl=impl)), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    if HAS_CPP:
        with pytest.raises(RuntimeError, match='impl="cpp" cannot run: it has no gradients'):
            folded(*arguments, impl="cpp")
        with torch.no_grad():
            assert not folded(*arguments, impl="cpp").tokens.requires_grad
