"""The folded encoder's CUDA kernel through the emulation: every configuration against float64, one launch a call."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evc_fast.ops import _cuda, dispatch
from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, cast_inputs, encoder_inputs, named_outputs
from evc_fast.testing.tolerances import FORWARD_FACTOR, assert_as_good_as_plain

HERE = Path(__file__).resolve().parent
specification = importlib.util.spec_from_file_location("cuda_emulation_build", HERE / "cuda_emulation" / "build.py")
emulation = importlib.util.module_from_spec(specification)
specification.loader.exec_module(emulation)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def launches() -> Iterator[ctypes.CDLL]:
    """CPU tensors on impl="cuda"; counts the kernels launched."""
    if EXTENSION_MISSING or emulation.compiler() is None:
        pytest.skip(EXTENSION_MISSING or "no C++ compiler on this machine")
    library = emulation.build()
    _cuda.load_emulation(library)
    functions = ctypes.CDLL(str(library))
    functions.evc_fast_emulation_launches.restype = ctypes.c_int64
    functions.evc_fast_emulation(8, 0)  # multiprocessors, order of threads
    yield functions.evc_fast_emulation_launches
    EXTENSION.evc_fast_cuda_blocks(0)
    _cuda._emulated = False
    for cached in (_cuda.missing, _cuda.unfit, dispatch.implementations):
        cached.cache_clear()


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_option_in_one_launch(launches, options, dtype):
    encoder = build_encoder(**options)
    exact = encoder.double()
    arguments = encoder_inputs(encoder.config, 2, dtype=torch.float64)
    rounded = cast_inputs(arguments, dtype)
    oracle = named_outputs(exact(*cast_inputs(rounded, torch.float64), explain=True, impl="reference"))
    folded = exact.fold(dtype=dtype)
    plain = named_outputs(folded(*rounded, explain=True, impl="reference"))
    EXTENSION.evc_fast_cuda_blocks(3)
    before = launches()
    found = named_outputs(folded(*rounded, explain=True, impl="cuda"))
    assert launches() - before == 1
    for name, want in oracle.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            assert_as_good_as_plain(found[name], plain[name], want, FORWARD_FACTOR, name)


@torch.no_grad()
def test_the_same_bits_at_any_grid_and_alone_within_rounding(launches):
    encoder = build_encoder()
    arguments = [x for x in encoder_inputs(encoder.config, 3, dtype=torch.float32)[:3]]
    folded = encoder.float().fold(dtype=torch.float32)
    arguments = [x.float() for x in arguments]
    EXTENSION.evc_fast_cuda_blocks(1)
    together = folded(*arguments, impl="cuda").tokens
    for blocks in (2, 7):
        EXTENSION.evc_fast_cuda_blocks(blocks)
        assert torch.equal(folded(*arguments, impl="cuda").tokens, together)
    for video in range(3):
        alone = folded(*(x[video : video + 1] for x in arguments), impl="cuda").tokens
        torch.testing.assert_close(alone[0], together[video], rtol=1e-5, atol=1e-5)
