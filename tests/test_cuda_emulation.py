"""What CUDA kernels are built from, against plain PyTorch, and the emulation itself: it must notice what hangs a GPU.

On a machine with a GPU and nvcc the same kernels run on it too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "cuda_emulation" / "primitives.cu"
LOW = {torch.bfloat16: False, torch.float16: True}
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

specification = importlib.util.spec_from_file_location("cuda_emulation_build", HERE / "cuda_emulation" / "build.py")
emulation = importlib.util.module_from_spec(specification)
specification.loader.exec_module(emulation)

needs_compiler = pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler on this machine")


class Primitives:
    """The functions of primitives.cu on one device."""

    def __init__(self, library: Path, device: str):
        self.device = device
        self.functions = ctypes.CDLL(str(library))
        if device == "cpu":
            self.functions.test_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Tensor | int | bool) -> int:
        given = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a if isinstance(a, bool) else ctypes.c_int64(a)
            for a in arguments
        ]
        error = getattr(self.functions, name)(*given)
        return error or (self.functions.test_synchronize() if self.device == "cuda" else 0)

    def error(self, code: int) -> str:
        return self.functions.test_error(code).decode()


@pytest.fixture(scope="module")
def emulated() -> Primitives:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    primitives = Primitives(emulation.build(SOURCE), "cpu")
    primitives.functions.evc_fast_emulation(2, 0)
    return primitives


@pytest.fixture(scope="module", params=["emulation", "gpu"])
def primitives(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Primitives:
    if request.param == "emulation":
        return request.getfixturevalue("emulated")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not torch.cuda.is_available() or nvcc is None:
        pytest.skip("no GPU, or no nvcc, on this machine")
    major, minor = torch.cuda.get_device_capability()
    library = tmp_path_factory.mktemp("primitives") / "primitives.so"
    flags = [f"-arch=sm_{major}{minor}", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-shared", "-cudart=static"]
    subprocess.run([nvcc, *flags, str(SOURCE), "-o", str(library)], check=True)
    torch.zeros(1, device="cuda")  # the context in which the kernels run
    return Primitives(library, "cuda")


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_matrix_instructions_are_plain_products(primitives: Primitives, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(primitives.device, dtype)
    b = torch.randn(8, 16, generator=generator).to(primitives.device, dtype)
    c = torch.full((16, 8), torch.nan, device=primitives.device)
    assert primitives.call("test_product", LOW[dtype], a, b, c) == 0
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=0, atol=1e-5)
    one = torch.zeros(16, 16).to(primitives.device, dtype)
    one[3, 5] = 1  # which element meets which
    assert primitives.call("test_product", LOW[dtype], one, b, c) == 0
    assert torch.equal(c[3], b[:, 5].float())
    assert c.count_nonzero() == 8


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_conversions_are_torchs(primitives: Primitives, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ties = torch.cat([every, torch.nextafter(every, torch.tensor(torch.inf)), (every + every.roll(1)) / 2])
    scales = torch.tensor([1, 1e-4, 3e-5, 1e-7, 6e4, 1e38])
    x = torch.cat([ties, (middle[:, None] * scales).flatten(), torch.tensor([65519.0, 65520.0, 3.4e38, -0.0])])
    x = x.to(primitives.device)
    stored, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    assert primitives.call("test_convert", LOW[dtype], x, stored, back, x.numel()) == 0
    numbers = ~x.isnan()
    assert torch.equal(stored[numbers].view(torch.int16), x.to(dtype)[numbers].view(torch.int16))
    assert torch.equal(back[numbers], x.to(dtype).float()[numbers])
    assert stored[~numbers].isnan().all() and back[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_rows_of_any_length_and_alignment(primitives: Primitives, dtype: torch.dtype) -> None:
    values = torch.randn(1200, generator=torch.Generator().manual_seed(0)).to(primitives.device, dtype)
    for length in (0, 1, 3, 7, 8, 9, 64, 513, 1025):
        for first, second in ((0, 0), (1, 0), (0, 1), (3, 3), (8, 16)):
            to = torch.full((1300,), torch.nan, device=primitives.device, dtype=dtype)
            row, target = values[first : first + length], to[second : second + length]
            assert primitives.call("test_twice", NUMBERS[dtype], row, target, length) == 0
            assert torch.equal(target, 2 * row)
            assert to.isnan().sum() == 1300 - length


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_reductions(primitives: Primitives, threads: int) -> None:
    x = torch.randn(threads, generator=torch.Generator().manual_seed(threads)).to(primitives.device)
    sums, largest = torch.empty_like(x), torch.empty_like(x)
    assert primitives.call("test_reduce", threads, x, sums, largest) == 0
    torch.testing.assert_close(sums, x.sum().expand(threads))
    assert torch.equal(largest, x.max().expand(threads))
    x[threads // 2] = torch.nan
    assert primitives.call("test_reduce", threads, x, sums, largest) == 0
    assert sums.isnan().all() and largest.isnan().all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_grid_barrier(primitives: Primitives, blocks: int) -> None:
    threads, rounds = 96, 50
    n = blocks * threads
    x = torch.arange(n).float().to(primitives.device)
    assert primitives.call("test_shift", blocks, threads, x, rounds) == 0
    assert torch.equal(x.cpu(), (torch.arange(n) + rounds) % n + rounds)


# ---- what the emulation must notice ----

MISTAKES = [
    (0, "deadlock, of 64 threads 1 returned, 63 waiting at __syncthreads"),
    (1, "deadlock, of 64 threads 32 returned, 32 waiting at __syncthreads"),
    (2, "takes operations of whole warps only"),
    (3, "lanes of one warp wait at __syncwarp and at __shfl_xor_sync"),
    (4, "64 waiting for another thread's write"),
    (5, "block (0, 0, 0): wrote past the end of its shared memory"),
    (6, "block (0, 0, 0): wrote past the end of its shared memory"),
    (9, "deadlock"),
]


@pytest.mark.parametrize(("which", "message"), MISTAKES)
def test_emulation_names_the_mistake_and_goes_on(emulated: Primitives, which: int, message: str) -> None:
    x = torch.zeros(128)
    code = emulated.call("test_mistake", which, x)
    assert code == 719  # cudaErrorLaunchFailure
    assert message in emulated.error(code)
    assert emulated.call("test_shift", 2, 64, x, 3) == 0


def test_shared_memory_starts_as_nan_and_a_missing_barrier_shows_in_the_order_of_threads(emulated: Primitives) -> None:
    x = torch.zeros(64)
    assert emulated.call("test_mistake", 7, x) == 0
    assert x.isnan().all()
    results = []
    for order in (0, 1):
        emulated.functions.evc_fast_emulation(2, order)
        assert emulated.call("test_mistake", 8, x) == 0
        results.append(x.clone())
    emulated.functions.evc_fast_emulation(2, 0)
    assert not torch.equal(*[r.nan_to_num(-1) for r in results])


def test_emulation_refuses_launches_that_a_gpu_refuses(emulated: Primitives) -> None:
    for arguments, message in [
        ((1, 2048, 0, False), "a grid of 1 blocks of 2048 threads"),
        ((0, 64, 0, False), "a grid of 0 blocks"),
        ((1, 48, 0, False), "whole warps"),
        ((3, 64, 0, True), "too many blocks in a cooperative launch"),
    ]:
        code = emulated.call("test_launch", *arguments)
        assert code != 0
        assert message in emulated.error(code)
    assert emulated.call("test_launch", 1, 64, 300 << 10, False) == 1  # cudaErrorInvalidValue
    assert emulated.call("test_launch", 1, 64, 200 << 10, False) == 0
