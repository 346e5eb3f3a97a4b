"""What needs a GPU: the kernels' values and gradients, and their place inside PyTorch on CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evc_fast.ops import _cuda, _triton, dispatch
from evc_fast.testing.cases import CASES, DIFFERENTIABLE, LAYOUTS, Case, benchmark_case
from evc_fast.testing.tolerances import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_good_as_plain, largest_error

sys.path.insert(0, str(Path(__file__).parent))
from on_gpu import BACKEND, DTYPES, ON, REHEARSAL, Recorder, cuda_alone, here, moved, needs_cuda, opcheck

pytestmark = needs_cuda

KERNELS = {"triton": _triton.OPS, "cuda": tuple(op for op in _cuda.OPS if op in dispatch.OPS)}
CALLS = [(impl, case) for impl, served in KERNELS.items() for case in CASES if case.op in served]
SMALL = [(impl, case) for impl, case in CALLS if case.name in ("odd", "tiny", "groups")]
PAPER = [(impl, benchmark_case(op, 2)) for impl, served in KERNELS.items() for op in served]


def with_ids(calls: list[tuple[str, Case]]) -> dict:
    return {"argvalues": calls, "ids": [f"{impl}-{case.id}" for impl, case in calls]}


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def step(case: Case, run: Callable, tensors: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of the floating inputs."""
    inputs = leaves(tensors)
    outputs = run(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    given = [g.to(o.dtype) for g, o in zip(gradients, case.differentiable(outputs), strict=True)]
    return [*outputs, *torch.autograd.grad(case.differentiable(outputs), wanted, given, materialize_grads=True)]


def output_gradients(case: Case, dtype: torch.dtype, layout: str = "contiguous") -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randn(o.shape, generator=g).to(dtype) for o in case.differentiable(case.plain(*case.inputs()))]
    if layout == "expanded":  # what .sum().backward() sends
        return [torch.ones((), dtype=dtype).expand(x.shape) for x in drawn]
    if layout == "transposed":
        return [x.transpose(0, -1).contiguous().transpose(0, -1) for x in drawn]
    if layout == "sliced":
        return [torch.stack([x, x], -1)[..., 0] for x in drawn]
    return drawn


def check(
    case: Case, dtype: torch.dtype, impl: str, layout: str = "contiguous", gradient_layout: str = "contiguous"
) -> None:
    """Outputs, and gradients where the implementation has them, as good as plain PyTorch's in the same type."""
    tensors = case.inputs(dtype, layout)
    run = lambda *t: case.call(*t, impl=here(impl, dtype))  # noqa: E731
    exact = [t.double() if t.is_floating_point() else t for t in tensors]
    if impl == "cuda":
        with torch.no_grad():
            results = [case.plain(*exact), case.plain(*tensors), run(*map(moved, tensors))]
    else:
        gradients = output_gradients(case, dtype, gradient_layout)
        results = [
            step(case, case.plain, exact, [g.double() for g in gradients]),
            step(case, case.plain, tensors, gradients),
            step(case, run, [moved(t) for t in tensors], [moved(g) for g in gradients]),
        ]
    outputs = len(DIFFERENTIABLE[case.op])
    for i, (oracle, plain, actual) in enumerate(zip(*results, strict=True)):
        what = f"output {i}" if i < outputs else f"gradient of input {i - outputs}"
        actual = actual.cpu()
        assert torch.isfinite(actual).all() or not torch.isfinite(plain).all(), f"{what} is not finite"
        assert_as_good_as_plain(actual, plain, oracle, FORWARD_FACTOR if i < outputs else GRADIENT_FACTOR, what)


# ---- the ops ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "case"), **with_ids(CALLS))
def test_values_and_gradients(impl, case, dtype):
    if dtype == torch.float16 and "1e4" in case.name:
        pytest.skip("its features leave float16's range before the op starts")
    check(case, dtype, impl)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(("impl", "case"), **with_ids(SMALL))
def test_strided_inputs_and_gradients(impl, case, layout):
    for dtype in DTYPES[:2]:
        check(case, dtype, impl, layout=layout)
        if impl != "cuda":
            check(case, dtype, impl, gradient_layout=layout)


@pytest.mark.parametrize(("impl", "case"), **with_ids(PAPER))
def test_float32_is_computed_in_float32(impl, case):
    """tf32 would lose three of its seven digits."""
    if not REHEARSAL:
        assert not torch.backends.cuda.matmul.allow_tf32, "evc_fast must leave PyTorch's setting alone"
    tensors = case.inputs()
    oracle = case.plain(*(t.double() for t in tensors))
    with torch.no_grad():
        found = case.call(*map(moved, tensors), impl=here(impl))
    for a, o in zip(found, oracle, strict=True):
        assert largest_error(a.cpu(), o) <= 2e-5 * o.abs().max()


@pytest.mark.parametrize(("impl", "case"), **with_ids(PAPER))
def test_same_bits_twice_and_every_element_written(impl, case):
    """The dictionary's gradients too, which the whole batch adds to; fresh memory is filled with NaN."""
    tensors = [moved(t) for t in benchmark_case(case.op, 33).inputs(torch.bfloat16)]
    run = lambda *t: case.call(*t, impl=here(impl, torch.bfloat16))  # noqa: E731
    gradients = [torch.ones_like(o) for o in case.differentiable(case.plain(*tensors))]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = []
        for _ in range(2):
            if impl == "cuda":
                with torch.no_grad():
                    results.append(list(run(*tensors)))
            else:
                results.append(step(case, run, tensors, gradients))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@pytest.mark.parametrize(("impl", "case"), **with_ids(SMALL))
