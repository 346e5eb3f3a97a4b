"""What needs a GPU: the folded encoder on CUDA, and the encoder's training there."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evc_fast.model import EncoderOutput, FaceNetConfig, FaceNetEncoder, graph_training
from evc_fast.model.folded import _KERNEL_VIDEOS
from evc_fast.testing.encoder_cases import (
    ENCODER_OPTIONS,
    ENCODER_SIZES,
    ODD_WIDTHS,
    build_encoder,
    cast_inputs,
    encoder_inputs,
    named_outputs,
)
from evc_fast.testing.tolerances import FORWARD_FACTOR, error_bound, largest_error

sys.path.insert(0, str(Path(__file__).parent))
from on_gpu import BACKEND, DTYPES, ON, REHEARSAL, Recorder, cuda_alone, here, moved, needs_cuda, opcheck

pytestmark = needs_cuda

PAPER_SIZES = {"video_dim": 512, "text_dim": 512, "dim": 300, "emotion_dim": 300, "num_queries": 32, "num_heads": 4}
PAPER_SIZES |= {"ffn_dim": 1200, "output_dim": 2048, "k": 4, "n": 16, "w": 179}
SMALL_ENCODER = FaceNetConfig(video_dim=24, text_dim=20, dim=16, emotion_dim=12, num_queries=6, num_heads=2,
                              output_dim=18, num_frames=5, num_emotions=7, dropout=0.0)  # fmt: skip


# ---- the folded encoder ----


def assert_folded(sizes: dict, batches: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every result of the fold on the GPU against the straight encoder in float64 on the CPU."""
    exact = build_encoder(**sizes)
    plain_encoder = build_encoder(**sizes).to(dtype)
    folded = exact.fold(dtype=torch.float32).to(ON, dtype)
    fields: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for batch in batches:
        inputs = cast_inputs(encoder_inputs(exact.config, batch), dtype)
        oracle = named_outputs(exact(*cast_inputs(inputs, torch.float64), explain=True, impl="reference"))
        plain = named_outputs(plain_encoder(*inputs, explain=True, impl="reference"))
        given = [None if x is None else x.to(ON) for x in inputs]
        shown = named_outputs(folded(*given, explain=True, impl=here("cuda", dtype)))
        short = folded(*given, impl=here("cuda", dtype))
        assert torch.equal(short.tokens, shown["tokens"]), f"B = {batch}: an explanation changes the tokens"
        called = named_outputs(folded(*given, explain=True))  # as a user does: of many videos not by the kernel
        if batch <= _KERNEL_VIDEOS:
            assert torch.equal(called["tokens"], short.tokens), f"B = {batch}: not what is taken by itself"
        for name, wanted in oracle.items():
            assert (shown[name] is None) == (wanted is None) == (called[name] is None), f"B = {batch}: {name}"
            if wanted is not None:
                fields.setdefault(name, []).append((shown[name].cpu(), plain[name], wanted))
                fields.setdefault(f"{name} as called", []).append((called[name].cpu(), plain[name], wanted))
    for name, triples in fields.items():
        actual, plain, oracle = (torch.cat(parts) for parts in zip(*triples, strict=True))
        assert actual.dtype == plain.dtype, name
        # The folded products do not round where the straight ones do: of a handful of values either may come out ahead.
        few = (2 if dtype != torch.float32 else 8) * torch.finfo(dtype).eps
        bound = error_bound(dtype, plain, oracle, FORWARD_FACTOR)
        if oracle.numel():
            bound = max(bound, few * oracle.abs().max().item())
        error = largest_error(actual, oracle)
        assert error <= bound, f"{name}: error {error:.3g} against float64, at most {bound:.3g} allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
@torch.no_grad()
def test_folded_options(options, dtype):
    for k, n, w in ENCODER_SIZES[: 1 if REHEARSAL else None]:
        assert_folded({**options, "k": k, "n": n, "w": w}, (0, 1, 3), dtype)


