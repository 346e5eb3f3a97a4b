"""Products with packed weights: every size, type and activation against float64, the same bits for any threads."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evc_fast.ops import dispatch
from evc_fast.ops.packed_linear import PackedLinear, pack_weight

HAS_CPP = dispatch.implementations(dispatch.OPS[0])[0].available
pytestmark = pytest.mark.skipif(not HAS_CPP, reason="built with EVC_FAST_NO_EXTENSION=1: there are no packed weights")

TYPES = [torch.float32, torch.bfloat16, torch.float64]
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
# (rows, in, out): below, at and above a vector, a panel, a block of depth (256) and a block of rows (64)
SIZES = [
    (1, 1, 1),
    (2, 3, 5),
    (3, 17, 1),
    (5, 1, 33),
    (7, 31, 31),
    (6, 32, 32),
    (13, 33, 47),
    (63, 255, 65),
    (64, 256, 64),
    (65, 257, 96),
    (70, 300, 301),
    (130, 600, 37),
    (1, 1000, 127),
    (259, 40, 200),
]


@pytest.fixture(autouse=True)
def threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def drawn(rows: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight in ``dtype``; input, bias and residual in the type it accumulates in."""
    g = torch.Generator().manual_seed(rows * 10007 + width * 101 + out)
    made = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((out, width), (rows, width), (out,))]
    residual = torch.randn(rows, out, generator=g, dtype=torch.float64)
    wide = accumulator(dtype)
    return (made[0] / math.sqrt(width)).to(dtype), made[1].to(wide), made[2].to(wide), residual.to(wide)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    product = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    result = ACTIVATIONS[activation](product)
    return result if residual is None else result + residual.double()


def rounds_inputs(dtype: torch.dtype) -> bool:
    """Where the machine multiplies pairs of bfloat16, inputs are rounded to it too."""
    x = torch.full((1, 1), 1 + 2**-12)
    return dtype == torch.bfloat16 and PackedLinear(torch.ones(1, 1, dtype=dtype))(x).item() != x.item()


