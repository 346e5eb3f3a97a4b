"""Run every CUDA kernel once or twice on small and on the paper's sizes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/every_kernel.py

Inputs are made on the CPU, and results are compared there with the float64 reference, so that next to nothing but our
kernels runs on the GPU. Exit code: 0; 1 where a result is wrong; 3 where the kernels cannot run here.
"""

from __future__ import annotations

import argparse
import sys

import torch
from _device import Device, add_arguments, device_of
from _impls import obstacle, stand_in
from torch import Tensor

from evc_fast.ops import dispatch
from evc_fast.testing.cases import Case, cases
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, cast_inputs, encoder_inputs, named_outputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OP_CASES = ("paper", "odd", "tiny", "one-triplet", "one-frame", "many-frames", "groups", "chunks")
ENCODER_BATCHES = (1, 3)
PAPER_BATCHES = (1, 2, 8, 32)
PAPER = {"video_dim": 512, "text_dim": 512, "dim": 300, "emotion_dim": 300, "num_queries": 32, "num_heads": 4}
PAPER |= {"ffn_dim": 1200, "output_dim": 2048, "k": 4, "n": 16, "w": 179}
# Far above any rounding of the type, far below what a wrong index does.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}
UNAVAILABLE = 3


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    first, *rest = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog="\n\n".join(rest), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.on = device_of(arguments, parser)
    return arguments


def error_of(found: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest value; inf where a value is not finite."""
    if wanted.numel() == 0:
        return 0.0
    difference = (found.cpu().double() - wanted).abs().nan_to_num(nan=float("inf")).max()
    return (difference / wanted.abs().max().clamp_min(1e-30)).item()


def run_op(case: Case, dtype: torch.dtype, device: Device) -> float:
    """The largest relative error of an op's outputs."""
    tensors = case.inputs(dtype)
    wanted = case.plain(*(t.double() if t.is_floating_point() else t for t in tensors))
    with torch.no_grad():
        found = case.call(*(t.to(device.name) for t in tensors), impl=stand_in("cuda", device))
    return max(error_of(a, b) for a, b in zip(found, wanted, strict=True))


@torch.no_grad()
def run_encoder(sizes: dict, batches: tuple[int, ...], dtype: torch.dtype, device: Device) -> float:
    """The largest relative error of the folded encoder's results at several batch sizes, explanation included."""
    encoder = build_encoder(**sizes)
    folded = encoder.fold(dtype=torch.float32).to(device.name, dtype)  # its products on the CPU
    worst = 0.0
    for batch in batches:
        inputs = encoder_inputs(encoder.config, batch)
        wanted = named_outputs(encoder(*inputs, explain=True, impl="reference"))
        given = [x if x is None else x.to(device.name) for x in cast_inputs(inputs, dtype)]
        for explain in (False, True):
            found = named_outputs(folded(*given, explain=explain, impl=stand_in("cuda", device)))
            for name, tensor in found.items():
                if tensor is not None:
                    worst = max(worst, error_of(tensor, wanted[name]))
    return worst


def work(device: Device) -> list[tuple[str, torch.dtype, object]]:
    """What is run: its name, its type, and a call that gives the largest relative error."""
    found = []
    for dtype in DTYPES:
        if obstacle("folded_encoder", stand_in("cuda", device), device, dtype):
            continue  # of a rehearsal: no float16 on a CPU
        for op in (op for op in dispatch.OPS if not obstacle(op, stand_in("cuda", device), device, dtype)):
            chosen = [case for case in cases(op) if case.name in OP_CASES]
            found += [(case.id, dtype, lambda c=case, t=dtype: run_op(c, t, device)) for case in chosen]
        options = ENCODER_OPTIONS if dtype == torch.bfloat16 else {"paper": {}}
        found += [
            (f"folded_encoder-{name}", dtype, lambda o=option, t=dtype: run_encoder(o, ENCODER_BATCHES, t, device))
            for name, option in options.items()
        ]
        if not device.rehearsal:
            run = lambda t=dtype: run_encoder(PAPER, PAPER_BATCHES, t, device)  # noqa: E731
            found.append(("folded_encoder at the paper's sizes", dtype, run))
    return found


def main(argv: list[str] | None = None) -> int:
    device = parse_arguments(argv).on
    torch.set_num_threads(1)
    reason = obstacle("folded_encoder", stand_in("cuda", device), device, torch.float32)
    if reason:
        print(f"not measured: {reason}")
        return UNAVAILABLE
    wrong = 0
    todo = work(device)
    for name, dtype, run in todo:
        error = run()
        good = error <= TOLERANCE[dtype]
        wrong += not good
        print(f"{'ok   ' if good else 'WRONG'} {name}, {str(dtype).removeprefix('torch.')}: {error:.1e}", flush=True)
    device.synchronise()
    print(f"{len(todo)} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
