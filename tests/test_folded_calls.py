"""Calls of the folded encoder: the same bits wherever a video stands, any memory layout, nothing left behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from evc_fast.model import EncoderOutput, FoldedEncoder
from evc_fast.ops import dispatch
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, cast_inputs, encoder_inputs, named_outputs

HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
pytestmark = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: there is no compiled encoder")

OPTIONS = ["paper", "no_retrieval", "no_emotion", "emotion_first_video_merge", "no_bias_adjustment"]
# (K, N, W, widths): one and several videos that a thread takes together, more rows than a block holds
SHAPES = [
    {"k": 3, "n": 5, "w": 7},
    {"k": 4, "n": 16, "w": 19, "dim": 36, "num_heads": 4, "ffn_dim": 70, "output_dim": 33},
    {"k": 2, "n": 66, "w": 35},
    {"k": 5, "n": 1, "w": 3},
]


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(dtype: torch.dtype = torch.float32, **sizes) -> tuple[FoldedEncoder, list[Tensor | None]]:
    encoder = build_encoder(**sizes)
    return encoder.fold(dtype=dtype), encoder_inputs(encoder.config, 9, dtype=dtype)


def rows(arguments: list[Tensor | None], index: slice) -> list[Tensor | None]:
    return [None if x is None else x[index] for x in arguments]


def assert_same_bits(got: EncoderOutput, want: EncoderOutput, index: slice, what: str) -> None:
    for (name, a), b in zip(named_outputs(got).items(), named_outputs(want).values(), strict=True):
        if b is not None:
            assert torch.equal(a.nan_to_num(7.0), b[index].nan_to_num(7.0)), f"{what}: {name}"


@torch.no_grad()
def check_bits(sizes: dict, dtype: torch.dtype, *, positions: bool) -> None:
    folded, arguments = made(dtype, **sizes)
    want = folded(*arguments, explain=True)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for batch in range(1, 10):
            for first in range(10 - batch) if positions else (9 - batch,):
                part = slice(first, first + batch)
                got = folded(*rows(arguments, part), explain=True)
                assert_same_bits(got, want, part, f"{sizes}, {dtype}, {threads} threads, videos {part}")


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bits_at_every_position_batch_size_and_thread_count(options):
    check_bits({**ENCODER_OPTIONS[options], **SHAPES[1]}, torch.float32, positions=False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_bits_in_all_shapes_and_types(options, dtype):
    for sizes in SHAPES:
        check_bits({**ENCODER_OPTIONS[options], **sizes}, dtype, positions=True)


@torch.no_grad()
def test_the_same_bits_in_large_batches():
    folded, _ = made(**SHAPES[1])
    arguments = encoder_inputs(folded.config, 67, dtype=torch.float32)
    want = [folded(*rows(arguments, slice(b, b + 1)), explain=True) for b in range(67)]
    for threads, batch in ((1, 16), (2, 67), (3, 33), (4, 67)):
        torch.set_num_threads(threads)
        got = named_outputs(folded(*rows(arguments, slice(0, batch)), explain=True))
        for b in range(batch):
            for name, one in named_outputs(want[b]).items():
                assert torch.equal(got[name][b : b + 1], one), f"{threads} threads, video {b} of {batch}: {name}"


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_a_call_leaves_nothing_behind(options):
    """Scratch is kept from call to call: what NaN, infinity and larger sizes leave there must not show."""
    small, arguments = made(**{**ENCODER_OPTIONS[options], "k": 2, "n": 3, "w": 5})
    arguments = rows(arguments, slice(0, 3))
    want = small(*arguments, explain=True)
    others = [
        made(dtype, **{**ENCODER_OPTIONS[options], **sizes})
        for dtype, sizes in itertools.product((torch.float32, torch.bfloat16, torch.float64), SHAPES[1:3])
    ]
    for threads, value in ((1, float("nan")), (2, float("nan")), (2, float("inf"))):
        torch.set_num_threads(threads)
        for other, features in others:
            poisoned = [
                torch.full_like(x, value) if x is not None and x.is_floating_point() else x
                for x in rows(features, slice(0, 3))
            ]
            other(*poisoned, explain=True)
            for batch in (3, 1):
                part = slice(0, batch)
                assert_same_bits(small(*rows(arguments, part), explain=True), want, part, f"after {value}")
    assert all(x is None or x.isfinite().all() for x in named_outputs(want).values())


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_nan_stays_in_its_video(options):
    for sizes in SHAPES:
        folded, arguments = made(**{**ENCODER_OPTIONS[options], **sizes})
        want = folded(*arguments, explain=True)
        for threads, spoilt, which in ((1, 0, 0), (2, 4, 0), (1, 8, 1), (2, 0, 1), (1, 4, 2), (2, 8, 2)):
            if arguments[which] is None:
                continue
            torch.set_num_threads(threads)
            spoiled = [None if x is None else x.clone() for x in arguments]
            spoiled[which][spoilt].view(-1)[-1] = float("nan")
            got = folded(*spoiled, explain=True)
            what = f"{sizes}, {threads} threads, NaN in argument {which} of video {spoilt}"
            for part in (slice(0, spoilt), slice(spoilt + 1, 9)):
                clean = got._replace(
                    tokens=got.tokens[part],
                    emotion_logits=None if got.emotion_logits is None else got.emotion_logits[part],
                    explanation=type(got.explanation)(*(None if x is None else x[part] for x in got.explanation)),
                )
                assert_same_bits(clean, want, part, what)
            # Identical triplets share theta whatever their similarity, as in the straight encoder.
            if which != 2 or not folded.config.merge_identical_triplets:
                assert got.tokens[spoilt].isnan().any(), f"{what} is lost"


@pytest.mark.parametrize("options", ["paper", "emotion_first_no_retrieval", "no_emotion"])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@torch.no_grad()
def test_nan_and_infinity_reach_what_they_reach_in_the_straight_encoder(options, special):
    encoder = build_encoder(**ENCODER_OPTIONS[options])
    folded = encoder.fold()
    arguments = encoder_inputs(encoder.config, 2)
    arguments[0][1, 2, 3] = special
    want, got = encoder(*arguments, impl="reference"), folded(*arguments)
    assert torch.equal(got.tokens.isnan(), want.tokens.isnan())
    if want.emotion_logits is not None:
        assert torch.equal(got.emotion_logits.isnan(), want.emotion_logits.isnan())


def layouts(x: Tensor) -> dict[str, Tensor]:
    sliced = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 9)[..., 1::2]
    sliced.copy_(x)
    offset = x.new_full((x.numel() + 3,), 9)[3:].view(x.shape)
    offset.copy_(x)
    return {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": sliced,
        "offset": offset,
        "flipped batch": x.flip(0).contiguous().flip(0),
        "expanded": x[:1].expand_as(x),
    }


@pytest.mark.parametrize("options", ["paper", "merge_identical_triplets", "no_retrieval"])
@torch.no_grad()
def test_layouts_of_the_features(options):
    for dtype in (torch.float32, torch.bfloat16):
        folded, arguments = made(dtype, **ENCODER_OPTIONS[options])
        arguments = rows(arguments, slice(0, 4))
        for i, x in enumerate(arguments):
            if x is None:
                continue
            for name, laid_out in layouts(x).items():
                got = folded(*arguments[:i], laid_out, *arguments[i + 1 :], explain=True)
                plain = [*arguments[:i], laid_out.clone(memory_format=torch.contiguous_format), *arguments[i + 1 :]]
                assert_same_bits(got, folded(*plain, explain=True), slice(None), f"{dtype} argument {i}, {name}")


@pytest.mark.parametrize("options", ["paper", "merge_identical_triplets", "no_retrieval"])
def test_arguments_and_weights_are_not_written(options):
    for dtype in (torch.float32, torch.bfloat16):
        folded, arguments = made(dtype, **ENCODER_OPTIONS[options])
        before = [None if x is None else x.clone() for x in arguments]
        weights = {name: b.clone() for name, b in folded.named_buffers()}
        versions = [x._version for x in arguments if x is not None]
        folded(*arguments, explain=True)
        for x, y in zip(arguments, before, strict=True):
            assert x is y is None or torch.equal(x, y)
        assert versions == [x._version for x in arguments if x is not None]
        for name, b in folded.named_buffers():
            assert torch.equal(b, weights[name]), name


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_results_share_no_memory_and_outlive_later_calls(options):
    folded, arguments = made(**ENCODER_OPTIONS[options])
    first = folded(*arguments, explain=True)
    copies = [None if x is None else x.clone() for x in named_outputs(first).values()]
    second = folded(*[None if x is None else x + 1 for x in arguments], explain=True)
    for x, y in zip(named_outputs(first).values(), copies, strict=True):
        assert x is y is None or torch.equal(x, y)
    tensors = [x for output in (first, second) for x in named_outputs(output).values() if x is not None]
    tensors += [x for x in arguments if x is not None] + list(folded.buffers())
    storages = [x.untyped_storage().data_ptr() for x in tensors if x.numel() > 0]
    results = storages[: sum(x is not None for x in (*named_outputs(first).values(), *named_outputs(second).values()))]
    for x in results:
        assert storages.count(x) == 1
    assert all(x is None or x.is_contiguous() for x in named_outputs(first).values())


@torch.no_grad()
def test_features_of_16_bit_modules_may_be_float32():
    encoder = build_encoder()
    folded = encoder.fold(dtype=torch.bfloat16)
    arguments = encoder_inputs(encoder.config, 3, dtype=torch.bfloat16)
    want = folded(*arguments, explain=True)
    for similarity in (torch.float32, torch.bfloat16, torch.float64):
        wide = cast_inputs(arguments, torch.float32)
        wide[2] = wide[2].to(similarity)
        got = folded(*wide, explain=True)
        assert got.tokens.dtype == torch.bfloat16
        assert_same_bits(got, want, slice(None), f"similarity {similarity}")


@pytest.mark.parametrize("automatic", [False, True])
def test_python_threads_call_one_module_at_once(automatic):
    encoder = build_encoder(**SHAPES[1]).float()
    module = encoder if automatic else encoder.fold()
    arguments = encoder_inputs(encoder.config, 9, dtype=torch.float32)
    with torch.no_grad():
        want = encoder.fold()(*arguments, explain=True)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def call(offset: int) -> None:
        try:
            start.wait()
            with torch.no_grad():
                for i in range(40):
                    batch = (i + offset) % 9 + 1
                    part = slice(9 - batch, 9)
                    assert_same_bits(module(*rows(arguments, part), explain=True), want, part, f"thread {offset}")
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]
