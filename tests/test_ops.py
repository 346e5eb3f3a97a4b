"""Every op, type, layout and case: values and gradients against float64, as good as plain PyTorch in the same type."""

from __future__ import annotations

import pytest
import torch

from evc_fast.ops import dispatch
from evc_fast.testing.cases import CASES, DIFFERENTIABLE, LAYOUTS, Case, benchmark_case, cases
from evc_fast.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_good_as_plain, plain_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
KERNELS = ["cpp"] if dispatch.implementations(dispatch.OPS[0])[0].available else []
IMPLEMENTATIONS = ["reference", *KERNELS]
BY_ID = {"argvalues": CASES, "ids": [case.id for case in CASES]}
SMALL = {"argvalues": [c for c in CASES if c.name in ("odd", "tiny", "groups")], "ids": lambda c: c.id}


def leaves(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.requires_grad_(t.is_floating_point()) for t in tensors]


def values_and_gradients(case: Case, tensors, gradients, run) -> list[torch.Tensor]:
    """Outputs, then gradients of the floating inputs, for given gradients of the differentiable outputs."""
    tensors = leaves([t.detach() for t in tensors])
    outputs = run(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    given = [g.to(o.dtype) for g, o in zip(gradients, case.differentiable(outputs), strict=True)]
    return [*outputs, *torch.autograd.grad(case.differentiable(outputs), wanted, given, materialize_grads=True)]


def output_gradients(case: Case, tensors, dtype, layout="contiguous") -> list[torch.Tensor]:
    outputs = case.differentiable(case.plain(*tensors))
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(o.shape, generator=generator).to(dtype) for o in outputs]
    if layout == "expanded":  # what .sum().backward() sends: one number behind strides of 0
        return [torch.ones((), dtype=dtype).expand(o.shape) for o in outputs]
    if layout == "transposed":
        return [g.transpose(0, -1).contiguous().transpose(0, -1) for g in drawn]
    if layout == "sliced":
        return [torch.stack([g, g], -1)[..., 0] for g in drawn]
    return drawn


def check_against_plain(case: Case, dtype, impl, layout="contiguous", gradient_layout="contiguous") -> None:
    rounded = plain_dtype(dtype)
    tensors = case.inputs(rounded, layout)
    gradients = output_gradients(case, tensors, rounded, gradient_layout)
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    exact_gradients = [g.double() for g in gradients]
    oracle = values_and_gradients(case, exact, exact_gradients, case.plain)
    plain = values_and_gradients(case, tensors, gradients, case.plain)
    given = (exact, exact_gradients) if dtype == torch.float64 else (tensors, gradients)
    actual = values_and_gradients(case, *given, lambda *t: case.call(*t, impl=impl))
    outputs = len(DIFFERENTIABLE[case.op])
    for i, (a, p, o) in enumerate(zip(actual, plain, oracle, strict=True)):
        what = f"output {i}" if i < outputs else f"gradient of input {i - outputs}"
        assert torch.isfinite(a).all() or not torch.isfinite(o).all(), f"{what} is not finite"
        assert_as_good_as_plain(a, p, o, FORWARD_FACTOR if i < outputs else GRADIENT_FACTOR, what)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **BY_ID)
def test_values_and_gradients(case, dtype, impl):
    check_against_plain(case, dtype, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", **SMALL)
def test_strided_inputs_and_gradients(case, layout, impl):
    for dtype in (torch.float32, torch.bfloat16):
        check_against_plain(case, dtype, impl, layout=layout)
        check_against_plain(case, dtype, impl, gradient_layout=layout)


@pytest.mark.parametrize("case", **BY_ID)
def test_reference_is_finite_and_keeps_half_precision_types(case):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        if dtype == torch.float16 and "1e4" in case.name:
            continue  # 1e4-sized features of several sigmas leave float16's range before the op starts
        outputs = case.call(*case.inputs(dtype), impl="reference")
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        for output, differentiable in zip(outputs, DIFFERENTIABLE[case.op], strict=True):
            assert output.dtype == (dtype if differentiable else accumulate)
            assert torch.isfinite(output).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("tiny", "narrow", "groups", "chunks", "one-frame")], ids=lambda c: c.id
)
def test_gradcheck(case, impl):
    tensors = leaves(case.inputs(torch.float64))
    assert torch.autograd.gradcheck(lambda *t: case.differentiable(case.call(*t, impl=impl)), tensors, fast_mode=True)


