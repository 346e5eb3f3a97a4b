"""The folded encoder's CUDA kernel: through the emulation, whose fresh memory is NaN, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evc_fast import ops
from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.model.folded import fold_weights, folded_options
from evc_fast.ops import _cuda, dispatch
from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING
from evc_fast.ops.folded_cuda import pack_folded_encoder_cuda
from evc_fast.ops.folded_encoder import folded_sizes
from evc_fast.reference.folded_encoder import FoldedOptions, FoldedOutput, FoldedWeights
from evc_fast.reference.folded_encoder import folded_encoder as reference
from evc_fast.testing.encoder_cases import (
    ENCODER_OPTIONS,
    ENCODER_SIZES,
    ODD_WIDTHS,
    build_encoder,
    cast_inputs,
    encoder_inputs,
    named_outputs,
)
from evc_fast.testing.tolerances import FORWARD_FACTOR, assert_as_good_as_plain, error_bound, largest_error

HERE = Path(__file__).resolve().parent
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Configurations whose stages differ from the paper's.
STAGES = (
    "paper",
    "router_video",
    "no_retrieval",
    "no_emotion",
    "baseline",
    "emotion_first",
    "emotion_first_no_retrieval",
)

specification = importlib.util.spec_from_file_location("cuda_emulation_build", HERE / "cuda_emulation" / "build.py")
emulation = importlib.util.module_from_spec(specification)
specification.loader.exec_module(emulation)

pytestmark = pytest.mark.usefixtures("one_thread")


class Emulator:
    """The emulated GPU's settings."""

    def __init__(self, library: Path):
        self.functions = ctypes.CDLL(str(library))
        self.functions.evc_fast_emulation_launches.restype = ctypes.c_int64

    def configure(self, multiprocessors: int = 2, order: int = 0) -> None:
        self.functions.evc_fast_emulation(multiprocessors, order)

    def launches(self) -> int:
        return self.functions.evc_fast_emulation_launches()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """CPU tensors on impl="cuda", for the tests of this module alone."""
    if EXTENSION_MISSING or emulation.compiler() is None:
        pytest.skip(EXTENSION_MISSING or "no C++ compiler on this machine")
    library = emulation.build()
    _cuda.load_emulation(library)
    found = Emulator(library)
    found.configure()
    yield found
    _cuda._emulated = False
    for cached in (_cuda.missing, _cuda.unfit, dispatch.implementations):
        cached.cache_clear()