@pytest.mark.parametrize("widths", ODD_WIDTHS.values(), ids=ODD_WIDTHS)
@torch.no_grad()
def test_folded_widths(widths):
    for dtype in DTYPES:
        assert_folded(widths, (1, 3), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_folded_at_the_papers_sizes(dtype):
    assert_folded(PAPER_SIZES, (1, 2, 5) if REHEARSAL else (1, 2, 5, 8, 32, 33, 256), dtype)


@cuda_alone
@torch.no_grad()
def test_folded_opcheck():
    folded = build_encoder().fold(dtype=torch.float32).to(ON, torch.bfloat16)
    inputs = [moved(x) for x in encoder_inputs(folded.config, 2, dtype=torch.bfloat16)[:3]]
    with Recorder() as recorder:
        folded(*inputs, impl="cuda")
    assert len(opcheck(recorder.calls, trained=False)) == 1


@cuda_alone
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_one_video_takes_three_launches_at_most(dtype):
    folded = build_encoder(**PAPER_SIZES).fold(dtype=torch.float32).to(ON, dtype)
    inputs = [moved(x) for x in encoder_inputs(folded.config, 1, dtype=torch.float32)[:3]]
    folded(*inputs)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):  # the first one sets the profiler up
        with torch.profiler.profile(activities=activities) as profiler:
            folded(*inputs)
            torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 3, [e.name for e in kernels]


@cuda_alone
@pytest.mark.parametrize("batch", [1, _KERNEL_VIDEOS, 33])
@torch.inference_mode()
def test_folded_on_a_side_stream_and_in_a_graph(batch):
    folded = build_encoder(**PAPER_SIZES).fold(dtype=torch.float32).to(ON, torch.bfloat16)
    inputs = [moved(x) for x in encoder_inputs(folded.config, batch, dtype=torch.float32)[:3]]
    expected = folded(*inputs).tokens
    stream = torch.cuda.Stream()
    late = [torch.full_like(x, torch.nan) for x in inputs]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for held, new in zip(late, inputs, strict=True):
            held.copy_(new)
        aside = folded(*late).tokens
    stream.synchronize()
    if batch <= _KERNEL_VIDEOS:  # else by products, for which the library may choose otherwise in a graph
        assert torch.equal(aside, expected)
    torch.testing.assert_close(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = folded(*late).tokens
    others = [moved(x) for x in encoder_inputs(folded.config, batch, dtype=torch.float32, seed=7)[:3]]
    for held, new in zip(late, others, strict=True):
        held.copy_(new)
    for _ in range(3):
        replayed.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(replayed, folded(*others).tokens)
        if batch <= _KERNEL_VIDEOS:
            assert torch.equal(replayed, folded(*others).tokens)


@torch.no_grad()
def test_a_compiled_fold_is_the_fold():
    torch._dynamo.reset()
    folded = build_encoder().fold(dtype=torch.float32).to(ON)
    inputs = [moved(x) for x in encoder_inputs(folded.config, 2, dtype=torch.float32)[:3]]
    compiled = torch.compile(folded, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(*inputs).tokens, folded(*inputs).tokens, rtol=1e-4, atol=1e-5)


# ---- the encoder in training ----


def trained(config: FaceNetConfig = SMALL_ENCODER, batch: int = 4) -> tuple[FaceNetEncoder, list[Tensor]]:
    torch.manual_seed(0)
    encoder = FaceNetEncoder(config).to(ON).train()
    return encoder, [moved(x) for x in encoder_inputs(config, batch, dtype=torch.float32)[:3]]


def loss_of(output: EncoderOutput) -> Tensor:
    logits = output.emotion_logits
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    if logits.dtype != torch.float64:  # losses are float32's under autocast
        logits = logits.float()
    return output.tokens.to(logits.dtype).square().mean() + F.cross_entropy(logits, target)


def gradients_of(encoder: FaceNetEncoder, loss: Tensor) -> list[Tensor]:
    return [g.cpu().double() for g in torch.autograd.grad(loss, list(encoder.parameters()))]


def assert_gradients_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-4) -> None:
    """Each parameter's by its norm; one that is all but 0, as a key's bias has, by that of all."""
    least = 1e-3 * torch.cat([w.flatten() for w in wanted]).norm()
    for i, (a, w) in enumerate(zip(found, wanted, strict=True)):
        error, bound = (a - w).norm(), tolerance * max(w.norm(), least)
        assert error <= bound, f"parameter {i}: error {error:.3g}, at most {bound:.3g} allowed"