# ---- what the numbers must be, by hand ----


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_entropy_weights_by_hand(impl):
    case = Case("entropy_calibration", "hand", {})
    triplets = torch.zeros(1, 2, 3, 4)  # uniform: every entropy is log 4
    triplets[0, 1, 0] = torch.tensor([1e4, 0, 0, 0])  # certain: entropy 0
    similarity = torch.tensor([[0.2, 0.6]])  # p = 1/4, 3/4
    _, alpha, theta = case.call(triplets, similarity, impl=impl)
    torch.testing.assert_close(alpha, torch.tensor([[[1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5]]]))
    p = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(theta[0], p * p.log() / (p * p.log()).sum())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_groups_share_their_mass_and_one_group_weighs_all_alike(impl):
    case = Case("entropy_calibration", "hand", {})
    triplets, similarity = torch.randn(1, 3, 3, 5), torch.tensor([[0.1, 0.3, 0.6]])
    theta = case.call(triplets, similarity, torch.tensor([[7, 7, 9]]), impl=impl)[2]
    p = torch.tensor([0.4, 0.4, 0.6])
    torch.testing.assert_close(theta[0], p * p.log() / (p * p.log()).sum())
    similarity.requires_grad_()
    calibrated, _, theta = case.call(triplets, similarity, torch.tensor([[5, 5, 5]]), impl=impl)
    torch.testing.assert_close(theta, torch.full((1, 3), 1 / 3))
    assert not torch.autograd.grad(calibrated.sum(), similarity)[0].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gate_over_one_frame_is_plain_attention(impl):
    (case,) = [c for c in cases("emotion_attention") if c.name == "one-frame"]
    query, key, value, gate_query, gate_key = case.inputs(torch.float64)
    heads = case.options["num_heads"]
    split = [t.unflatten(-1, (heads, -1)) for t in (query.flatten(0, 2), key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*[t.transpose(0, 1)[None] for t in split])
    actual = case.call(query, key, value, gate_query, gate_key, impl=impl)[0]
    torch.testing.assert_close(actual.flatten(0, 2), expected[0].transpose(0, 1).flatten(1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_routing_weights_select_and_pooling_averages(impl):
    facts, emotions = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    logits = torch.zeros(2, 4, 3)
    logits[..., 1] = 1e4
    routed, pooled, weights = Case("routing_aggregation", "hand", {}).call(facts, emotions, logits, impl=impl)
    assert torch.equal(routed, torch.cat([facts[:, 1], emotions[:, 1]], 1))
    assert torch.equal(weights, torch.tensor([0.0, 1, 0]).expand(2, 4, 3))
    torch.testing.assert_close(pooled, torch.cat([facts.mean((1, 2)), emotions.mean((1, 2))], 1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_nan_propagates(op, impl):
    case = Case(op, "nan", cases(op)[0].sizes, cases(op)[0].options)
    for i in range(len(case.inputs())):
        tensors = case.inputs()
        tensors[i].view(-1)[0] = torch.nan
        assert case.call(*tensors, impl=impl)[0].isnan().any(), f"input {i}"


# ---- determinism ----


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("impl", KERNELS)
def test_same_bits_at_any_thread_count_and_batch_position(op, impl):
    case = benchmark_case(op, 9)
    tensors = case.inputs()
    gradients = output_gradients(case, tensors, torch.float32)
    run = lambda *t: case.call(*t, impl=impl)  # noqa: E731
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(values_and_gradients(case, tensors, gradients, run))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    shared = {1, 2} if op == "emotion_attention" else set()  # the dictionary has no batch
    alone = run(*[t if i in shared else t[7:8] for i, t in enumerate(tensors)])
    assert all(torch.equal(a[0], b[7]) for a, b in zip(alone, results[0][: len(alone)], strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("paper", "odd", "many-frames")], ids=lambda c: c.id)
def test_every_output_element_is_written(case):
    torch.use_deterministic_algorithms(True)  # PyTorch then fills fresh buffers with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        tensors = case.inputs()
        results = values_and_gradients(case, tensors, output_gradients(case, tensors, torch.float32), case.call)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(r).all() for r in results)