@pytest.fixture(scope="module", params=["emulation", "gpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors of a test lie."""
    if request.param == "emulation":
        request.getfixturevalue("emulator")
        return "cpu"
    if not torch.cuda.is_available() or not _cuda.LIBRARY_PATH.exists():
        pytest.skip("no GPU on this machine, or no library for it")
    if reason := _cuda._load(_cuda.LIBRARY_PATH):  # whether or not the emulation serves the CPU
        pytest.skip(reason)
    return "cuda"


@contextmanager
def blocks(count: int) -> Iterator[None]:
    """Every launch has this grid size."""
    EXTENSION.evc_fast_cuda_blocks(count)
    try:
        yield
    finally:
        EXTENSION.evc_fast_cuda_blocks(0)


class Folded:
    """An encoder's folded weights in one type, packed on one device."""

    def __init__(self, encoder: FaceNetEncoder, dtype: torch.dtype, device: str = "cpu") -> None:
        self.config, self.dtype, self.device = encoder.config, dtype, device
        self.options: FoldedOptions = folded_options(encoder.config, encoder.fact_norm.eps)
        self.weights: FoldedWeights = fold_weights(encoder, dtype)
        self.on_device = FoldedWeights(*(None if w is None else w.to(device) for w in self.weights))
        self.packed = pack_folded_encoder_cuda(self.on_device, self.options)

    def inputs(self, batch: int) -> list[Tensor | None]:
        return encoder_inputs(self.config, batch, dtype=self.dtype)

    def cuda(self, arguments: list[Tensor | None], explain: bool = True) -> FoldedOutput:
        moved = [None if x is None else x.to(self.device) for x in arguments]
        with torch.no_grad():
            return ops.folded_encoder(
                *moved, self.on_device, self.options, packed=self.packed, explain=explain, impl="cuda"
            )

    def plain(self, arguments: list[Tensor | None]) -> FoldedOutput:
        return reference(*arguments, self.weights, self.options, explain=True)

    def op_arguments(self, batch: int) -> list:
        moved = [None if x is None else x.to(self.device) for x in self.inputs(batch)]
        sizes = folded_sizes(self.on_device, self.options)
        return [*moved, self.packed, sizes, self.options.norm_eps, True]


def values(output: FoldedOutput) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in output._asdict().items() if x is not None}


def assert_equal_bits(actual: FoldedOutput, expected: FoldedOutput) -> None:
    for name, tensor in values(expected).items():
        assert torch.equal(values(actual)[name], tensor), name


@torch.no_grad()
def check(encoder: FaceNetEncoder, batches: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: str) -> None:
    """Against float64: as good as plain PyTorch on the same folded weights; in float32 also tight."""
    wide = fold_weights(encoder, torch.float64)
    options = folded_options(encoder.config, encoder.fact_norm.eps)
    for dtype in dtypes:
        folded = Folded(encoder, dtype, device)
        for batch in batches:
            arguments = folded.inputs(batch)
            exact = values(reference(*cast_inputs(arguments, torch.float64), wide, options, explain=True))
            plain, actual = values(folded.plain(arguments)), values(folded.cuda(arguments))
            assert actual.keys() == exact.keys()
            for name, expected in exact.items():
                what = f"{dtype}, B = {batch}, {name}"
                got, largest = actual[name], expected.abs().max().item()
                assert got.shape == expected.shape and got.dtype == plain[name].dtype, what
                # Of a handful of values plain PyTorch may be exact by luck.
                few = 8 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
                bound = max(error_bound(got.dtype, plain[name], expected, FORWARD_FACTOR), few * largest)
                error = largest_error(got, expected)
                assert error <= bound, f"{what}: error {error:.3g} against float64, at most {bound:.3g} allowed"
                if dtype == torch.float32:
                    assert error <= 1e-5 * largest, what


@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_every_option(options: dict, device: str) -> None:
    for k, n, w in (ENCODER_SIZES[0], ENCODER_SIZES[-1]):
        check(build_encoder(**options, k=k, n=n, w=w), (1, 3), DTYPES, device)


@pytest.mark.slow
@pytest.mark.parametrize("options", ENCODER_OPTIONS.values(), ids=ENCODER_OPTIONS)
def test_every_option_and_size(options: dict, device: str) -> None:
    for k, n, w in ENCODER_SIZES:
        check(build_encoder(**options, k=k, n=n, w=w), (1, 2, 3), DTYPES, device)


@pytest.mark.parametrize("widths", ODD_WIDTHS.values(), ids=ODD_WIDTHS)
def test_widths(widths: dict, device: str) -> None:
    check(build_encoder(**widths), (2,), (torch.float32, torch.bfloat16), device)


@pytest.mark.slow
@pytest.mark.parametrize("widths", ODD_WIDTHS.values(), ids=ODD_WIDTHS)
def test_widths_with_every_stage(widths: dict, device: str) -> None:
    for options in STAGES:
        check(build_encoder(**ENCODER_OPTIONS[options] | widths), (1, 3), DTYPES, device)


def paper_encoder() -> FaceNetEncoder:
    torch.manual_seed(0)
    encoder = FaceNetEncoder(FaceNetConfig()).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


def test_the_papers_sizes(device: str) -> None:
    check(paper_encoder(), (1,), (torch.bfloat16,), device)


@pytest.mark.slow
def test_the_papers_sizes_in_every_type(device: str) -> None:
    check(paper_encoder(), (2,), DTYPES, device)


@pytest.mark.parametrize("options", STAGES)
def test_an_explanation_changes_nothing_else(options: str, device: str) -> None:
    folded = Folded(build_encoder(**ENCODER_OPTIONS[options]), torch.bfloat16, device)
    arguments = folded.inputs(2)
    short, full = folded.cuda(arguments, explain=False), folded.cuda(arguments)
    assert all(x is None for x in short[2:])
    assert torch.equal(short.tokens, full.tokens)
    if short.emotion_logits is not None:
        assert torch.equal(short.emotion_logits, full.emotion_logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", STAGES)
def test_same_bits_at_any_grid_size_and_batch_position(options: str, dtype: torch.dtype, device: str) -> None:
    folded = Folded(build_encoder(**ENCODER_OPTIONS[options], n=18), dtype, device)
    arguments = folded.inputs(3)
    expected = folded.cuda(arguments)
    # Blocks must be resident together: as many as the emulated GPU has multiprocessors.
    counts = (1, 2, 7) if device == "cuda" else (1, 2)
    for count in counts:
        with blocks(count):
            assert_equal_bits(folded.cuda(arguments), expected)
    for video in range(3):
        alone = values(folded.cuda([None if x is None else x[video : video + 1] for x in arguments]))
        for name, tensor in values(expected).items():
            assert torch.equal(alone[name][0], tensor[video]), name


@pytest.mark.parametrize("options", STAGES)
def test_no_order_of_threads_and_no_number_of_blocks_changes_a_bit(options: str, emulator: Emulator) -> None:
    folded = Folded(build_encoder(**ENCODER_OPTIONS[options]), torch.bfloat16)
    arguments = folded.inputs(3)
    expected = folded.cuda(arguments)
    try:
        for multiprocessors, order in ((2, 1), (1, 0), (7, 0), (7, 1)):
            emulator.configure(multiprocessors, order)
            assert_equal_bits(folded.cuda(arguments), expected)
    finally:
        emulator.configure()


def test_one_launch_and_none_for_an_empty_batch(emulator: Emulator) -> None:
    folded = Folded(build_encoder(), torch.bfloat16)
    for batch, launches in ((0, 0), (1, 1), (5, 1)):
        before = emulator.launches()
        output = folded.cuda(folded.inputs(batch))
        assert emulator.launches() - before == launches
        assert len(output.tokens) == len(output.routing_weights) == batch


@pytest.mark.parametrize("options", STAGES)
def test_extreme_features(options: str, device: str) -> None:
    """Sharp softmaxes, saturated gates, constant features: finite results, as good as plain PyTorch's."""
    encoder = build_encoder(**ENCODER_OPTIONS[options])
    folded, wide = Folded(encoder, torch.float32, device), fold_weights(encoder, torch.float64)
    for scale in (0.0, 1e-30, 30.0, 1e4):
        video, triplets, *rest = folded.inputs(3)
        arguments = [video * scale, triplets if triplets is None else triplets * min(scale, 30.0), *rest]
        exact = values(reference(*cast_inputs(arguments, torch.float64), wide, folded.options, explain=True))
        plain = values(folded.plain(arguments))
        for name, got in values(folded.cuda(arguments)).items():
            what = f"scale {scale}: {name}"
            assert got.isfinite().all(), what
            # Large scores: a softmax of their rounding is the result, so that errors are draws of another order.
            factor = FORWARD_FACTOR if scale < 30 else 8 * FORWARD_FACTOR
            bound = error_bound(got.dtype, plain[name], exact[name], factor)
            bound = max(bound, 8 * torch.finfo(torch.float32).eps * exact[name].abs().max().item())
            assert largest_error(got, exact[name]) <= bound, what


def test_nan_propagates(device: str) -> None:
    for dtype in DTYPES:
        folded = Folded(build_encoder(), dtype, device)
        for i in range(3):
            arguments = folded.inputs(2)
            arguments[i][1].view(-1)[0] = torch.nan
            tokens = folded.cuda(arguments).tokens
            assert tokens[1].isnan().any(), f"input {i}"
            assert tokens[0].isfinite().all(), f"input {i}"


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same contiguous values, so many elements beyond an aligned address."""
    room = tensor.new_empty(tensor.numel() + elements)
    room[elements:] = tensor.flatten()
    return room[elements:].view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_of_any_alignment_layout_and_type(dtype: torch.dtype, device: str) -> None:
    folded = Folded(build_encoder(video_dim=40, text_dim=72), dtype, device)
    video, triplets, similarity, groups = (None if x is None else x.to(device) for x in folded.inputs(2))
    expected = folded.cuda([video, triplets, similarity, groups])
    for elements in (1, 2, 3):
        moved = [shifted(x, elements) for x in (video, triplets, similarity)]
        assert_equal_bits(folded.cuda([*moved, groups]), expected)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (video, triplets, similarity)]
    assert_equal_bits(folded.cuda([*strided, groups]), expected)
    # The same values in float32; the entropies of (11) are summed in another order.
    wide = values(folded.cuda([*cast_inputs([video, triplets, similarity], torch.float32), groups]))
    for name, tensor in values(expected).items():
        rounding = 4 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(wide[name], tensor, rtol=rounding, atol=rounding * tensor.abs().max().item())


def test_similarity_of_the_weights_type(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        folded = Folded(build_encoder(), dtype, device)
        arguments = folded.op_arguments(2)
        narrow = torch.ops.evc_fast.folded_encoder_cuda(*arguments)
        arguments[2] = arguments[2].float()
        for a, b in zip(narrow, torch.ops.evc_fast.folded_encoder_cuda(*arguments), strict=True):
            assert torch.equal(a, b)


def test_sizes_that_no_block_holds_are_refused_before_anything_runs(emulator: Emulator) -> None:
    folded = Folded(build_encoder(num_queries=4000), torch.bfloat16)
    before = emulator.launches()
    with pytest.raises(RuntimeError, match=r"needs \d+ bytes of shared memory for N = 5, d = 16 and N_q = 4000.*impl="):
        folded.cuda(folded.inputs(1))
    assert emulator.launches() == before
    sizes = folded_sizes(folded.on_device, folded.options)
    assert "needs" in _cuda.folded_obstacle(sizes, 5, folded.on_device.ffn_weight)
    assert "no size may be 0" in _cuda.folded_obstacle([0, *sizes[1:]], 5, folded.on_device.ffn_weight)
    fitting = Folded(build_encoder(), torch.bfloat16)
    sizes = folded_sizes(fitting.on_device, fitting.options)
    assert _cuda.folded_obstacle(sizes, 5, fitting.on_device.ffn_weight) == ""


@torch.no_grad()
def test_a_folded_module_takes_the_kernel(emulator: Emulator) -> None:
    encoder = build_encoder().double()
    folded = encoder.fold(dtype=torch.float32)
    arguments = cast_inputs(encoder_inputs(encoder.config, 2, dtype=torch.float64), torch.float32)
    before = emulator.launches()
    found = folded(*arguments, explain=True, impl="cuda")
    assert emulator.launches() - before == 1
    plain = named_outputs(folded(*arguments, explain=True, impl="reference"))
    oracle = named_outputs(encoder(*cast_inputs(arguments, torch.float64), explain=True))
    for name, value in named_outputs(found).items():
        assert_as_good_as_plain(value, plain[name], oracle[name], FORWARD_FACTOR, name)


def test_a_kernel_called_below_the_contract_checks_its_memory(device: str) -> None:
    arguments = Folded(build_encoder(), torch.bfloat16, device).op_arguments(2)
    op = torch.ops.evc_fast.folded_encoder_cuda

    def refuse(index: int, bad: object, sentence: str) -> None:
        with pytest.raises(RuntimeError, match=sentence):
            op(*arguments[:index], bad, *arguments[index + 1 :])

    video, triplets, similarity, _, packed, sizes, *_ = arguments
    for index, good, name in ((0, video, "video"), (1, triplets, "triplets"), (2, similarity, "similarity")):
        refuse(index, good.narrow(-1, 0, good.shape[-1] - 1), f"{name} does not have the size")
        refuse(index, good.double(), f"{name} has another type")
    refuse(1, None, "triplets and similarity belong to retrieval")
    refuse(3, torch.zeros(2, 3, device=device), "groups has another type")
    refuse(4, packed[:-1], "not a folded encoder")
    refuse(4, [packed[0][1:], *packed[1:]], "a folded weight does not have the size")
    refuse(4, [packed[0].float(), *packed[1:]], "a folded weight has another type")
    refuse(4, [shifted(packed[0], 1), *packed[1:]], "a folded weight is not aligned")
    refuse(5, sizes[:-1], "not a folded encoder")
    refuse(5, [0, *sizes[1:]], "no size may be 0")


def test_opcheck(device: str) -> None:
    for options in ("paper", "no_emotion", "no_retrieval"):
        folded = Folded(build_encoder(**ENCODER_OPTIONS[options]), torch.bfloat16, device)
        torch.library.opcheck(
            torch.ops.evc_fast.folded_encoder_cuda.default,
            tuple(folded.op_arguments(2)),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_what_cannot_be_packed_or_differentiated_is_refused(device: str) -> None:
    encoder = build_encoder()
    with pytest.raises(TypeError, match="weights must be float32, bfloat16 or float16"):
        pack_folded_encoder_cuda(fold_weights(encoder, torch.float64), folded_options(encoder.config))
    folded = Folded(encoder, torch.float32, device)
    video, *rest = (None if x is None else x.to(device) for x in folded.inputs(1))
    with pytest.raises(RuntimeError, match='impl="cuda" cannot run: it has no gradients'):
        ops.folded_encoder(video.requires_grad_(), *rest, folded.on_device, folded.options, impl="cuda")


AT_THE_EDGE = """
import ctypes, mmap, sys
import torch
from evc_fast.model.folded import fold_weights, folded_options
from evc_fast.ops import _cuda
from evc_fast.ops.folded_cuda import pack_folded_encoder_cuda
from evc_fast.ops.folded_encoder import folded_sizes
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, encoder_inputs

torch.set_num_threads(1)
_cuda.load_emulation(sys.argv[1])
libc = ctypes.CDLL(None)
held = []

def at_the_edge(tensor):
    '''The same values; the page after the last one cannot be read.'''
    if tensor is None or tensor.numel() == 0:
        return tensor
    bytes_ = tensor.numel() * tensor.element_size()
    room = (bytes_ + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    held.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    moved = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - bytes_)
    return moved.view(tensor.shape).copy_(tensor)

count = 0
for name in ("paper", "equal_widths", "merge_identical_triplets", "no_emotion", "no_retrieval", "emotion_first"):
    for widths in ({}, {"video_dim": 40, "text_dim": 24}, {"video_dim": 7, "text_dim": 5, "n": 17}):
        encoder = build_encoder(**ENCODER_OPTIONS[name] | widths)
        options = folded_options(encoder.config)
        for dtype in (torch.float32, torch.bfloat16):
            weights = fold_weights(encoder, dtype)
            packed = pack_folded_encoder_cuda(weights, options)
            inputs = encoder_inputs(encoder.config, 2, dtype=dtype)
            rest = folded_sizes(weights, options), options.norm_eps, True
            op = torch.ops.evc_fast.folded_encoder_cuda
            expected = op(*inputs, packed, *rest)
            # Weights are to be aligned: those of another length than whole vectors cannot end at the edge.
            edged = [at_the_edge(x) if x.numel() * x.element_size() % 16 == 0 else x for x in packed]
            actual = op(*map(at_the_edge, inputs), edged, *rest)
            assert all(map(torch.equal, actual, expected)), name
            count += 1
print(count)
"""


def run_at_the_edge(library: Path, folder: Path) -> None:
    script = folder / "edge.py"
    script.write_text(AT_THE_EDGE)
    paths = os.pathsep.join(filter(None, [str(Path(ops.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), str(library)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 36


def test_nothing_is_read_past_the_end_of_inputs_and_weights(emulator: Emulator, tmp_path: Path) -> None:
    run_at_the_edge(emulation.build(), tmp_path)


@pytest.mark.slow
def test_nothing_undefined_is_done(emulator: Emulator, tmp_path: Path) -> None:
    """Misaligned vectors, overflows, shifts."""
    run_at_the_edge(emulation.build(flags=("-fsanitize=undefined", "-fno-sanitize-recover=all")), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no CUDA toolkit on this machine")
@pytest.mark.parametrize("architecture", ["80"])  # 90: with the whole library, in test_cuda_build.py
def test_blocks_fit_a_multiprocessor_without_spills(architecture: str, tmp_path: Path) -> None:
    source = HERE.parent / "csrc/cuda/folded_encoder.cu"
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    kernels = done.stderr.split("Compiling entry function ")[1:]
    assert len(kernels) == len(DTYPES)
    for kernel in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel
        registers = int(re.search(r"Used (\d+) registers", kernel)[1])
        assert -(-registers // 8) * 8 * 256 <= 65536, "a block of 256 threads has more registers than a multiprocessor"


# ---- on a GPU alone ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@needs_gpu
def test_a_graph_replays_the_kernel_on_new_values() -> None:
    folded = Folded(paper_encoder(), torch.bfloat16, "cuda")
    held = [None if x is None else x.cuda() for x in folded.inputs(2)]
    folded.cuda(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = folded.cuda(held)
    for seed in (5, 6):
        new = encoder_inputs(folded.config, 2, dtype=torch.bfloat16, seed=seed)
        for to, source in zip(held, new, strict=True):
            if to is not None:
                to.copy_(source)
        graph.replay()
        assert_equal_bits(output, folded.cuda(new))


@needs_gpu
def test_calls_on_several_streams_do_not_disturb_each_other() -> None:
    folded = Folded(paper_encoder(), torch.bfloat16, "cuda")
    arguments = [[None if x is None else x.cuda() for x in folded.inputs(batch)] for batch in (1, 2, 3, 4)]
    expected = [folded.cuda(a) for a in arguments]
    streams = [torch.cuda.Stream() for _ in arguments]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(50):
        for stream, a in zip(streams, arguments, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(folded.cuda(a))
    torch.cuda.synchronize()
    for i, output in enumerate(outputs):
        assert_equal_bits(output, expected[i % len(expected)])