def bound(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a sum may err by [rows, out]: each term and each addition rounds once, few of them the same way."""
    eps = torch.finfo(torch.bfloat16 if rounds_inputs(dtype) else accumulator(dtype)).eps
    size = x.double().abs() @ weight.double().abs().T
    return 2 * eps * (size + 1) * (1 if rounds_inputs(dtype) else math.sqrt(x.shape[1]) + 4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_values(dtype, activation):
    for rows, width, out in SIZES:
        weight, x, bias, residual = drawn(rows, width, out, dtype)
        for b, r in itertools.product((None, bias), (None, residual)):
            got = PackedLinear(weight, b, activation)(x, r)
            assert got.shape == (rows, out)
            assert got.dtype == accumulator(dtype)
            error = (got.double() - exact(x, weight, b, r, activation)).abs()
            allowed = bound(x, weight, dtype) * (1 if b is None and r is None else 3)
            what = f"{(rows, width, out)}, bias {b is not None}, residual {r is not None}: {error.max():.3g}"
            assert (error <= allowed).all(), what


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_values_of_all_small_sizes(dtype):
    """Every tail of rows, depth and columns that a tile can leave."""
    for rows, width, out in itertools.product(range(1, 15), (1, 2, 3, 31, 32, 33), range(1, 36)):
        weight, x, bias, residual = drawn(rows, width, out, dtype)
        error = (
            PackedLinear(weight, bias, "gelu")(x, residual).double() - exact(x, weight, bias, residual, "gelu")
        ).abs()
        assert (error <= 3 * bound(x, weight, dtype)).all(), (rows, width, out)


@pytest.mark.parametrize("dtype", TYPES)
def test_no_rows(dtype):
    weight, _, bias, _ = drawn(1, 9, 4, dtype)
    layer = PackedLinear(weight, bias, "gelu")
    for shape in ((0, 9), (0, 3, 9), (3, 0, 9)):
        x = torch.empty(shape, dtype=layer.dtype)
        assert layer(x).shape == (*shape[:-1], 4)
        assert layer(x, torch.empty(*shape[:-1], 4, dtype=layer.dtype)).shape == (*shape[:-1], 4)


@pytest.mark.parametrize("dtype", TYPES)
def test_leading_axes_and_layouts(dtype):
    weight, x, bias, residual = drawn(12, 35, 21, dtype)
    layer = PackedLinear(weight, bias)
    want = layer(x, residual)
    assert torch.equal(layer(x[5], residual[5]), want[5])
    assert torch.equal(layer(x.view(2, 3, 2, 35), residual.view(2, 3, 2, 21)), want.view(2, 3, 2, 21))
    assert torch.equal(layer(x.T.contiguous().T, residual.T.contiguous().T), want)
    apart = x.new_full((12, 71), 9.0)[:, 1::2]
    apart.copy_(x)
    assert torch.equal(layer(apart, residual), want)
    assert torch.equal(layer(x[:1].expand(12, -1), residual[:1].expand(12, -1)), want[:1].expand(12, -1))
    assert torch.equal(layer(x[3:7], residual[3:7]), want[3:7])
    swapped = PackedLinear(weight.T.contiguous().T, bias)
    assert torch.equal(swapped(x, residual), want)
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(PackedLinear(weight, spread)(x, residual), want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_same_bits_for_any_rows_and_threads(dtype, activation):
    for width, out in ((37, 21), (300, 130)):
        weight, x, bias, residual = drawn(200, width, out, dtype)
        layer = PackedLinear(weight, bias, activation)
        want = layer(x, residual)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 16, 63, 64, 65, 129, 200):
                first = 200 - rows
                got = layer(x[first:], residual[first:])
                assert torch.equal(got, want[first:]), f"{threads} threads, {rows} rows of {width}"
                assert torch.equal(layer(x[:rows], residual[:rows]), want[:rows])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_knows_nothing_of_others(dtype):
    weight, x, bias, residual = drawn(70, 33, 45, dtype)
    layer = PackedLinear(weight, bias, "gelu")
    want = layer(x, residual)
    for row, value in ((0, float("nan")), (37, float("inf")), (69, float("nan"))):
        spoilt = x.clone()
        spoilt[row, 5] = value
        got = layer(spoilt, residual)
        assert not got[row].isfinite().all()
        others = torch.arange(70) != row
        assert torch.equal(got[others], want[others])
    assert torch.equal(layer(x, residual), want), "nothing stays in the scratch"


@pytest.mark.parametrize("dtype", TYPES)
def test_a_column_knows_nothing_of_others(dtype):
    weight, x, bias, _ = drawn(9, 33, 45, dtype)
    want = PackedLinear(weight, bias)(x)
    for column in (0, 31, 44):
        spoilt = weight.clone()
        spoilt[column, 7] = float("nan")
        got = PackedLinear(spoilt, bias)(x)
        assert got[:, column].isnan().all()
        others = torch.arange(45) != column
        assert torch.equal(got[:, others], want[:, others])


def through(activation: str, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An activation alone: a product with 1 and no bias; numbers of 1 row, so that whole vectors and tails both run."""
    layer = PackedLinear(torch.ones(1, 1, dtype=dtype), None, activation)
    tails = layer(x[:, None])[:, 0]
    wide = PackedLinear(torch.ones(35, 1, dtype=dtype), None, activation)(x[:, None])
    assert torch.equal(wide.nan_to_num(7.0), tails[:, None].expand(-1, 35).nan_to_num(7.0))
    return tails


def dense_grid() -> Tensor:
    steps = torch.linspace(-12, 12, 400_001, dtype=torch.float64).float()
    magnitudes = torch.logspace(-38, 4, 5_000, dtype=torch.float64).float()
    return torch.cat([steps, magnitudes, -magnitudes, torch.tensor([0.0, -0.0])])


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_accuracy_of_the_activations(activation):
    x = dense_grid()
    want = ACTIVATIONS[activation](x.double())
    error = (through(activation, x).double() - want).abs()
    assert (error <= 5e-7 * x.double().abs().clamp(min=1)).all(), f"{error.max():.3g} at {x[error.argmax()]}"
    # Relative where the result is not a difference of nearly equal numbers.
    near = x > -0.5
    assert (error[near] <= 1e-6 * want[near].abs() + 1e-38).all()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_accuracy_of_the_activations_in_float64(activation):
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    want = ACTIVATIONS[activation](x)
    error = (through(activation, x, torch.float64) - want).abs()
    assert (error <= 5e-16 * x.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_inputs_of_the_activations(activation, dtype):
    x = torch.tensor([1e4, -1e4, 3e38, -3e38, float("inf"), float("nan"), 88.0, -88.0, -104.0, 5.7, -5.7])
    if rounds_inputs(dtype):
        x = x.bfloat16().float()
    x = x.to(accumulator(dtype))
    got, want = through(activation, x, dtype), ACTIVATIONS[activation](x.double())
    finite = x.isfinite()
    assert ((got.double() - want).abs() <= 5e-7 * x.double().abs().clamp(min=1))[finite].all()
    assert torch.equal(got[~finite].nan_to_num(7.0), x[~finite].nan_to_num(7.0))
    # PyTorch's own answer to x -> -inf is 0 or NaN, by implementation: ours must not be anything else.
    least = through(activation, torch.tensor([-float("inf")], dtype=x.dtype), dtype)[0]
    assert least == -float("inf") if activation == "none" else (least.isnan() or least.abs() == 0)


def test_no_gradients_and_nothing_written():
    weight, x, bias, residual = drawn(5, 9, 4, torch.float32)
    kept = [t.clone() for t in (weight, x, bias, residual)]
    layer = PackedLinear(weight.requires_grad_(), bias.requires_grad_(), "gelu")
    got = layer(x.requires_grad_(), residual.requires_grad_())
    assert not got.requires_grad
    for t, k in zip((weight, x, bias, residual), kept, strict=True):
        assert torch.equal(t, k)
    before = got.clone()
    with torch.no_grad():
        layer(x + 1, residual)
        weight.zero_()
        bias.zero_()
    assert torch.equal(got, before)
    assert torch.equal(layer(x, residual), before), "weights and bias are a snapshot"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PackedLinear(torch.ones(3)), ValueError, "packed_linear: weight must be [out, in]; got [3]"),
        (lambda: PackedLinear([[1.0]]), TypeError, "packed_linear: weight must be a tensor [out, in]; got list"),
        (lambda: PackedLinear(torch.ones(0, 3)), ValueError, "with out of 1 or more; got [0, 3]"),
        (lambda: PackedLinear(torch.ones(3, 0)), ValueError, "with in of 1 or more; got [3, 0]"),
        (lambda: PackedLinear(torch.ones(3, 2).long()), TypeError, "packed_linear: weight must be float32"),
        (
            lambda: PackedLinear(torch.ones(3, 2).half()),
            TypeError,
            "weight must be float32, bfloat16 or float64 on the CPU",
        ),
        (lambda: PackedLinear(torch.ones(3, 2, device="meta")), TypeError, "on the CPU"),
        (lambda: PackedLinear(torch.ones(3, 2), torch.ones(2)), ValueError, "packed_linear: bias must be [3]; got [2]"),
        (lambda: PackedLinear(torch.ones(3, 2), torch.ones(3, 1)), ValueError, "packed_linear: bias must be [3]"),
        (lambda: PackedLinear(torch.ones(3, 2), None, "relu"), ValueError, "activation must be one of"),
        (
            lambda: PackedLinear(torch.ones(3, 2), torch.ones(3, device="meta")),
            ValueError,
            "bias must be on the CPU; it is on",
        ),
        (
            lambda: PackedLinear(torch.ones(3, 2), torch.ones(3).long()),
            TypeError,
            "bias must be floating; got [3] torch.int64",
        ),
        (lambda: PackedLinear(torch.ones(3, 2), [1.0, 2.0, 3.0]), TypeError, "bias must be a tensor [3]; got list"),
        (lambda: pack_weight(torch.ones(3, 2)), ValueError, "pack_weight: weight must be [groups, out, in]"),
    ],
)
def test_what_packing_refuses(make, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p(torch.ones(4, 3)), ValueError, "packed_linear: input must be [4, 2]; got [4, 3]"),
        (lambda p: p(torch.ones(4, 2).double()), TypeError, "packed_linear: input must be torch.float32; got"),
        (lambda p: p(torch.ones(4, 2).bfloat16()), TypeError, "packed_linear: input must be torch.float32; got"),
        (lambda p: p(torch.tensor(1.0)), ValueError, "input must be [2]; got []"),
        (lambda p: p(torch.ones(4, 2, device="meta")), ValueError, "input must be on the CPU; it is on meta"),
        (
            lambda p: p(torch.ones(4, 2), torch.ones(4, 2)),
            ValueError,
            "packed_linear: residual must be [4, 3]; got [4, 2]",
        ),
        (lambda p: p(torch.ones(4, 2), torch.ones(1, 3)), ValueError, "residual must be [4, 3]; got [1, 3]"),
        (lambda p: p(torch.ones(4, 2), torch.ones(4, 3).double()), TypeError, "residual must be torch.float32; got"),
        (
            lambda p: p(torch.ones(4, 2), torch.ones(4, 3, device="meta")),
            ValueError,
            "residual must be on the CPU; it is on",
        ),
    ],
)
def test_what_a_call_refuses(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        call(PackedLinear(torch.ones(3, 2)))
    assert "\n" not in str(raised.value)


def test_the_op_itself_reads_no_memory_that_is_not_there():
    weight, x, bias, residual = drawn(5, 9, 4, torch.float32)
    packed = pack_weight(weight[None])
    call = torch.ops.evc_fast.packed_linear
    call(x, packed, bias, residual, 4, 1)
    for arguments in (
        (x[:, 1:], packed, bias, residual, 4, 1),
        (x, packed, bias[1:], residual, 4, 1),
        (x, packed, bias, residual[1:], 4, 1),
        (x, packed, bias, residual, 400, 1),
        (x, packed, bias, residual, 0, 1),
        (x, packed, bias, residual, -1, 1),
        (x, packed, bias, residual, 4, 3),
        (x, packed, bias, residual, 4, -1),
        (x.double(), packed, bias, residual, 4, 1),
        (x, packed[:, 1:], bias, residual, 4, 1),
        (x, packed.double(), bias, residual, 4, 1),
    ):
        with pytest.raises(RuntimeError):
            call(*arguments)


@pytest.mark.parametrize("dtype", TYPES)
def test_opcheck(dtype):
    for rows in (0, 5):
        weight, x, bias, residual = drawn(max(rows, 1), 9, 4, dtype)
        packed = pack_weight(weight[None])
        for arguments in ((bias, residual[:rows], 4, 1), (None, None, 4, 0)):
            torch.library.opcheck(
                torch.ops.evc_fast.packed_linear.default,
                (x[:rows], packed, *arguments),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_compile_and_flops():
    torch._dynamo.reset()
    weight, x, bias, residual = drawn(5, 9, 4, torch.float32)
    layer = PackedLinear(weight, bias, "gelu")
    compiled = torch.compile(lambda a, b: layer(a, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, residual), layer(x, residual))
    with FlopCounterMode(display=False) as counter:
        layer(x.view(1, 5, 9), residual.view(1, 5, 4))
    assert counter.get_total_flops() == 2 * 5 * 9 * 4
