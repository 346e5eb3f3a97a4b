"""Measure what this device can do: bandwidth, matrix peaks, and what a launch costs. Needs PyTorch alone.

python benchmarks/ceilings.py --device cuda
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from _device import Device, add_arguments, device_of
from _machine import describe, measure_ceilings
from _page import publish, terminal
from _report import Table

LAUNCHES = 100


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"], help="of matrix products")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "local",
        help="folder of ceilings.json and ceilings.md (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    arguments.on = device_of(arguments, parser)
    return arguments


def launch_seconds(device: Device) -> dict[str, float]:
    """Of one kernel that does next to nothing: launched by itself, and in a CUDA graph of many."""
    x = torch.ones(1, device=device.name)

    def launches() -> None:
        for _ in range(LAUNCHES):
            x.mul_(1.0)

    replay = device.captured(launches)
    each = {"launched": launches, "in a graph": replay}
    return {how: min(device.pace(run, device.calls(run)) for _ in range(5)) / LAUNCHES for how, run in each.items()}


def table(ceilings: dict) -> Table:
    rows = [[f"{kind} bandwidth, GB/s", f"{ceilings[f'{kind}_bytes_per_s'] / 1e9:,.1f}"] for kind in ("read", "copy")]
    rates = ceilings["matrix_flops_per_s_library"].items()
    rows += [[f"matrix products in {name}, TFLOP/s", f"{rate / 1e12:,.2f}"] for name, rate in rates]
    costs = ceilings["launch_s"].items()
    rows += [[f"a kernel that does nothing, {how}, us", f"{seconds * 1e6:.2f}"] for how, seconds in costs]
    return Table("Ceilings", ["what", "measured"], rows)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    device = arguments.on
    torch.set_num_threads(arguments.threads)
    machine = describe(device.name, arguments.threads) | {"kernels_isa": "none needed"}
    dtypes = [getattr(torch, name) for name in arguments.dtype]
    ceilings = measure_ceilings(device.name, dtypes, quick=device.rehearsal)
    machine["ceilings"] = ceilings | {"launch_s": launch_seconds(device)}
    said = [
        "Each the best of many runs of plain PyTorch, products on random values, in buffers far larger than the "
        "caches; a copy's bytes are counted as read and as written. tf32 is off."
    ]
    title = device.title("What the device can do, measured")
    publish(terminal(), arguments.out, "ceilings", title, {"machine": machine}, [table(machine["ceilings"])], said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
