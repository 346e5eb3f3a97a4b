"""The encoder with its products reordered against the encoder as printed: values, gradients, cost; its dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.model.commuted import FactoredHidden
from evc_fast.model.dropout import Dropout
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, ENCODER_SIZES, build_encoder, encoder_inputs
from evc_fast.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(encoder: FaceNetEncoder, arguments: list[Tensor | None], impl: str | None) -> dict[str, Tensor]:
    """Outputs, and gradients of fixed random sums of them, by name."""
    inputs = {
        name: x.detach().requires_grad_()
        for name, x in zip(("video", "triplets", "similarity"), arguments, strict=False)
        if x is not None
    }
    groups = {"groups": arguments[3]} if arguments[3] is not None else {}
    output = encoder(**inputs, **groups, impl=impl)
    outputs = {"tokens": output.tokens} | ({} if output.emotion_logits is None else {"logits": output.emotion_logits})
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs.values()]
    leaves = inputs | dict(encoder.named_parameters())
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights, allow_unused=True)
    made = dict(zip(leaves, gradients, strict=True))
    if not encoder.config.cross_refine:  # theta = 1/K: similarity has no say
        made.pop("similarity", None)
    return outputs | {f"gradient of {name}": gradient for name, gradient in made.items()}


def assert_same(encoder: FaceNetEncoder, arguments: list[Tensor | None], tolerance: float = 1e-9) -> None:
    got, want = (evaluate(encoder, arguments, impl) for impl in (None, "reference"))
    largest = max(x.abs().max().item() for x in want.values())
    for name, expected in want.items():
        assert got[name] is not None, f"{name} takes no part"
        # What is 0 by nature (a key's bias is added to whole rows of a softmax) has no scale of its own.
        scale = max(expected.abs().max().item(), 1e-3 * largest)
        assert (got[name] - expected).abs().max().item() <= tolerance * scale, name


# --- The function and its gradients ----------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "w"), ENCODER_SIZES)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_outputs_and_all_gradients_are_those_as_printed(options, k, n, w):
    encoder = build_encoder(k=k, n=n, w=w, **options)
    assert_same(encoder, encoder_inputs(encoder.config))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_h_in_factors_takes_the_cheaper_order(batch):
    """Of v W_o W: few rows are multiplied from the left, many meet the product of the weights."""
    k, n, heads, d, out = 3, 5, 2, 16, 40
    g = torch.Generator().manual_seed(0)
    shapes = (batch, k, n, 3 * heads), (heads, batch, k, 3, d // heads), (d, d), (d,), (out, d)
    p, v, w_o, b_o, w = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    with FlopCounterMode(display=False) as counter:
        got = p @ FactoredHidden(p, v, w_o, b_o).mapped(w)
    by_head = p.unflatten(3, (3, heads)).permute(0, 1, 4, 2, 3) @ v.permute(
        1, 2, 0, 3, 4
    )  # [B, K, heads, N, d / heads]
    torch.testing.assert_close(got, by_head.transpose(2, 3).flatten(3) @ w_o.T @ w.T)
    rows = 3 * k * batch
    by_rows, by_weights = rows * d * (d + heads * out), d * out * (d + rows)
    assert counter.get_total_flops() == 2 * (min(by_rows, by_weights) + batch * k * n * 3 * heads * out)
    assert (by_rows < by_weights) == (batch == 1)
    encoder = build_encoder(k=k)
    assert_same(encoder, encoder_inputs(encoder.config, batch))


@pytest.mark.parametrize("num_queries", [7, 8, 30])
def test_few_queries_and_many(num_queries):
    """Below d columns the queries' readers meet the memory, from there on the keys are projected."""
    encoder = build_encoder(num_queries=num_queries)
    assert_same(encoder, encoder_inputs(encoder.config))


@pytest.mark.parametrize("weight", [0.0, 1e-6, 1e3])
def test_the_visual_gate_takes_any_affine_map_of_the_norm(weight):
    """phi_F's bias reaches the gate through what the normalized rows sum to, never through a division by the norm's."""
    encoder = build_encoder()
    with torch.no_grad():
        encoder.fact_norm.weight[::2] = weight
        encoder.fact_norm.bias[1::2] = -weight
        encoder.phi_f.bias.mul_(5)
    assert_same(encoder, encoder_inputs(encoder.config), 1e-8)


