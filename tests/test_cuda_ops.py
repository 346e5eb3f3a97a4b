"""The three ops' inference kernels: the shared cases, through the emulation, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evc_fast import ops
from evc_fast.ops import _cuda, dispatch
from evc_fast.ops._library import EXTENSION, EXTENSION_MISSING
from evc_fast.testing.cases import CASES, DIFFERENTIABLE, LAYOUTS, Case, benchmark_case, cases
from evc_fast.testing.tolerances import FORWARD_FACTOR, assert_as_good_as_plain

HERE = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVED = tuple(op for op in _cuda.OPS if op in dispatch.OPS)
OURS = [case for case in CASES if case.op in SERVED]
# Beyond the shared list: rows in groups, and scratch that no shared memory holds.
LARGE = [
    Case("emotion_attention", "triplets-in-one-task", {"B": 3, "K": 7, "N": 9, "W": 21, "d": 24}, {"num_heads": 2}),
    Case("emotion_attention", "groups-of-rows", {"B": 1, "K": 2, "N": 150, "W": 33, "d": 22}, {"num_heads": 2}),
    Case("emotion_attention", "workspace", {"B": 1, "K": 2, "N": 5, "W": 4500, "d": 6}, {"num_heads": 3}),
    Case("emotion_attention", "wide-workspace", {"B": 1, "K": 1, "N": 70, "W": 9, "d": 900}, {"num_heads": 1}),
    Case("entropy_calibration", "many-triplets", {"B": 2, "K": 70, "D": 5}, groups="random"),
]

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


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def moved(tensor: Tensor, device: str) -> Tensor:
    """The same values behind the same strides."""
    storage = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def leaves_the_range(case: Case, dtype: torch.dtype) -> bool:
    """1e4-sized features of several sigmas are infinite in float16 before the op starts."""
    return dtype == torch.float16 and "1e4" in case.name


def check_against_plain(case: Case, tensors: list[Tensor], call: Callable[..., tuple[Tensor, ...]]) -> None:
    oracle = case.plain(*[t.cpu().double() if t.is_floating_point() else t.cpu() for t in tensors])
    plain = case.plain(*[t.cpu() for t in tensors])
    for i, (a, p, o) in enumerate(zip(call(*tensors), plain, oracle, strict=True)):
        assert torch.isfinite(a).all() or not torch.isfinite(o).all(), f"output {i} is not finite"
        assert_as_good_as_plain(a.cpu(), p, o, FORWARD_FACTOR, f"output {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*OURS, *LARGE], ids=lambda c: c.id)
def test_values(case: Case, dtype: torch.dtype, device: str) -> None:
    if leaves_the_range(case, dtype):
        pytest.skip("its features leave float16's range")
    check_against_plain(case, on(device, case.inputs(dtype)), lambda *t: case.call(*t, impl="cuda"))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("case", [c for c in OURS if c.name in ("odd", "tiny", "groups")], ids=lambda c: c.id)
def test_strided_inputs(case: Case, layout: str, device: str) -> None:
    for dtype in DTYPES:
        tensors = [moved(t, device) for t in case.inputs(dtype, layout)]
        check_against_plain(case, tensors, lambda *t: case.call(*t, impl="cuda"))


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same contiguous values, so many elements beyond an aligned address."""
    room = tensor.new_empty(tensor.numel() + elements)
    room[elements:] = tensor.flatten()
    return room[elements:].view(tensor.shape)