def exact_gradients(encoder: FaceNetEncoder, inputs: list[Tensor]) -> list[Tensor]:
    """Of the straight encoder in float64 on the CPU."""
    oracle = copy.deepcopy(encoder).cpu().double()
    output = oracle(*(x.cpu().double() for x in inputs), impl="reference")
    return list(torch.autograd.grad(loss_of(output), list(oracle.parameters())))


@pytest.mark.parametrize("config", [SMALL_ENCODER, FaceNetConfig(dropout=0.0)], ids=["small", "paper"])
def test_a_training_step_has_the_gradients_of_float64(config):
    encoder, inputs = trained(config)
    found = gradients_of(encoder, loss_of(encoder(*inputs)))
    assert_gradients_close(found, exact_gradients(encoder, inputs))


def test_a_compiled_training_step():
    torch._dynamo.reset()
    encoder, inputs = trained()
    compiled = torch.compile(encoder, fullgraph=True, backend=BACKEND)
    found = gradients_of(encoder, loss_of(compiled(*inputs)))
    assert_gradients_close(found, exact_gradients(encoder, inputs))


@cuda_alone
def test_graph_training():
    encoder, inputs = trained()
    call = graph_training(encoder, *inputs)
    others = [moved(x) for x in encoder_inputs(SMALL_ENCODER, 4, dtype=torch.float32, seed=9)[:3]]
    for given in (inputs, others):
        assert_gradients_close(gradients_of(encoder, loss_of(call(*given))), exact_gradients(encoder, given))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(0.9)
    assert_gradients_close(gradients_of(encoder, loss_of(call(*others))), exact_gradients(encoder, others))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_training_with_a_scaler(low):
    encoder, inputs = trained(batch=8)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(ON, init_scale=1024.0)
    before_ffn = [p.detach().clone() for p in encoder.ffn.parameters()]
    with torch.autocast(ON, low):
        loss = loss_of(encoder(*inputs))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    wanted = torch.cat([g.flatten() for g in exact_gradients(encoder, inputs)])
    found = torch.cat([p.grad.cpu().double().flatten() for p in encoder.parameters()])
    assert F.cosine_similarity(found, wanted, dim=0) > 0.99
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0
    assert not any(map(torch.equal, encoder.ffn.parameters(), before_ffn))

    optimizer.zero_grad()
    before = [p.detach().clone() for p in encoder.parameters()]
    with torch.autocast(ON, low):
        loss = loss_of(encoder(*inputs)) * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # finds infinite gradients, and leaves the weights
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(map(torch.equal, encoder.parameters(), before))


@pytest.fixture
def process_group(tmp_path, monkeypatch) -> Iterator[None]:
    """One process alone."""
    distributed = torch.distributed
    for library in ("NCCL", "GLOO"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")  # there may be no other network
    backend = "nccl" if not REHEARSAL and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(process_group):
    encoder, inputs = trained()
    wanted = exact_gradients(encoder, inputs)
    parallel = torch.nn.parallel.DistributedDataParallel(encoder, device_ids=None if REHEARSAL else [0])
    for _ in range(2):  # the second step goes through buckets rebuilt after the first
        encoder.zero_grad()
        loss_of(parallel(*inputs)).backward()
        assert_gradients_close([p.grad.cpu().double() for p in encoder.parameters()], wanted)
