"""The folded encoder's products and functions one by one: who multiplies faster, and what all of them take alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from _machine import best_seconds
from _report import MISSING, Table, milliseconds
from torch import Tensor
from torch.nn import functional as F

from evc_fast.ops.packed_linear import PackedLinear

NEAR = 4  # videos whose functions are timed at once, of larger batches too: few enough to stay in the caches


@dataclass(frozen=True)
class Product:
    """`count` products a video of [rows, depth] and [depth, columns], the right operand a weight or computed."""

    about: str
    rows: int
    depth: int
    columns: int
    count: int = 1
    fixed: bool = True

    def flops(self, batch: int) -> int:
        return 2 * batch * self.count * self.rows * self.depth * self.columns


# At the paper's sizes: N = 16, K = 4, d = 300, W = 179, N_q = 32, 4 heads, F = 1200, D_v = D_t = 512, d_out = 2048.
PRODUCTS = (
    Product("V of the frames", 16, 512, 300),
    Product("all products of V", 16, 300, 2229),
    Product("keys and values of the triplets", 12, 512, 600),
    Product("a head's values through the FFN and the router", 12, 75, 1216, 4),
    Product("Attn_c's scores", 16, 75, 3, 16, False),
    Product("the FFN's first layer of H", 16, 12, 1216, 4, False),
    Product("the FFN's second layer", 64, 1200, 300),
    Product("Attn_d's q", 64, 300, 300),
    Product("Attn_d's scores of a head", 64, 75, 179, 4),
    Product("Attn_d's values of a head", 64, 179, 75, 4),
    Product("the visual gate", 16, 300, 16, 4, False),
    Product("emotions of the frames", 16, 16, 300, 4, False),
    Product("phi_E", 16, 300, 300),
    Product("the fact-emotion gates", 1, 600, 600),
    Product("the emotion head", 1, 300, 179),
    Product("scores and values of the memory", 32, 300, 428),
    Product("the memory, read", 32, 48, 75, 4, False),
    Product("the tokens", 32, 300, 2048),
)

# Rows a video, their width, and the function.
FUNCTIONS: tuple[tuple[str, int, int, Callable[[Tensor], Tensor]], ...] = (
    ("GELU", 64, 1200, F.gelu),
    ("softmax over the dictionary", 256, 179, functools.partial(F.softmax, dim=-1)),
    ("softmax over the memory", 128, 48, functools.partial(F.softmax, dim=-1)),
    ("softmax over the triplets' parts", 256, 3, functools.partial(F.softmax, dim=-1)),
    ("softmax over the frames", 64, 16, functools.partial(F.softmax, dim=-1)),
    ("LayerNorm", 64, 300, lambda x: F.layer_norm(x, x.shape[1:])),
    ("tanh", 2, 300, torch.tanh),
)


def measure_parts(batches: Sequence[int]) -> list[dict]:
    """Seconds of each part at each batch size: by the library, and of products by ours, in turns."""
    found = []
    for batch in batches:
        for product in PRODUCTS:
            runs = _multiplications(product, batch)
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(4):
                for name, run in runs.items():
                    best[name] = min(best[name], best_seconds(run, "cpu", budget=0.03))
            shape = [batch * product.rows if product.fixed else product.rows, product.depth, product.columns]
            record = {"batch": batch, "about": product.about, "shape": shape, "flops": product.flops(batch)}
            record["count"] = product.count * (1 if product.fixed else batch)
            found.append(record | {"seconds": best})
        near = min(batch, NEAR)
        for about, rows, width, function in FUNCTIONS:
            run = functools.partial(function, torch.randn(near * rows, width))
            least = min(best_seconds(run, "cpu", budget=0.03) for _ in range(2)) * batch / near
            shape = [batch * rows, width]
            found.append({"batch": batch, "about": about, "shape": shape, "count": 1, "seconds": {"library": least}})
    return found


def _multiplications(product: Product, batch: int) -> dict[str, Callable[[], object]]:
    count, depth, columns = product.count, product.depth, product.columns
    if not product.fixed:
        left, right = torch.randn(batch * count, product.rows, depth), torch.randn(batch * count, depth, columns)
        return {"library": functools.partial(torch.bmm, left, right)}
    data = torch.randn(batch * product.rows, depth)
    weights, bias = torch.randn(count, columns, depth), torch.randn(columns)
    packed = [PackedLinear(weight, bias) for weight in weights]
    return {
        "library": lambda: [F.linear(data, weight, bias) for weight in weights],
        "ours": lambda: [linear(data) for linear in packed],
    }


def seconds_of_parts(found: list[dict], batch: int) -> float:
    """All parts at one batch size, each by the faster of the two."""
    return sum(min(part["seconds"].values()) for part in found if part["batch"] == batch)


def parts_table(found: list[dict], batch: int) -> Table:
    """Rates and times of the parts at one batch size, a row a part."""
    rows, slower = [], []
    for part in (part for part in found if part["batch"] == batch):
        seconds = part["seconds"]
        rates = {name: part["flops"] / each / 1e9 for name, each in seconds.items()} if "flops" in part else {}
        if "ours" in seconds and seconds["ours"] > seconds["library"]:
            slower.append(part["about"])
        rows.append(
            [
                part["about"],
                (f"{part['count']} of " if part["count"] > 1 else "") + " x ".join(map(str, part["shape"])),
                *(f"{rates[name]:,.0f}" if name in rates else MISSING for name in ("library", "ours")),
                f"{seconds['library'] / seconds['ours']:.2f}" if "ours" in seconds else MISSING,
                milliseconds(min(seconds.values())),
            ]
        )
    rows.append(["sum", *[MISSING] * 4, milliseconds(seconds_of_parts(found, batch))])
    said = [
        "Each alone, operands in the caches, float32, by the faster of library and ours; products with weights have a "
        "bias. Functions are PyTorch's, without the residuals, the routing and the calibration beside them.",
        f"Slower than the library: {', '.join(slower)}." if slower else "None of ours is slower than the library's.",
        "The folded encoder takes ours for all of them.",
    ]
    columns = ["part", "rows x depth x columns", "library, GFLOP/s", "ours, GFLOP/s", "ours / library", "ms"]
    return Table(f"Its parts, B = {batch}", columns, rows, said)