@pytest.mark.parametrize("case", [c for c in OURS if c.name in ("paper-one", "odd", "groups")], ids=lambda c: c.id)
def test_addresses_of_any_alignment(case: Case, device: str) -> None:
    for dtype in DTYPES:
        tensors = on(device, case.inputs(dtype))
        expected = case.call(*tensors, impl="cuda")
        for elements in (1, 2, 3):
            others = [shifted(t, elements) for t in tensors]
            for a, e in zip(case.call(*others, impl="cuda"), expected, strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in OURS if c.name in ("paper", "odd", "chunks", "groups")], ids=lambda c: c.id
)
def test_same_bits_at_any_grid_size_and_batch_position(case: Case, dtype: torch.dtype, device: str) -> None:
    tensors = on(device, case.inputs(dtype))
    expected = case.call(*tensors, impl="cuda")
    for count in (1, 2, 7):
        with blocks(count):
            for a, e in zip(case.call(*tensors, impl="cuda"), expected, strict=True):
                assert torch.equal(a, e)
    shared = {1, 2} if case.op == "emotion_attention" else set()  # the dictionary has no batch
    last = case.sizes["B"] - 1
    alone = case.call(*[t if i in shared else t[last:] for i, t in enumerate(tensors)], impl="cuda")
    assert all(torch.equal(a[0], e[last]) for a, e in zip(alone, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [c for c in OURS if c.name in ("paper", "odd", "many-frames", "many-triplets")], ids=lambda c: c.id
)
def test_no_order_of_threads_and_no_number_of_multiprocessors_changes_a_bit(
    case: Case, dtype: torch.dtype, emulator: Emulator
) -> None:
    tensors = case.inputs(dtype)
    expected = case.call(*tensors, impl="cuda")
    try:
        for multiprocessors, order in ((2, 1), (1, 0), (500, 1)):
            emulator.configure(multiprocessors, order)
            for a, e in zip(case.call(*tensors, impl="cuda"), expected, strict=True):
                assert torch.equal(a, e)
    finally:
        emulator.configure()


@pytest.mark.parametrize("op", SERVED)
def test_one_launch_and_none_for_an_empty_batch(op: str, emulator: Emulator) -> None:
    for batch, launches in ((0, 0), (1, 1), (3, 1)):
        case = benchmark_case(op, batch)
        before = emulator.launches()
        case.call(*case.inputs(torch.bfloat16), impl="cuda")
        assert emulator.launches() - before == launches


@pytest.mark.parametrize("op", SERVED)
def test_nan_propagates(op: str, device: str) -> None:
    for dtype in DTYPES:
        case = Case(op, "nan", cases(op)[0].sizes, cases(op)[0].options)
        for i in range(len(case.inputs())):
            tensors = on(device, case.inputs(dtype))
            tensors[i].view(-1)[0] = torch.nan
            assert case.call(*tensors, impl="cuda")[0].isnan().any(), f"input {i}"


def inference_arguments(case: Case, tensors: list[Tensor]) -> tuple:
    """The arguments of the op below its public function."""
    if case.op == "entropy_calibration":
        triplets, similarity, *groups = tensors
        return triplets, similarity.float(), *(groups or [None]), True, True
    if case.op == "emotion_attention":
        return *tensors, case.options["num_heads"]
    return *tensors[:2], tensors[2].float()


SMALL = [c for c in OURS if c.name in ("groups", "odd")]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.id)
def test_opcheck(case: Case, device: str) -> None:
    inference = getattr(torch.ops.evc_fast, f"{case.op}_inference").default
    for dtype in DTYPES:
        torch.library.opcheck(
            inference,
            inference_arguments(case, on(device, case.inputs(dtype))),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.id)
def test_kernels_called_below_the_contract_check_their_memory(case: Case, device: str) -> None:
    arguments = inference_arguments(case, on(device, case.inputs()))
    inference = getattr(torch.ops.evc_fast, f"{case.op}_inference")
    for i, good in enumerate(arguments):
        if not isinstance(good, Tensor):
            continue
        retyped = good.double() if good.is_floating_point() else good.int()
        for bad in (good[:, :-1], retyped, good[None], good.narrow(-1, 0, 0)):
            with pytest.raises(RuntimeError, match="evc_fast: "):
                inference(*arguments[:i], bad, *arguments[i + 1 :])


