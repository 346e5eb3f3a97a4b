"""The ops inside PyTorch: opcheck, compile, export, autocast, grad modes, FLOP counting, and every error message."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evc_fast import ops
from evc_fast.ops import dispatch
from evc_fast.testing.cases import CASES, DIFFERENTIABLE, Case, benchmark_case, cases

HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
IMPLEMENTATIONS = ["reference", "cpp"] if HAS_CPP else ["reference"]
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: there are no compiled ops")


def forward_arguments(case: Case, tensors) -> tuple:
    if case.op == "entropy_calibration":
        groups = tensors[2] if len(tensors) > 2 else None
        return *tensors[:2], groups, case.options.get("self_refine", True), case.options.get("cross_refine", True)
    if case.op == "emotion_attention":
        return *tensors, case.options["num_heads"], False
    return tuple(tensors)


def backward_arguments(case: Case, tensors) -> tuple:
    if case.op == "entropy_calibration":
        return torch.randn_like(tensors[0]), *forward_arguments(case, tensors)
    if case.op == "emotion_attention":
        return torch.randn_like(tensors[0]), *tensors, torch.randn_like(tensors[0]), case.options["num_heads"]
    if case.op == "factored_hidden":
        return torch.randn_like(case.call(*tensors)[0]), *tensors
    routed, pooled, weights = case.call(*tensors)
    return torch.randn_like(routed), torch.randn_like(pooled), *tensors[:2], weights


@needs_cpp
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("odd", "groups", "empty", "tiny")], ids=lambda c: c.id)
def test_opcheck(case):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.inputs(dtype)
        if case.op in ("entropy_calibration", "routing_aggregation"):  # similarity and logits: the accumulation type
            last = 1 if case.op == "entropy_calibration" else 2
            tensors[last] = tensors[last].float()
        backward = backward_arguments(case, tensors)
        torch.library.opcheck(getattr(torch.ops.evc_fast, f"{case.op}_backward").default, backward)
        trainable = [t.requires_grad_(t.is_floating_point()) for t in tensors]
        torch.library.opcheck(
            getattr(torch.ops.evc_fast, f"{case.op}_forward").default, forward_arguments(case, trainable)
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_compile_without_breaks_or_needless_graphs(op, backend):
    torch._dynamo.reset()
    case = Case(
        op, "compile", {**benchmark_case(op, 1).sizes, "d": 24, "D": 24, "W": 19}, benchmark_case(op, 1).options
    )
    graphs = 0

    def call(*tensors):
        return case.differentiable(case.call(*tensors))

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(call, backend=counting, fullgraph=True, dynamic=None)
    for batch in (5, 3, 2, 7, 1, 4):
        sized = Case(op, "compile", {**case.sizes, "B": batch}, case.options)
        tensors = sized.inputs()
        for i, t in enumerate(tensors):
            if batch > 1 and not (op == "emotion_attention" and i in (1, 2)):  # the dictionary has no batch
                torch._dynamo.mark_dynamic(t, 0)
        expected_inputs = [t.detach().clone().requires_grad_() for t in tensors]
        actual_inputs = [t.requires_grad_() for t in tensors]
        expected, actual = call(*expected_inputs), compiled(*actual_inputs)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.randn_like(o) for o in expected]
        torch.autograd.backward(expected, gradients)
        torch.autograd.backward(actual, gradients)
        for a, e in zip(actual_inputs, expected_inputs, strict=True):
            torch.testing.assert_close(a.grad, e.grad)
    assert graphs <= 2, f"{graphs} graphs: one for B = 1 and one for all other batch sizes are expected"


class Module(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case

    def forward(self, *tensors):
        return self.case.call(*tensors)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_export_with_dynamic_batch(op):
    case = Case(op, "export", {**benchmark_case(op, 3).sizes, "d": 24, "D": 24, "W": 19}, benchmark_case(op, 3).options)
    tensors = case.inputs()
    batch = torch.export.Dim("batch", min=2)
    shared = {1, 2} if op == "emotion_attention" else set()
    shapes = tuple({} if i in shared else {0: batch} for i in range(len(tensors)))
    program = torch.export.export(Module(case), tuple(tensors), dynamic_shapes=(shapes,))
    other = Case(op, "export", {**case.sizes, "B": 5}, case.options).inputs(seed=3)
    for actual, expected in zip(program.module()(*other), case.call(*other), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_autocast_casts_storage_and_still_accumulates_in_float32(op, impl):
    case = cases(op)[0]
    tensors = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = case.call(*tensors, impl=impl)
    kept = {"entropy_calibration": {1}, "routing_aggregation": {2}}.get(op, set())  # similarity and logits stay float32
    low = [t if i in kept else t.bfloat16() for i, t in enumerate(tensors)]
    for actual, expected in zip(outputs, case.call(*low, impl=impl), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert case.differentiable(outputs)[0].dtype == torch.bfloat16
    mixed = [t.bfloat16() if i == len(tensors) - 1 and i not in kept else t for i, t in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):  # as layers leave them: a float32 norm beside a bfloat16 product
        assert torch.equal(case.call(*mixed, impl=impl)[0], outputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert case.call(*case.inputs(torch.float64), impl=impl)[0].dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", dispatch.OPS)
def test_grad_modes_agree_and_only_training_keeps_a_graph(op, impl):
    case = cases(op)[0]
    trained = case.call(*[t.requires_grad_() for t in case.inputs()], impl=impl)
    assert tuple(o.requires_grad for o in trained) == DIFFERENTIABLE[op]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            outputs = case.call(*[t.requires_grad_() for t in case.inputs()], impl=impl)
        for a, b in zip(outputs, trained, strict=True):
            assert not a.requires_grad
            assert torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize("op", dispatch.OPS)
def test_forward_mode_is_refused_rather_than_dropped(op):
    case = cases(op)[0]
    first, *rest = case.inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(first, torch.ones_like(first))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            case.call(dual, *rest, impl="cpp")
        tangent = torch.autograd.forward_ad.unpack_dual(case.call(dual, *rest, impl="reference")[0]).tangent
        assert tangent.any()


@needs_cpp
@pytest.mark.parametrize("op", dispatch.OPS)
def test_second_derivatives_are_refused(op):
    case = cases(op)[0]
    tensors = [t.requires_grad_() for t in case.inputs(torch.float64)]
    loss = sum(o.square().sum() for o in case.differentiable(case.call(*tensors, impl="cpp")))
    (gradient,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("op", dispatch.OPS)
def test_flops_are_those_of_the_reference(op):
    case = cases(op)[0]
    counted = []
    for impl in IMPLEMENTATIONS:
        with FlopCounterMode(display=False) as counter:
            case.call(*case.inputs(), impl=impl)
        counted.append(counter.get_total_flops())
    s = case.sizes
    products = 0
    if op == "emotion_attention":
        products = 4 * s["B"] * s["K"] * s["N"] * s["d"] * (s["W"] + s["N"])
    elif op == "factored_hidden":
        products = 2 * s["B"] * s["K"] * s["N"] * s["T"] * s["F"]
    assert counted == [products] * len(IMPLEMENTATIONS)


# ---- errors: each names the argument, what it is and what was expected ----

f = torch.randn
BAD = [
    (
        "entropy_calibration",
        (f(2, 4, 2, 8), f(2, 4)),
        ValueError,
        "triplets must be [B, K, 3, D]; got [2, 4, 2, 8]",
    ),
    (
        "entropy_calibration",
        (f(4, 3, 8), f(2, 4)),
        ValueError,
        "triplets must be [B, K, 3, D]; got [4, 3, 8] torch.float32",
    ),
    ("entropy_calibration", (f(2, 4, 3, 8), f(2, 5)), ValueError, "similarity must be [B, K] with K = 4; got [2, 5]"),
    ("entropy_calibration", (f(2, 4, 3, 8), f(2, 4).long()), TypeError, "similarity must have the type of triplets"),
    (
        "entropy_calibration",
        (f(2, 4, 3, 8), f(2, 4), f(2, 4)),
        TypeError,
        "groups must be int64; got [2, 4] torch.float32",
    ),
    ("entropy_calibration", (f(2, 4, 3, 8).int(), f(2, 4)), TypeError, "triplets must be float32, bfloat16, float16"),
    ("entropy_calibration", (f(2, 0, 3, 8), f(2, 0)), ValueError, "with K of 1 or more"),
    ("entropy_calibration", ([1.0], f(2, 4)), TypeError, "triplets must be a tensor [B, K, 3, D]; got list"),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 9), f(7, 8), f(2, 4, 5, 8), f(2, 5, 8), 2),
        ValueError,
        "key must be [W, d] with d = 8",
    ),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 8), f(6, 8), f(2, 4, 5, 8), f(2, 5, 8), 2),
        ValueError,
        "value must be [W, d] with W = 7",
    ),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 8), f(7, 8), f(2, 4, 5, 8), f(2, 6, 8), 2),
        ValueError,
        "gate_key must be [B, N, d] with N = 5",
    ),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 8), f(7, 8), f(2, 4, 5, 8), f(2, 5, 8), 3),
        ValueError,
        "num_heads must divide d; got 3",
    ),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 8), f(7, 8), f(2, 4, 5, 8), f(2, 5, 8), 0),
        ValueError,
        "num_heads must divide d; got 0",
    ),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 8).double(), f(7, 8), f(2, 4, 5, 8), f(2, 5, 8), 2),
        TypeError,
        "key must have the type of query, torch.float32",
    ),
    (
        "emotion_attention",
        (f(2, 4, 5, 8), f(7, 8, device="meta"), f(7, 8), f(2, 4, 5, 8), f(2, 5, 8), 2),
        ValueError,
        "key is on meta, query on cpu",
    ),
    (
        "routing_aggregation",
        (f(2, 3, 5, 8), f(2, 4, 5, 8), f(2, 5, 3)),
        ValueError,
        "emotions must be [B, K, N, d] with K = 3",
    ),
    (
        "routing_aggregation",
        (f(2, 3, 5, 8), f(2, 3, 5, 8), f(2, 3, 5)),
        ValueError,
        "logits must be [B, N, K] with N = 5",
    ),
    (
        "routing_aggregation",
        (f(2, 3, 5, 8), f(2, 3, 5, 8), f(2, 5, 3, device="meta")),
        ValueError,
        "logits is on meta, facts on cpu",
    ),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named_before_anything_runs(op, arguments, error, message):
    for impl in (None, *IMPLEMENTATIONS):
        with pytest.raises(error, match=re.escape(message)) as caught:
            getattr(ops, op)(*arguments, impl=impl)
        assert str(caught.value).startswith(f"{op}: ")


def below_the_contract() -> list:
    """Every tensor of the six ops: its arguments, and its place among them."""
    places = []
    for op in dispatch.OPS:
        (case,) = [c for c in cases(op) if c.name == ("groups" if op == "entropy_calibration" else "odd")]
        for direction in ("forward", "backward"):
            arguments = (forward_arguments if direction == "forward" else backward_arguments)(case, case.inputs())
            for i, argument in enumerate(arguments):
                if isinstance(argument, torch.Tensor):
                    places.append(pytest.param(f"{op}_{direction}", arguments, i, id=f"{op}_{direction}-{i}"))
    return places


@needs_cpp
@pytest.mark.parametrize(("name", "arguments", "i"), below_the_contract() if HAS_CPP else [])
def test_kernels_called_below_the_contract_check_their_memory(name, arguments, i):
    good = arguments[i]
    shorter = good[:, :-1]
    retyped = good.double() if good.is_floating_point() else good.int()
    for bad in (shorter, retyped, good[None], good.narrow(-1, 0, 0)):
        with pytest.raises(RuntimeError, match="evc_fast: "):
            getattr(torch.ops.evc_fast, name)(*arguments[:i], bad, *arguments[i + 1 :])


def test_arguments_that_are_no_tensors_are_named():
    query, words = f(1, 2, 3, 4), f(5, 4)
    for num_heads in (None, "2", 2.0, True):
        with pytest.raises(TypeError, match="emotion_attention: num_heads must be an int; got"):
            ops.emotion_attention(query, words, words, query, query[:, 0], num_heads)
    for flag in ("no", None, 1):
        with pytest.raises(TypeError, match="entropy_calibration: self_refine must be a bool; got"):
            ops.entropy_calibration(f(1, 2, 3, 4), f(1, 2), self_refine=flag)
    with pytest.raises(TypeError, match="routing_aggregation: facts must be a dense tensor"):
        ops.routing_aggregation(query.to_sparse(), query, f(1, 3, 2))


def test_autocast_does_not_make_integers_features():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            TypeError, match=r"similarity must have the type of triplets, torch.bfloat16, or torch.float32"
        ):
            ops.entropy_calibration(f(2, 3, 3, 8), torch.ones(2, 3, dtype=torch.bool))
        with pytest.raises(TypeError, match="key must have the type of query"):
            ops.emotion_attention(f(1, 2, 3, 4), f(5, 4).long(), f(5, 4), f(1, 2, 3, 4), f(1, 3, 4), 2)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_devices_without_a_kernel_or_autocast_are_served_by_the_reference(op):
    case = cases(op)[0]
    meta = [t.to("meta") for t in case.inputs()]
    for output, expected in zip(case.call(*meta), case.call(*case.inputs()), strict=True):
        assert output.device.type == "meta"
        assert output.shape == expected.shape


def test_unknown_implementations_and_ops_are_refused():
    with pytest.raises(ValueError, match=re.escape('impl must be "reference", "cpp", "triton", "cuda" or None; got')):
        ops.routing_aggregation(f(1, 1, 1, 1), f(1, 1, 1, 1), f(1, 1, 1), impl="fast")
    with pytest.raises(ValueError, match='factored_hidden has no impl="cuda": it has "cpp", "triton", "reference"'):
        ops.factored_hidden(f(1, 1, 1, 1), f(1, 1, 1, 1), f(1, 1, 1), impl="cuda")
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: it serves CUDA tensors, these are on cpu'):
        ops.routing_aggregation(f(1, 1, 1, 1), f(1, 1, 1, 1), f(1, 1, 1), impl="triton")
    with pytest.raises(ValueError, match="op must be one of entropy_calibration"):
        dispatch.implementations("softmax")


@needs_cpp
def test_explicit_kernels_refuse_types_they_do_not_take_and_the_automatic_choice_says_so(caplog):
    facts, logits = f(1, 2, 3, 4).half(), f(1, 3, 2)
    with pytest.raises(
        RuntimeError, match=r'impl="cpp" cannot run: it takes float32, bfloat16 and float64, these are torch.float16'
    ):
        ops.routing_aggregation(facts, facts, logits, impl="cpp")
    dispatch._log_once.cache_clear()
    with caplog.at_level("WARNING", logger="evc_fast"):
        for _ in range(3):
            ops.routing_aggregation(facts, facts, logits)
    assert len(caplog.records) == 1
    assert "runs on its PyTorch reference" in caplog.text


def test_a_device_that_its_kernels_cannot_run_on_is_named_unless_the_reference_is_allowed(monkeypatch):
    found = dispatch.Implementation("triton", lambda: "too old", ("meta",), (torch.float32,), unfit=lambda: "too old")
    monkeypatch.setattr(dispatch, "implementations", lambda op: (found, plain))
    plain = dispatch.Implementation("reference", str, ("any",), dispatch.FLOATING_DTYPES)
    facts, logits = f(1, 2, 3, 4).to("meta"), f(1, 3, 2).to("meta")
    with pytest.raises(RuntimeError, match=r"triton cannot run: too old; impl=.*, or EVC_FAST_ALLOW_REFERENCE=1"):
        ops.routing_aggregation(facts, facts, logits)
    assert ops.routing_aggregation(facts, facts, logits, impl="reference")[0].shape == (1, 6, 4)
    assert ops.routing_aggregation(facts.double(), facts.double(), logits.double())[0].shape == (1, 6, 4)
    monkeypatch.setenv("EVC_FAST_ALLOW_REFERENCE", "1")
    assert ops.routing_aggregation(facts, facts, logits)[0].shape == (1, 6, 4)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_what_a_gpu_lacks_is_no_break_in_a_graph(op, monkeypatch):
    """To look for a library or a GPU cannot be traced: on CUDA tensors these come before the reference."""
    found = [dataclasses.replace(i, devices=("cpu",)) for i in dispatch.implementations(op) if i.name != "cpp"]
    monkeypatch.setattr(dispatch, "implementations", lambda op: found)
    torch._dynamo.reset()
    case = cases(op)[0]
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.inputs()), case.plain(*case.inputs()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("op", dispatch.OPS)
def test_cuda_tensors_are_served(op):
    case = cases(op)[0]
    tensors = case.inputs()
    outputs = case.call(*[t.cuda() for t in tensors])
    for actual, expected in zip(outputs, case.plain(*tensors), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)
