"""Copies of encoders and folds: each stays what it is, shares nothing, and is released."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.model import FaceNetEncoder, FoldedEncoder
from evc_fast.ops import dispatch
from evc_fast.testing.encoder_cases import build_encoder, cast_inputs, encoder_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: nothing folds by itself")


def made(dtype: torch.dtype = torch.float32) -> tuple[FaceNetEncoder, list[Tensor | None]]:
    encoder = build_encoder().to(dtype)
    return encoder, encoder_inputs(encoder.config, dtype=dtype)


@torch.no_grad()
def assert_current(encoder: FaceNetEncoder, arguments: list[Tensor | None]) -> None:
    """Evaluation without gradients gives what the straight encoder gives."""
    got, want = encoder(*arguments).tokens, encoder(*arguments, impl="reference").tokens
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def counted(e: FaceNetEncoder) -> None:
    with torch.no_grad():
        e.phi_v.weight[2, 3] += 1


def uncounted(e: FaceNetEncoder) -> None:
    e.ffn[0].weight.data.mul_(1.5)


@needs_cpp
def test_folding_leaves_the_encoder_as_it_was():
    encoder, arguments = made()
    keys = list(encoder.state_dict())
    modules = [name for name, _ in encoder.named_modules()]
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    flags = [p.requires_grad for p in encoder.parameters()]
    with torch.no_grad():
        encoder(*arguments)
    encoder.fold(dtype=torch.bfloat16)
    assert list(encoder.state_dict()) == keys
    assert [name for name, _ in encoder.named_modules()] == modules
    assert [p.requires_grad for p in encoder.parameters()] == flags
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_copies_of_the_encoder_fold_for_themselves():
    encoder, arguments = made()
    assert_current(encoder, arguments)
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(encoder),
        pickle.loads(pickle.dumps(encoder)),
        torch.load(file, weights_only=False),
        copy.copy(encoder),
    ):
        assert_current(twin, arguments)
        with torch.no_grad():
            twin.phi_v.weight.mul_(2)
        assert_current(twin, arguments)
        assert_current(encoder, arguments)


def test_weights_of_a_fold_are_its_buffers():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        encoder, arguments = made(torch.float64)
        folded = encoder.fold(dtype=dtype)
        assert not list(folded.parameters())
        assert folded.state_dict()
        for name, b in folded.named_buffers():
            assert b.dtype == dtype, name
            assert not b.requires_grad, name
            assert type(b) is Tensor, name
        assert not folded(*cast_inputs(arguments, dtype), impl="reference").tokens.requires_grad
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        assert not own & {b.untyped_storage().data_ptr() for b in folded.buffers()}, "a fold shares no memory"


@torch.no_grad()
def test_a_fold_can_be_stored_and_loaded():
    encoder, arguments = made()
    other = build_encoder(seed=5).float()
    folded, target = encoder.fold(), other.fold()
    want = folded(*arguments).tokens
    assert not torch.equal(target(*arguments).tokens, want)
    target.load_state_dict(folded.state_dict())
    assert torch.equal(target(*arguments).tokens, want)
    folded.output_bias.add_(1)
    torch.testing.assert_close(folded(*arguments).tokens, want + 1)


@torch.no_grad()
def test_another_type_packs_a_fold_anew():
    encoder, arguments = made()
    folded = encoder.fold()
    folded(*arguments)
    for dtype in (torch.bfloat16, torch.float64):
        copied = copy.deepcopy(folded)
        assert copied.to(dtype) is copied
        assert copied.dtype == dtype
        got = copied(*cast_inputs(arguments, dtype))
        assert got.tokens.dtype == dtype
        want = copied(*cast_inputs(arguments, dtype), impl="reference").tokens
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(got.tokens, want, **tolerance)


@pytest.mark.parametrize("change", [counted, uncounted], ids=lambda c: c.__name__)
def test_copies_stay_what_they_are_after_their_source_changed(change: Callable[[FaceNetEncoder], None]):
    encoder, arguments = made()
    folded = encoder.fold()
    with torch.no_grad():
        want = folded(*arguments).tokens
        copies: list[FoldedEncoder] = [copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))]
        change(encoder)
        for copied in copies:
            assert torch.equal(copied(*arguments).tokens, want)
            assert copied.num_frames == folded.num_frames
            assert copied.config == folded.config


def test_a_fold_outlives_its_encoder_and_does_not_hold_it():
    encoder, arguments = made()
    folded = encoder.fold()
    with torch.no_grad():
        want = folded(*arguments).tokens
    gone, weight = weakref.ref(encoder), weakref.ref(encoder.phi_f.weight)
    del encoder
    gc.collect()
    assert gone() is None
    assert weight() is None, "a fold holds the memory of the encoder's weights"
    with torch.no_grad():
        assert torch.equal(folded(*arguments).tokens, want)


def test_an_encoder_that_ran_is_released():
    encoder, arguments = made()
    with torch.no_grad():
        encoder(*arguments)
    gone = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert gone() is None


def test_flops_are_counted_of_the_encoder_itself():
    encoder, arguments = made()
    counts = []
    for impl in (None, "cpp") if HAS_CPP else (None,):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder(*arguments, impl=impl)
        counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1
    assert counts[0] > 0