def test_opcheck(impl, case):
    tensors = [moved(t) for t in case.inputs(torch.bfloat16)]
    gradients = [moved(g) for g in output_gradients(case, torch.bfloat16)]
    run = lambda *t: case.call(*t, impl=here(impl, torch.bfloat16))  # noqa: E731
    trained = impl != "cuda" or REHEARSAL
    with Recorder() as recorder:
        if trained:
            step(case, run, tensors, gradients)
        else:
            with torch.no_grad():
                run(*tensors)
    names = opcheck(recorder.calls, trained=trained)
    expected = {f"{case.op}_forward", f"{case.op}_backward"} if trained else {f"{case.op}_inference"}
    assert names == expected


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("impl", "case"), **with_ids(PAPER))
def test_autocast_casts_storage(impl, case, low):
    kept = {"entropy_calibration": {1}, "routing_aggregation": {2}}.get(case.op, set())  # similarity and logits
    tensors = [moved(t) for t in case.inputs()]
    cast = [t if i in kept else t.to(low) for i, t in enumerate(tensors)]
    with torch.no_grad():
        expected = case.call(*cast, impl=here(impl, low))
        with torch.autocast(ON, low):
            outputs = case.call(*tensors, impl=here(impl, low))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted)
    assert outputs[0].dtype == low


@cuda_alone
@pytest.mark.parametrize(("impl", "case"), **with_ids(PAPER))
def test_the_current_stream_is_used_and_never_waited_for(impl, case):
    tensors = [moved(t) for t in case.inputs()]
    gradients = [moved(g) for g in output_gradients(case, torch.float32)]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        if impl == "cuda":
            return list(case.call(*inputs, impl=impl))
        return step(case, lambda *t: case.call(*t, impl=impl), inputs, gradients)

    expected = run(tensors)
    late = [torch.full_like(t, torch.nan) for t in tensors]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads NaN
        for held, new in zip(late, tensors, strict=True):
            held.copy_(new)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = run(late)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert all(map(torch.equal, outputs, expected))


@cuda_alone
@pytest.mark.parametrize("op", _triton.OPS)
def test_a_graph_replays_forward_and_backward(op):
    case = benchmark_case(op, 2)
    held = [moved(t) for t in case.inputs()]
    gradients = [moved(g) for g in output_gradients(case, torch.float32)]
    run = lambda: step(case, lambda *t: case.call(*t, impl="triton"), held, gradients)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for tensor, new in zip(held, case.inputs(seed=5), strict=True):
        tensor.copy_(new)
    graph.replay()
    for actual, wanted in zip(outputs, run(), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("op", _triton.OPS)
def test_compile_without_breaks(op):
    torch._dynamo.reset()
    case = benchmark_case(op, 3)
    tensors = [moved(t) for t in case.inputs()]
    gradients = [moved(g) for g in output_gradients(case, torch.float32)]
    compiled = torch.compile(case.call, fullgraph=True, backend=BACKEND)
    for actual, wanted in zip(
        step(case, compiled, tensors, gradients), step(case, case.call, tensors, gradients), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@cuda_alone
def test_what_kernels_do_not_take_is_refused_by_name():
    case = benchmark_case("routing_aggregation", 1)
    doubles = [moved(t) for t in case.inputs(torch.float64)]
    for impl in ("triton", "cuda"):
        with pytest.raises(RuntimeError, match=f'impl="{impl}" cannot run: it takes float32, bfloat16 and float16'):
            case.call(*doubles, impl=impl)
    assert case.call(*doubles)[0].dtype == torch.float64  # the reference serves
    with pytest.raises(RuntimeError, match='impl="cpp" cannot run: it serves CPU tensors'):
        case.call(*map(moved, case.inputs()), impl="cpp")
    with pytest.raises(RuntimeError, match=r'impl="cuda" cannot run: it has no gradients'):
        case.call(*leaves([moved(t) for t in case.inputs()]), impl="cuda")


@cuda_alone
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("op", ["emotion_attention", "routing_aggregation"])
def test_more_than_2_to_31_elements(op, impl):
    """Offsets of 32 bits would wrap: the last video of very many is computed as it is alone."""
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of free GPU memory")
    alone = [moved(t) for t in benchmark_case(op, 1).inputs(torch.bfloat16)]
    shared = {1, 2} if op == "emotion_attention" else set()
    batch = 2**31 // alone[0].numel() + 2
    many = [
        t if i in shared else torch.zeros(batch, *t.shape[1:], dtype=t.dtype, device=ON) for i, t in enumerate(alone)
    ]
    for i, (held, last) in enumerate(zip(many, alone, strict=True)):
        if i not in shared:
            held[-1:] = last
    case = benchmark_case(op, batch)
    with torch.no_grad():
        for actual, wanted in zip(case.call(*many, impl=impl), case.call(*alone, impl=impl), strict=True):
            torch.testing.assert_close(actual[-1:], wanted)
