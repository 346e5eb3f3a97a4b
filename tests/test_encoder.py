"""The encoder against the paper's equations, written once more with loops in float64; sizes, types and cost."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, ENCODER_SIZES, build_encoder, encoder_inputs
from evc_fast.testing.launches import Launches

pytestmark = pytest.mark.usefixtures("one_thread")

IMPLS = [None, "reference"]


# --- The paper's equations, one video at a time, one triplet at a time -----------------------------


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def attn(p: dict[str, Tensor], name: str, heads: int, query: Tensor, memory: Tensor) -> tuple[Tensor, list[Tensor]]:
    q = linear(p, f"{name}.q_proj", query)
    k, v = linear(p, f"{name}.k_proj", memory), linear(p, f"{name}.v_proj", memory)
    width = q.shape[-1] // heads
    context, weights = [], []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        a = softmax(q[:, part] @ k[:, part].T / math.sqrt(width))
        weights.append(a)
        context.append(a @ v[:, part])
    return linear(p, f"{name}.o_proj", torch.cat(context, -1)), weights


def calibrate(c: FaceNetConfig, t: Tensor, sim: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k = t.shape[0]
    alpha, theta, t_bar = torch.zeros(k, 3).to(t), torch.zeros(k).to(t), []
    s = sim.clamp(min=1e-6)
    p = [sum(s[j] for j in range(k) if groups[j] == groups[i]) / s.sum() for i in range(k)]  # (14)
    p_log_p = [x * torch.log(x) for x in p]
    for i in range(k):
        prob = [softmax(t[i, part]) for part in range(3)]  # (10)
        entropy = [-(x * x.log()).sum() for x in prob]  # (11)
        a = [entropy[part] / sum(entropy) if c.self_refine else t.new_tensor(1 / 3) for part in range(3)]  # (12)
        uniform = not c.cross_refine or k == 1 or len(set(groups.tolist())) == 1
        th = t.new_tensor(1 / k) if uniform else p_log_p[i] / sum(p_log_p)  # (15)
        t_bar.append(torch.stack([th * a[part] * t[i, part] for part in range(3)]))  # (13), (16)
        alpha[i], theta[i] = torch.stack(a).detach(), th.detach()
    return torch.stack(t_bar), alpha, theta


def paper(encoder: FaceNetEncoder, video: Tensor, t: Tensor | None, sim: Tensor | None, groups: Tensor | None):
    """Equations (10)-(29) for one video [N, D_v], t [K, 3, D_t], sim [K], groups [K]."""
    c, p = encoder.config, dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    heads, n = c.num_heads, video.shape[0]
    k = c.num_triplets if c.retrieval else 1
    v = linear(p, "video_projection", video) if c.video_dim != c.dim else video
    alpha = theta = t_bar = None
    if c.retrieval:
        ids = groups if c.merge_identical_triplets else torch.arange(k)
        t_bar, alpha, theta = calibrate(c, t, sim, ids)

    def fact(i: int, query: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.zeros_like(v)
        first = p["ffn.0.weight"]
        if c.retrieval:
            h, _ = attn(p, "fact_attention", heads, query, linear(p, "triplet_projection", t_bar[i]))  # (17)
        else:
            first = torch.cat([first, torch.ones_like(first)], 1)  # what stands there is silent: H = 0
        x = torch.cat([v, h], -1) @ first.T + p["ffn.0.bias"]
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        x = linear(p, "ffn.3", x) + query
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return h, (x - mean) / torch.sqrt(var + 1e-5) * p["fact_norm.weight"] + p["fact_norm.bias"]  # (18)

    def emotion(query: Tensor) -> tuple[Tensor, Tensor]:
        e_tilde, weights = attn(p, "emotion_attention", heads, query, p["emotion_features"])  # (19)
        q = softmax(linear(p, "phi_f", query) @ linear(p, "phi_v", v).T)  # (20)
        words = sum(q @ a for a in weights).mean(0) / heads
        return q @ linear(p, "phi_e", e_tilde), words  # (21)

    hs, fs, es, words = [], [], [], []
    for i in range(k):
        if c.order == "emotion_first":
            e, word = emotion(v)
            h, f = fact(i, e)
        else:
            h, f = fact(i, v)
            e, word = emotion(f) if c.emotion_augmentation else (None, None)
        hs, fs, es, words = [*hs, h], [*fs, f], [*es, e], [*words, word]

    g = v.new_full((n, k), 1 / k)
    if c.bias_adjustment and k > 1:
        router = p["router.weight"].T
        frames = [h.mean(0, keepdim=True).expand_as(h) for h in hs] if c.router == "video" else hs
        g = softmax(torch.cat(frames, -1) @ router)  # (26)
    fact_sum = sum(g[:, i : i + 1] * fs[i] for i in range(k))
    f_bar = torch.stack(fs).mean(0)  # (22)
    b_f, b_e, logits = torch.ones_like(v[0]), None, None
    if c.emotion_augmentation:
        e_bar = torch.stack(es).mean(0)  # (23)
        b_e = torch.ones_like(v[0])
        if c.bias_adjustment:
            both = torch.cat([f_bar, e_bar], -1)
            b_f = torch.tanh(linear(p, "fact_gate", both).mean(0))  # (24)
            b_e = torch.tanh(linear(p, "emotion_gate", both).mean(0))  # (25)
        emotion_sum = sum(g[:, i : i + 1] * es[i] for i in range(k))
        logits = linear(p, "emotion_head", emotion_sum.mean(0))
        m = torch.cat([b_f * fact_sum, b_e * emotion_sum])  # (27)
    else:
        if c.bias_adjustment:
            b_f = torch.tanh(linear(p, "fact_gate", f_bar).mean(0))
        m = b_f * fact_sum
    q = p["qformer.queries"][0]
    q = attn(p, "qformer.self_attention", heads, q, q)[0] + q  # (28)
    read, _ = attn(p, "qformer.cross_attention", heads, q, torch.cat([m, v]))
    tokens = linear(p, "qformer.output_projection", read + q)  # (29)
    return SimpleNamespace(
        tokens=tokens,
        emotion_logits=logits,
        component_weights=alpha,
        triplet_weights=theta,
        routing_weights=g,
        emotion_distribution=torch.stack(words) if c.emotion_augmentation else None,
        fact_gate=b_f,
        emotion_gate=b_e,
    )


def paper_batch(encoder: FaceNetEncoder, arguments: list[Tensor | None]) -> SimpleNamespace:
    rows = [paper(encoder, *(None if x is None else x[b] for x in arguments)) for b in range(arguments[0].shape[0])]
    columns = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
    return SimpleNamespace(**{k: None if v[0] is None else torch.stack(v) for k, v in columns.items()})


def assert_equal_or_both_none(got: Tensor | None, want: Tensor | None, name: str) -> None:
    assert (got is None) == (want is None), name
    if want is not None:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")


# --- The function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("k", "n", "w"), ENCODER_SIZES)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_forward_is_the_papers(options, k, n, w, impl):
    encoder = build_encoder(k=k, n=n, w=w, **options)
    arguments = encoder_inputs(encoder.config)
    with torch.no_grad():
        output = encoder(*arguments, explain=True, impl=impl)
        want = paper_batch(encoder, arguments)
    assert output.tokens.shape == (2, 6, encoder.config.output_dim)
    got = output._asdict() | output.explanation._asdict()
    for name, expected in vars(want).items():
        assert_equal_or_both_none(got[name], expected, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_gradients_are_the_papers_and_reach_every_parameter(options, impl):
    encoder = build_encoder(k=3, n=4, w=5, **options)
    arguments = encoder_inputs(encoder.config)
    leaves = [x.requires_grad_() for x in arguments if x is not None and x.is_floating_point()]
    leaves += list(encoder.parameters())
    names = ["video", "triplets", "similarity"][: len(leaves) - len(list(encoder.parameters()))]
    names += [name for name, _ in encoder.named_parameters()]

    def gradients(output) -> list[Tensor | None]:
        terms = [x for x in (output.tokens, output.emotion_logits) if x is not None]
        weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x) for x in terms]
        loss = sum((x * weight).sum() for x, weight in zip(terms, weights, strict=True))
        return list(torch.autograd.grad(loss, leaves, allow_unused=True))

    got = gradients(encoder(*arguments, impl=impl))
    want = gradients(paper_batch(encoder, arguments))
    for name, mine, expected in zip(names, got, want, strict=True):
        if name == "similarity" and not encoder.config.cross_refine:  # theta = 1/K: similarity has no say
            assert mine is None or not mine.any()
            continue
        assert mine is not None, f"{name} takes no part"
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        # Softmax ignores what is added to a whole row: biases of keys, and of phi_V, which is a key, have no gradient.
        if not name.endswith("k_proj.bias") and name != "phi_v.bias":
            assert mine.abs().max() > 1e-8, f"no gradient reaches {name}"


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_a_row_does_not_depend_on_its_batch(options):
    encoder = build_encoder(**options)
    arguments = encoder_inputs(encoder.config, batch=4)
    with torch.no_grad():
        together = encoder(*arguments)
        for b in range(4):
            alone = encoder(*(None if x is None else x[b : b + 1] for x in arguments))
            torch.testing.assert_close(alone.tokens[0], together.tokens[b], rtol=1e-10, atol=1e-11)
            if alone.emotion_logits is not None:
                torch.testing.assert_close(alone.emotion_logits[0], together.emotion_logits[b], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("options", ["paper", "router_video", "merge_identical_triplets", "emotion_first"])
def test_order_of_the_triplets_matters_only_to_the_router(options):
    """W_g knows the order of [H_1 ; ... ; H_K]: permuting it with the triplets, in rows and columns, is nothing."""
    encoder = build_encoder(k=4, **ENCODER_OPTIONS[options])
    video, triplets, similarity, groups = encoder_inputs(encoder.config)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        before = encoder(video, triplets, similarity, groups, explain=True)
        permuted = triplets[:, order], similarity[:, order], None if groups is None else groups[:, order]
        unmoved_router = encoder(video, *permuted)
        w_g = encoder.router.weight.view(4, 4, -1)
        encoder.router.weight.copy_(w_g[order][:, order].flatten(1))
        after = encoder(video, *permuted, explain=True)
    torch.testing.assert_close(after.tokens, before.tokens, rtol=1e-10, atol=1e-11)
    now, then = after.explanation, before.explanation
    torch.testing.assert_close(now.routing_weights, then.routing_weights[..., order])
    torch.testing.assert_close(now.emotion_distribution, then.emotion_distribution[:, order])
    assert (unmoved_router.tokens - before.tokens).abs().max() > 1e-6


def test_without_a_router_the_order_of_the_triplets_does_not_matter():
    encoder = build_encoder(k=4, bias_adjustment=False)
    video, triplets, similarity, _ = encoder_inputs(encoder.config)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        before = encoder(video, triplets, similarity)
        after = encoder(video, triplets[:, order], similarity[:, order])
    torch.testing.assert_close(after.tokens, before.tokens, rtol=1e-10, atol=1e-11)


def test_groups_count_only_where_identical_triplets_are_merged():
    plain, merging = build_encoder(), build_encoder(merge_identical_triplets=True)
    merging.load_state_dict(plain.state_dict())
    video, triplets, similarity, groups = encoder_inputs(merging.config)
    groups[0] = torch.tensor([5, 5, 9])
    with torch.no_grad():
        distinct = plain(video, triplets, similarity, groups).tokens
        assert torch.equal(distinct, plain(video, triplets, similarity).tokens)
        assert (merging(video, triplets, similarity, groups).tokens - distinct)[0].abs().max() > 1e-6


# --- Sizes, types, modes ---------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_empty_batch(options, impl):
    encoder = build_encoder(**options).float()
    arguments = encoder_inputs(encoder.config, batch=0, dtype=torch.float32)
    output = encoder(*arguments, explain=True, impl=impl)
    assert output.tokens.shape == (0, 6, encoder.config.output_dim)
    assert output.explanation.routing_weights.shape == (0, 5, encoder.config.num_groups)
    if encoder.config.emotion_augmentation:
        assert output.emotion_logits.shape == (0, 7)
        assert output.explanation.emotion_distribution.shape == (0, encoder.config.num_groups, 7)
    output.tokens.sum().backward()
    assert not encoder.qformer.cross_attention.k_proj.weight.grad.any()


def test_frames_may_differ_in_number_from_the_configuration():
    encoder = build_encoder(n=5)
    video, triplets, similarity, _ = encoder_inputs(encoder.config)
    with torch.no_grad():
        got = encoder(video[:, :2], triplets, similarity).tokens
        want = paper_batch(encoder, [video[:, :2], triplets, similarity, None]).tokens
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_float32_and_bfloat16_are_close_to_float64(options, impl):
    encoder = build_encoder(**options)
    arguments = encoder_inputs(encoder.config)
    with torch.no_grad():
        want = encoder(*arguments, impl="reference").tokens
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 0.06)):
            encoder.to(dtype)
            output = encoder(*encoder_inputs(encoder.config, dtype=dtype), explain=True, impl=impl)
            assert output.tokens.dtype == dtype
            assert output.explanation.routing_weights.dtype == torch.float32
            assert (output.tokens.double() - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_autocast(options, impl):
    encoder = build_encoder(**options).float()
    arguments = encoder_inputs(encoder.config, dtype=torch.float32)
    want = encoder(*arguments, impl="reference").tokens
    mixed = [x.bfloat16() if x is not None and x.is_floating_point() and x.dim() == 4 else x for x in arguments]
    with torch.autocast("cpu", torch.bfloat16):
        output = encoder(*arguments, explain=True, impl=impl)
        from_mixed = encoder(*mixed, impl=impl).tokens
    assert output.tokens.dtype == torch.bfloat16
    for tokens in (output.tokens, from_mixed):
        assert (tokens.float() - want).abs().max() < 0.06 * want.abs().max()
    output.tokens.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in encoder.named_parameters() if "head" not in n)


def test_similarity_may_have_any_floating_type():
    encoder = build_encoder()
    video, triplets, similarity, _ = encoder_inputs(encoder.config)
    with torch.no_grad():
        want = encoder(video, triplets, similarity).tokens
        got = encoder(video, triplets, similarity.float()).tokens
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only():
    encoder = build_encoder(dropout=0.5)
    arguments = encoder_inputs(encoder.config)
    with torch.no_grad():
        assert torch.equal(encoder(*arguments).tokens, encoder(*arguments).tokens)
        encoder.train()
        assert not torch.equal(encoder(*arguments).tokens, encoder(*arguments).tokens)


def test_inference_mode():
    encoder = build_encoder()
    arguments = encoder_inputs(encoder.config)
    with torch.inference_mode():
        inferred = encoder(*arguments, explain=True)
    torch.testing.assert_close(inferred.tokens.clone(), encoder(*arguments).tokens.detach(), rtol=1e-12, atol=1e-12)


# --- Explanation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_explanation_is_on_request_and_its_shares_sum_to_one(options):
    encoder = build_encoder(k=3, **options)
    arguments = encoder_inputs(encoder.config)
    assert encoder(*arguments).explanation is None
    explanation = encoder(*arguments, explain=True).explanation
    c, k = encoder.config, encoder.config.num_groups
    shapes = {
        "component_weights": (2, k, 3) if c.retrieval else None,
        "triplet_weights": (2, k) if c.retrieval else None,
        "routing_weights": (2, 5, k),
        "emotion_distribution": (2, k, 7) if c.emotion_augmentation else None,
        "fact_gate": (2, 16),
        "emotion_gate": (2, 16) if c.emotion_augmentation else None,
    }
    for name, value in explanation._asdict().items():
        assert (None if value is None else tuple(value.shape)) == shapes[name], name
        if value is None:
            continue
        assert not value.requires_grad, name
        if "gate" in name:
            assert (value == 1).all() if not c.bias_adjustment else (value.abs() < 1).all()
        elif not (name == "triplet_weights" and c.merge_identical_triplets):
            torch.testing.assert_close(value.sum(-1), torch.ones_like(value.sum(-1)))


# --- Cost ------------------------------------------------------------------------------------------


def default_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 16, 512), torch.randn(batch, 4, 3, 512), torch.rand(batch, 4)


def test_parameter_count_at_the_defaults():
    """4.15 M, spelled out: what each equation's weights hold at d = 300, D_v = D_t = 512, d_out = 2048."""
    d = 300
    attention = 4 * (d * d + d)
    want = (
        (512 * d + d)  # D_v -> d
        + 512 * d  # W_T
        + (2 * d * 4 * d + 4 * d) + (4 * d * d + d) + 2 * d  # FFN and LayerNorm of (18)
        + 4 * attention  # Attn_f, Attn_c, Attn_q, Attn_d
        + 3 * (d * d + d)  # phi_F, phi_V, phi_E
        + 4 * d * 4  # W_g
        + 2 * (2 * d * d + d)  # U, R, b of (24), (25)
        + (d * 179 + 179)  # classification head
        + 32 * d  # queries
        + (d * 2048 + 2048)  # phi_M
    )  # fmt: skip
    encoder = FaceNetEncoder(FaceNetConfig())
    assert sum(p.numel() for p in encoder.parameters()) == want == 4_150_627
    assert [name for name, _ in encoder.named_buffers()] == ["emotion_features"]


def test_flops_of_one_video_at_the_defaults():
    encoder = FaceNetEncoder(FaceNetConfig()).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder(*default_inputs(1), impl="reference")
    assert 0.37e9 < counter.get_total_flops() < 0.42e9


@pytest.mark.parametrize("batch", [1, 32])
def test_straight_encoder_is_at_most_120_launches(batch):
    """Operations that compute, with the ops' references and the attentions' fused kernels; views launch nothing."""
    encoder = FaceNetEncoder(FaceNetConfig()).eval()
    arguments = default_inputs(batch)
    with Launches() as launches, torch.no_grad():
        encoder(*arguments, impl="reference")
    assert 60 < len(launches.launches) <= 120, Counter(launch.name for launch in launches.launches)
