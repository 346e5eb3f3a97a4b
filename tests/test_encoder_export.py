"""The encoder under torch.compile (whole graphs, few of them) and torch.export with a dynamic batch."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from evc_fast.model import FaceNetEncoder
from evc_fast.ops.dispatch import implementations
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, encoder_inputs

COMPILED_OPS = implementations("emotion_attention")[0].available  # then impl=None is the C++ kernels
IMPLS = [None, "reference"]
PATHS = ["merge_identical_triplets", "emotion_first_video_merge", "no_emotion", "no_bias_adjustment", "baseline"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """One thread (the tensors are small), and nothing compiled by another test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


class CountingBackend:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.compile = lookup_backend(name)
        self.graphs = 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return self.compile(module, example_inputs)


def batch_of(encoder: FaceNetEncoder, size: int) -> list[Tensor | None]:
    """Float32 inputs, their batch axis marked as the one that varies."""
    arguments = encoder_inputs(encoder.config, size, dtype=torch.float32, seed=size)
    if size > 1:
        for x in arguments:
            if x is not None:
                torch._dynamo.mark_dynamic(x, 0)
    return arguments


def assert_same_output(got, want, tolerance: float = 2e-5) -> None:
    got, want = (torch.utils._pytree.tree_leaves(tuple(x)) for x in (got, want))
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_for_batches_and_one_for_a_single_video(impl):
    encoder = build_encoder().float()
    backend = CountingBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    graphs = []
    with torch.no_grad():
        for size in (2, 3, 7, 1, 1, 5):
            arguments = batch_of(encoder, size)
            assert_same_output(
                compiled(*arguments, explain=True, impl=impl), encoder(*arguments, explain=True, impl=impl)
            )
            graphs.append(backend.graphs)
    assert graphs == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("options", PATHS)
def test_every_path_is_one_graph(options):
    encoder = build_encoder(**ENCODER_OPTIONS[options]).float()
    backend = CountingBackend("eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in (2, 4):
            arguments = batch_of(encoder, size)
            assert_same_output(compiled(*arguments), encoder(*arguments))
    assert backend.graphs == 1


def test_compiled_gradients():
    encoder = build_encoder().float()
    backend = CountingBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for size in (2, 5):
        arguments = batch_of(encoder, size)
        gradients = []
        for model in (encoder, compiled):
            output = model(*arguments)
            loss = output.tokens.square().mean() + output.emotion_logits.logsumexp(-1).mean()
            gradients.append(torch.autograd.grad(loss, list(encoder.parameters())))
        for (name, _), mine, expected in zip(encoder.named_parameters(), *gradients, strict=True):
            assert (mine - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-2), name
    assert backend.graphs == 1


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor():
    encoder = build_encoder().float()
    compiled = torch.compile(encoder, fullgraph=True)
    with torch.no_grad():
        for size in (2, 3):
            arguments = batch_of(encoder, size)
            assert_same_output(compiled(*arguments), encoder(*arguments))


@pytest.mark.parametrize(
    ("options", "impl"), [("paper", None), ("paper", "reference"), *((options, None) for options in PATHS)]
)
def test_export_with_dynamic_batch(options, impl):
    encoder = build_encoder(**ENCODER_OPTIONS[options]).float()
    batch = torch.export.Dim("batch")
    example = encoder_inputs(encoder.config, 3, dtype=torch.float32)
    shapes = [None if x is None else {0: batch} for x in example]
    names = ("video", "triplets", "similarity", "groups")
    with torch.no_grad():
        program = torch.export.export(
            encoder,
            tuple(example),
            {"impl": impl},
            dynamic_shapes=dict(zip(names, shapes, strict=True)) | {"impl": None},
        )
        for size in (1, 2, 9):
            arguments = encoder_inputs(encoder.config, size, dtype=torch.float32, seed=size)
            assert_same_output(program.module()(*arguments, impl=impl), encoder(*arguments, impl=impl))
    fused = {str(node.target) for node in program.graph.nodes if "evc_fast" in str(node.target)}
    assert bool(fused) == (COMPILED_OPS and impl is None)