@pytest.mark.parametrize("op", SERVED)
def test_gradients_and_other_types_are_refused_before_anything_runs(op: str, device: str) -> None:
    case = cases(op)[0]
    tensors = on(device, case.inputs())
    with pytest.raises(RuntimeError, match=f'{op}: impl="cuda" cannot run: it has no gradients'):
        case.call(tensors[0].requires_grad_(), *tensors[1:], impl="cuda")
    with torch.no_grad():
        for a, e in zip(case.call(*tensors, impl="cuda"), case.plain(*tensors), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=f'{op}: impl="cuda" cannot run: it takes float32, bfloat16 and float16'):
        case.call(*on(device, case.inputs(torch.float64)), impl="cuda")


AT_THE_EDGE = """
import ctypes, importlib.util, mmap, sys
import torch
from evc_fast.ops import _cuda
from evc_fast.testing.cases import CASES

torch.set_num_threads(1)
_cuda.load_emulation(sys.argv[1])
libc = ctypes.CDLL(None)
held = []

def at_the_edge(tensor):
    '''The same values; the page after the last one cannot be read.'''
    if tensor.numel() == 0:
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
for case in CASES:
    if case.op in _cuda.OPS and case.name in ("paper", "odd", "tiny", "one-word", "many-frames", "groups", "narrow"):
        for dtype in (torch.float32, torch.bfloat16):
            tensors = case.inputs(dtype)
            expected = case.call(*tensors, impl="cuda")
            actual = case.call(*[at_the_edge(t) for t in tensors], impl="cuda")
            assert all(map(torch.equal, actual, expected)), case.id
            count += 1
print(count)
"""


UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")  # misaligned vectors, overflows, shifts, bounds


@pytest.mark.parametrize(
    "flags", [pytest.param((), id="as-shipped"), pytest.param(UNDEFINED, id="sanitized", marks=pytest.mark.slow)]
)
def test_nothing_is_read_past_the_end_of_the_inputs(emulator: Emulator, flags: tuple[str, ...], tmp_path: Path) -> None:
    script = tmp_path / "edge.py"
    script.write_text(AT_THE_EDGE)
    paths = os.pathsep.join(filter(None, [str(Path(ops.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script), str(emulation.build(flags=flags))],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20


# ---- on a GPU alone ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@needs_gpu
@pytest.mark.parametrize("op", SERVED)
def test_a_graph_replays_the_kernels_on_new_values(op: str) -> None:
    case = benchmark_case(op, 2)
    tensors = on("cuda", case.inputs(torch.bfloat16))
    case.call(*tensors, impl="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.call(*tensors, impl="cuda")
    for held, new in zip(tensors, case.inputs(torch.bfloat16, seed=5), strict=True):
        held.copy_(new)
    graph.replay()
    for a, e in zip(outputs, case.call(*tensors, impl="cuda"), strict=True):
        assert torch.equal(a, e)


@needs_gpu
@pytest.mark.parametrize("op", SERVED)
def test_kernels_run_on_the_current_stream(op: str) -> None:
    case = benchmark_case(op, 2)
    tensors = on("cuda", case.inputs())
    expected = case.call(*tensors, impl="cuda")
    stream = torch.cuda.Stream()
    late = [torch.full_like(t, torch.nan) for t in tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # another stream would read the values before they are there
        for held, new in zip(late, tensors, strict=True):
            held.copy_(new)
        outputs = case.call(*late, impl="cuda")
    stream.synchronize()
    assert all(map(torch.equal, outputs, expected))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU alone")
def test_kernels_run_on_the_tensors_own_device() -> None:
    for op in SERVED:
        case = cases(op)[0]
        outputs = case.call(*on("cuda:1", case.inputs()), impl="cuda")
        assert {o.device.index for o in outputs} == {1}
        for a, e in zip(outputs, case.call(*on("cuda:0", case.inputs()), impl="cuda"), strict=True):
            assert torch.equal(a.cpu(), e.cpu())


@needs_gpu
@pytest.mark.parametrize("op", SERVED)
def test_the_fastest_without_gradients_is_differentiable_with_them(op: str) -> None:
    case = cases(op)[0]
    tensors = on("cuda", case.inputs())
    outputs = case.call(*[t.requires_grad_(t.is_floating_point()) for t in tensors])
    assert tuple(o.requires_grad for o in outputs) == DIFFERENTIABLE[op]
