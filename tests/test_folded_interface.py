"""The folded encoder inside PyTorch: every error message, opcheck, compile, export, FLOPs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evc_fast import ops
from evc_fast.model import FaceNetConfig, FaceNetEncoder, FoldedEncoder
from evc_fast.ops import dispatch
from evc_fast.ops.folded_encoder import folded_sizes, pack_folded_encoder
from evc_fast.reference.folded_encoder import FoldedWeights
from evc_fast.testing.encoder_cases import (
    ENCODER_OPTIONS,
    ENCODER_SIZES,
    ODD_WIDTHS,
    build_encoder,
    cast_inputs,
    encoder_inputs,
    named_outputs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
IMPLS = [None, "reference"]
# A graph is plain PyTorch whatever `impl` is: one option shows it for both.
COMPILED = [("paper", impl) for impl in IMPLS]
COMPILED += [pytest.param(o, None, marks=pytest.mark.slow) for o in ENCODER_OPTIONS if o != "paper"]
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: there is no compiled encoder")


def made(dtype: torch.dtype = torch.float32, batch: int = 2, **options) -> tuple[FoldedEncoder, list[Tensor | None]]:
    encoder = build_encoder(**options)
    return encoder.fold(dtype=dtype), encoder_inputs(encoder.config, batch, dtype=dtype)


def one_sentence(message: str) -> bool:
    return bool(message) and "\n" not in message and not message.endswith(".")


# --- fold() ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
def test_types_of_a_fold(own, dtype):
    encoder = build_encoder().to(own)
    folded = encoder.fold(dtype=dtype)
    expected = own if dtype is None else dtype
    assert folded.dtype == expected
    assert folded.num_frames == encoder.config.num_frames
    assert folded.config == encoder.config
    assert not folded.training
    output = folded(*encoder_inputs(encoder.config, dtype=expected), explain=True)
    shown = torch.float64 if expected == torch.float64 else torch.float32
    for name, x in named_outputs(output).items():
        gate = name in ("tokens", "emotion_logits", "fact_gate", "emotion_gate")
        assert x.dtype == (expected if gate else shown), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.float16}, TypeError, "fold: torch.float16 has no kernel on the CPU"),
        (
            {"dtype": torch.int64},
            TypeError,
            "fold: dtype must be float32, bfloat16, float16 or float64, got torch.int64",
        ),
        ({"dtype": torch.int8}, TypeError, "fold: dtype must be float32, bfloat16, float16 or float64, got torch.int8"),
        ({"dtype": torch.complex64}, TypeError, "got torch.complex64"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "got torch.float8_e4m3fn"),
        ({"dtype": "float32"}, TypeError, "fold: dtype must be float32, bfloat16, float16 or float64, got float32"),
        ({"dtype": float}, TypeError, "fold: dtype must be"),
        ({"num_frames": 0}, ValueError, "fold: num_frames must be an integer of at least 1, got 0"),
        ({"num_frames": -3}, ValueError, "fold: num_frames must be an integer of at least 1, got -3"),
        ({"num_frames": 2.0}, ValueError, "fold: num_frames must be an integer of at least 1, got 2.0"),
        ({"num_frames": True}, ValueError, "fold: num_frames must be an integer of at least 1, got True"),
    ],
    ids=str,
)
def test_what_fold_refuses(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        build_encoder().fold(**arguments)
    assert one_sentence(str(raised.value))


def test_fold_needs_evaluation_mode():
    encoder = build_encoder().train()
    with pytest.raises(RuntimeError, match="fold\\(\\) needs an encoder in evaluation mode: call eval\\(\\) first"):
        encoder.fold()
    encoder.eval().fold()


def test_a_fold_stays_in_evaluation_mode():
    folded, arguments = made()
    want = folded(*arguments).tokens
    assert folded.eval() is folded
    assert folded.train(False) is folded
    with pytest.raises(RuntimeError, match="a folded encoder cannot be trained"):
        folded.train()
    parent = torch.nn.Sequential(folded)
    with pytest.raises(RuntimeError, match="a folded encoder cannot be trained"):
        parent.train()
    assert not folded.training
    assert torch.equal(folded(*arguments).tokens, want)


# --- What a call refuses, before it computes ---------------------------------------------------------

MISTAKES = {
    "no video": (lambda v, t, s, g: (None, t, s), TypeError, "video must be a tensor [B, N, 24], got NoneType"),
    "list": (lambda v, t, s, g: (v.tolist(), t, s), TypeError, "video must be a tensor [B, N, 24], got list"),
    "rank": (lambda v, t, s, g: (v[0], t, s), ValueError, "video must be [B, N, 24], got shape [5, 24]"),
    "width": (lambda v, t, s, g: (v[..., 1:], t, s), ValueError, "video must be [B, N, 24], got shape [2, 5, 23]"),
    "no frames": (lambda v, t, s, g: (v[:, :0], t, s), ValueError, "video must have at least one frame"),
    "fewer frames": (lambda v, t, s, g: (v[:, 1:], t, s), ValueError, "video must have the 5 frames that the encoder"),
    "more frames": (lambda v, t, s, g: (v.repeat(1, 2, 1), t, s), ValueError, "fold(num_frames=10) takes them"),
    "no triplets": (lambda v, t, s, g: (v, None, s), TypeError, "triplets must be a tensor [2, 3, 3, 20]"),
    "no similarity": (lambda v, t, s, g: (v, t), TypeError, "similarity must be a tensor [2, 3], got NoneType"),
    "fewer triplets": (lambda v, t, s, g: (v, t[:, 1:], s), ValueError, "triplets must be [2, 3, 3, 20], got shape"),
    "more triplets": (lambda v, t, s, g: (v, t.repeat(1, 2, 1, 1), s), ValueError, "triplets must be [2, 3, 3, 20]"),
    "similarity's K": (lambda v, t, s, g: (v, t, s[:, 1:]), ValueError, "similarity must be [2, 3], got shape [2, 2]"),
    "batch": (lambda v, t, s, g: (v, t[:1], s), ValueError, "triplets must be [2, 3, 3, 20], got shape [1, 3, 3, 20]"),
    "video's type": (lambda v, t, s, g: (v.double(), t, s), TypeError, "video must be torch.float32"),
    "integers": (lambda v, t, s, g: (v.long(), t, s), TypeError, "video must be a floating tensor, got torch.int64"),
    "triplets' type": (lambda v, t, s, g: (v, t.bfloat16(), s), TypeError, "triplets must be torch.float32"),
    "similarity's type": (lambda v, t, s, g: (v, t, s.long()), TypeError, "similarity must be a floating tensor"),
    "device": (
        lambda v, t, s, g: (v.to("meta"), t, s),
        ValueError,
        "video must be on cpu as the encoder's weights are",
    ),
    "triplets' device": (lambda v, t, s, g: (v, t.to("meta"), s), ValueError, "triplets must be on cpu"),
    "similarity's device": (lambda v, t, s, g: (v, t, s.to("meta")), ValueError, "similarity must be on cpu"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_call_refuses(mistake, error, message, impl):
    folded, arguments = made()
    with pytest.raises(error, match=re.escape(message)) as raised:
        folded(*mistake(*arguments), impl=impl)
    assert one_sentence(str(raised.value))


@pytest.mark.parametrize("impl", IMPLS)
def test_groups_are_checked_where_they_are_read(impl):
    folded, (video, triplets, similarity, groups) = made(merge_identical_triplets=True)
    for wrong, error, message in (
        (None, TypeError, "groups must be a tensor [2, 3], got NoneType"),
        (groups.int(), TypeError, "groups must be torch.int64, got torch.int32"),
        (groups[:, 1:], ValueError, "groups must be [2, 3], got shape [2, 2]"),
        (groups.to("meta"), ValueError, "groups must be on cpu"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            folded(video, triplets, similarity, wrong, impl=impl)
    distinct, arguments = made()
    want = distinct(*arguments, impl=impl).tokens
    assert torch.equal(distinct(*arguments[:3], groups, impl=impl).tokens, want), "groups are not read without merging"


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_read_without_retrieval(impl):
    folded, (video, *_) = made(retrieval=False)
    _, (_, triplets, similarity, _) = made()
    folded(video, impl=impl)
    for name, arguments in (
        ("triplets", (triplets,)),
        ("similarity", (None, similarity)),
        ("groups", (None, None, similarity.long())),
    ):
        with pytest.raises(ValueError, match=f"{name} must be None: this encoder's configuration has retrieval=False"):
            folded(video, *arguments, impl=impl)


def test_an_unknown_impl_is_refused():
    folded, arguments = made()
    with pytest.raises(ValueError, match='impl must be "reference", "cpp", "triton", "cuda" or None'):
        folded(*arguments, impl="fast")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_similarity_has_any_floating_type(dtype, impl):
    encoder = build_encoder().float()
    arguments = encoder_inputs(encoder.config, dtype=torch.float32)
    arguments[2] = arguments[2].to(dtype)
    rounded = [*arguments[:2], arguments[2].float(), arguments[3]]
    with torch.no_grad():
        for module in (encoder, encoder.fold()):
            torch.testing.assert_close(module(*arguments, impl=impl).tokens, module(*rounded, impl=impl).tokens)


@needs_cpp
def test_the_op_itself_reads_no_memory_that_is_not_there():
    """Called past the checks of Python, with tensors of the wrong size, type or number."""
    folded, (video, triplets, similarity, _) = made()
    weights, options = folded._weights(), folded.options
    packed, sizes = pack_folded_encoder(weights, options), folded_sizes(weights, options)
    call = torch.ops.evc_fast.folded_encoder_forward
    call(video, triplets, similarity, None, packed, sizes, 1e-5, True)
    wrong = [
        (video[..., 1:], triplets, similarity, None, packed, sizes),
        (video.double(), triplets, similarity, None, packed, sizes),
        (video[:1], triplets, similarity, None, packed, sizes),
        (video, triplets[:, :2], similarity, None, packed, sizes),
        (video, None, similarity, None, packed, sizes),
        (video, triplets, None, None, packed, sizes),
        (video, triplets, similarity.double(), None, packed, sizes),
        (video, triplets, similarity, torch.zeros(2, 4, dtype=torch.int64), packed, sizes),
        (video, triplets, similarity, torch.zeros(2, 3, dtype=torch.int32), packed, sizes),
        (video, triplets, similarity, None, packed[:-1], sizes),
        (video, triplets, similarity, None, packed, sizes[:-1]),
        (video, triplets, similarity, None, [x.double() for x in packed], sizes),
        (video, triplets, similarity, None, [packed[0][1:], *packed[1:]], sizes),
    ]
    for i in range(len(sizes) - 1):
        if sizes[i] > 1:  # an encoder of other sizes than its weights'
            wrong.append((video, triplets, similarity, None, packed, [*sizes[:i], sizes[i] + 32, *sizes[i + 1 :]]))
    wrong.append((video, triplets, similarity, None, packed, [*sizes[:3], 0, *sizes[4:]]))
    for arguments in wrong:
        with pytest.raises(RuntimeError):
            call(*arguments, 1e-5, True)


# --- opcheck, compile, export ------------------------------------------------------------------------


def op_arguments(folded: FoldedEncoder, arguments: list[Tensor | None], explain: bool) -> tuple:
    weights, options = folded._weights(), folded.options
    wide = cast_inputs(arguments, torch.float64 if folded.dtype == torch.float64 else torch.float32)
    return *wide, pack_folded_encoder(weights, options), folded_sizes(weights, options), 1e-5, explain


@needs_cpp
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_opcheck(options):
    for dtype, batch, explain in ((torch.float32, 2, True), (torch.bfloat16, 1, False), (torch.float64, 0, True)):
        folded, arguments = made(dtype, batch, **options)
        torch.library.opcheck(
            torch.ops.evc_fast.folded_encoder_forward.default,
            op_arguments(folded, arguments, explain),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(("options", "impl"), COMPILED)
@torch.no_grad()
def test_compile_without_breaks(options, impl):
    torch._dynamo.reset()
    folded, _ = made(**ENCODER_OPTIONS[options])
    compiled = torch.compile(
        lambda *x: folded(*x, explain=True, impl=impl), fullgraph=True, backend="aot_eager", dynamic=None
    )
    for batch in (3, 1):
        arguments = encoder_inputs(folded.config, batch, dtype=torch.float32)
        for (name, got), want in zip(
            named_outputs(compiled(*arguments)).items(),
            named_outputs(folded(*arguments, explain=True, impl=impl)).values(),
            strict=True,
        ):
            torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("options", "impl"), COMPILED)
@torch.no_grad()
def test_export_with_dynamic_batch(options, impl):
    class Wrapped(torch.nn.Module):
        def __init__(self, folded: FoldedEncoder) -> None:
            super().__init__()
            self.folded = folded

        def forward(self, *arguments: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(self.folded(*arguments, impl=impl)[:2])

    folded, arguments = made(batch=3, **ENCODER_OPTIONS[options])
    batch = torch.export.Dim("batch", min=1)
    shapes = (tuple(None if x is None else {0: batch} for x in arguments),)
    program = torch.export.export(Wrapped(folded), tuple(arguments), dynamic_shapes=shapes, strict=True)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("evc_fast" in name for name in names), "a graph is plain PyTorch"
    for other in (1, 5):
        features = encoder_inputs(folded.config, other, dtype=torch.float32, seed=4)
        want = folded(*features)[:2]
        for got, expected in zip(program.module()(*features), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_a_fold_in_its_type():
    folded, arguments = made()
    want = folded(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = folded(*arguments)
        mixed = folded(*cast_inputs(arguments, torch.bfloat16))
    if HAS_CPP:
        assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(mixed.tokens.float(), want.tokens, rtol=0.1, atol=0.1)


# --- FLOPs -------------------------------------------------------------------------------------------


def flops(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@needs_cpp
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_flops_of_the_op_are_those_of_the_reference(options):
    for sizes in [{"k": k, "n": n, "w": w} for k, n, w in ENCODER_SIZES[:3]] + [ODD_WIDTHS["heads_of_11"]]:
        folded, arguments = made(**{**options, **sizes})
        packed = pack_folded_encoder(folded._weights(), folded.options)
        got = flops(
            lambda f=folded, a=arguments, p=packed: ops.folded_encoder(
                *a, f._weights(), f.options, packed=p, impl="cpp"
            )
        )
        want = flops(lambda f=folded, a=arguments: f(*a, impl="reference"))
        assert got == want, f"{sizes}: {got} counted, the reference has {want}, {got - want} more"


@needs_cpp
def test_flops_at_the_papers_sizes():
    encoder = FaceNetEncoder(FaceNetConfig()).eval()
    arguments = encoder_inputs(encoder.config, 1, dtype=torch.float32)
    folded = encoder.fold()
    counted = {impl: flops(lambda i=impl: folded(*arguments, impl=i)) for impl in ("cpp", "reference")}
    straight = flops(lambda: encoder(*arguments, impl="reference"))
    assert counted["cpp"] == counted["reference"]
    assert 0.15e9 < counted["cpp"] < 0.20e9
    assert 2 * counted["cpp"] < straight < 0.45e9


def test_the_number_of_weights():
    """A fold of the paper's sizes is no larger than the encoder: it is read once a call."""
    encoder = FaceNetEncoder(FaceNetConfig()).eval()
    own = sum(p.numel() for p in encoder.parameters())
    folded = encoder.fold()
    assert sum(b.numel() for b in folded.buffers()) < 1.05 * own
    assert set(dict(folded.named_buffers())) <= set(FoldedWeights._fields)