def test_gradcheck():
    widths = {"video_dim": 3, "text_dim": 5, "dim": 4, "emotion_dim": 3, "num_queries": 1, "ffn_dim": 5}
    encoder = build_encoder(k=2, n=2, w=3, **widths, output_dim=2)
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    inputs = [x.requires_grad_() for x in encoder_inputs(encoder.config, 1)[:3]]

    def run(video: Tensor, triplets: Tensor, similarity: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(encoder, state, (video, triplets, similarity))[:2]

    # similarity[0] lies below 0, where it is clamped and has no gradient; the numerical one agrees.
    assert torch.autograd.gradcheck(run, (*inputs, *parameters), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"order": "emotion_first"}, {"router": "video"}], ids=str)
def test_float32_errs_no_more_than_the_printed_order(options):
    torch.manual_seed(0)
    config = FaceNetConfig(**options)
    plain = FaceNetEncoder(config).eval()
    arguments = encoder_inputs(config, 2, dtype=torch.float32)
    mine, theirs = (evaluate(plain, arguments, impl) for impl in (None, "reference"))
    exact = evaluate(plain.double(), [None if x is None else x.double() for x in arguments], "reference")
    for name, oracle in exact.items():
        factor = GRADIENT_FACTOR if name.startswith("gradient") else FORWARD_FACTOR
        assert_as_good_as_plain(mine[name], theirs[name], oracle, factor, name)


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_explanations_are_those_as_printed(options):
    encoder = build_encoder(dropout=0.0, **options)
    arguments = encoder_inputs(encoder.config)
    encoder.train()  # in evaluation mode the encoder may run on its fold
    got, want = (encoder(*arguments, explain=True, impl=impl).explanation for impl in (None, "reference"))
    for name, expected in want._asdict().items():
        mine = getattr(got, name)
        assert (mine is None) == (expected is None), name
        if expected is not None:
            assert not mine.requires_grad
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_bfloat16_trains(options):
    encoder = build_encoder(dropout=0.0, **options).train()
    with torch.no_grad():
        want = encoder(*encoder_inputs(encoder.config), impl="reference").tokens
    encoder.bfloat16()
    got = evaluate(encoder, encoder_inputs(encoder.config, dtype=torch.bfloat16), None)
    assert got["tokens"].dtype == torch.bfloat16
    assert (got["tokens"].double() - want).abs().max() < 0.06 * want.abs().max()
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in got.values())


# --- Cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "share"), [(1, 0.85), (32, 0.66)])
def test_products_of_a_training_step(batch, share):
    """At the defaults, forward and backward: what of the straight encoder's FLOPs remains."""
    encoder = FaceNetEncoder(FaceNetConfig(dropout=0.0))
    arguments = encoder_inputs(encoder.config, batch, dtype=torch.float32)
    flops = {}
    for impl in (None, "reference"):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = encoder(*arguments, impl=impl)
            (output.tokens.sum() + output.emotion_logits.sum()).backward()
        flops[impl] = counter.get_total_flops()
    assert 0.5 * flops["reference"] < flops[None] < share * flops["reference"]


# --- Dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_p_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(3, 7, 4799, dtype=dtype, requires_grad=True)  # not a multiple of the four elements of a draw
    y = Dropout(p)(x)
    count, kept = x.numel(), (y != 0).sum().item()
    assert abs(kept / count - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full((kept,), 1 / (1 - p), dtype=dtype), rtol=1e-2, atol=0)
    for part in range(4):  # each of the 16-bit integers of a draw
        assert abs((y.flatten()[part::4] != 0).double().mean().item() - (1 - p)) < 0.02
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, 2))
    assert torch.equal(gradient, 2 * y)  # the same mask, scaled alike


def test_dropout_of_nothing_and_in_evaluation():
    x = torch.randn(5, 3)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert Dropout(0.5)(torch.empty(0, 4)).shape == (0, 4)
    assert not Dropout(1.0)(x).any()


def test_dropout_follows_the_global_seed_and_serves_both_orders_alike():
    encoder = build_encoder(dropout=0.5).train()
    arguments = encoder_inputs(encoder.config)
    tokens = []
    for impl in (None, None, "reference"):
        torch.manual_seed(4)
        tokens.append(encoder(*arguments, impl=impl).tokens)
    assert torch.equal(tokens[0], tokens[1])
    torch.testing.assert_close(tokens[0], tokens[2], rtol=1e-9, atol=1e-10)
    assert not torch.equal(encoder(*arguments).tokens, tokens[0])


def test_dropout_compiles_to_pytorchs_own():
    torch._dynamo.reset()
    layer = Dropout(0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(4, 8)
    torch.manual_seed(5)
    got = compiled(x)
    torch.manual_seed(5)
    assert torch.equal(got, nn.functional.dropout(x, 0.5))
    torch._dynamo.reset()
