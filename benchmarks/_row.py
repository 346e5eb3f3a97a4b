"""One measured row of the table, in a process of its own: build, check, count, time.

The process prints its progress as lines ``@progress {"phase": ..., "fraction": ...}`` and writes its result as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from _bytes import caption_bytes
from _device import Device
from _impls import serving
from _machine import describe, dtype_name, measure_ceilings, peak_resident_bytes
from _parts import LLMS, NEW_TOKENS, NUM_BEAMS, Captioner, NotMeasured, RowSpec, build, check_row
from _stages import PREFIX, STAGES, STEP, TOWER, clock, flop_counter

from evc_fast.data.image_tower import fastest_dtype
from evc_fast.ops.dispatch import OPS, cpu_isa

PROGRESS = "@progress "
# Of the encoder's tokens, ours against reference, relative to the largest.
TOLERANCES = {"float32": 1e-4, "float64": 1e-9}
SEARCH = {"num_beams": NUM_BEAMS, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

Progress = Callable[[str, float], None]


class CheckFailed(Exception):
    """The row computes something else than it should: it is not timed."""


def run_row(spec: RowSpec, progress: Progress) -> dict:
    """Measure one row. Returns its record; "status" is "measured" or "skipped"."""
    row = {"method": spec.method, "decoder": spec.decoder, "spec": dataclasses.asdict(spec)}
    try:
        check_row(spec)
    except NotMeasured as reason:
        return row | {"status": "skipped", "reason": str(reason)}
    progress("building", 0.0)
    begin = time.perf_counter()
    captioner = build(spec)
    row["build_seconds"] = time.perf_counter() - begin
    row["parameters"] = captioner.parameters
    row["stand_ins"] = captioner.not_measured

    with torch.inference_mode():
        progress("checking", 0.15)
        row["check"], row["features"] = check_encoder(captioner, spec)
        folded = row["check"]["folded"]
        row["served_by"] = served_by(spec, folded)
        progress("counting FLOPs", 0.2)
        counted, ids = count_flops(captioner, spec, folded)
        row["ids"] = ids
        row["flops"] = accounting(counted, captioner.trained)
        captions, stages, steps = time_captions(captioner, spec, lambda done: progress("timing", 0.35 + 0.35 * done))
        row["time"] = statistics(captions)
        # Here, before anything but single captions has run in this process.
        row["memory"] = peak_memory(spec)
        progress("batch", 0.7)
        row["throughput"] = time_batch(captioner, spec, row["time"]["median_s"])
        moved = caption_bytes(captioner.pipeline, spec.video, NUM_BEAMS, NEW_TOKENS, folded=folded)
    row["stages"] = stage_records(captioner, spec, stages, counted, moved)
    row["step_seconds"] = steps
    progress("done", 1.0)
    return row | {"status": "measured"}


def served_by(spec: RowSpec, folded: bool) -> dict[str, str]:
    """Which implementation of each op a row runs; one op does all of the encoder where it is folded."""
    device = Device(spec.device)
    ops = ("folded_encoder",) if folded else OPS
    return {op: spec.impl or serving(op, device, torch.float32, gradients=False) for op in ops}


def check_encoder(captioner: Captioner, spec: RowSpec) -> tuple[dict, list[list[float]]]:
    """The encoder as it is chosen for speed against the straight one with reference ops, on this row's own input.

    Returns what was found, and the image features of the frames [N][D_v]. "folded": whether this row's encoder runs on
    its fold, told by tokens that are those of an explicit fold to the bit.
    """
    pipeline = captioner.pipeline
    frames = pipeline.read(spec.video).frames
    features = pipeline.encode_frames([frames])
    found = pipeline.retrieve(features)
    tokens = {}
    for impl in ("reference", None):
        pipeline.impl = impl
        tokens[impl] = pipeline.encode(features, found).tokens.double()
    with pipeline.folded():
        explicit = pipeline.encode(features, found).tokens.double()
    pipeline.impl = spec.impl
    reference = tokens["reference"]
    if not bool(reference.isfinite().all()):
        raise CheckFailed("the encoder's tokens are not finite")
    error = ((tokens[None] - reference).abs().max() / reference.abs().max()).item()
    tolerance = TOLERANCES[dtype_name(features.dtype)]
    if not error <= tolerance:
        raise CheckFailed(f"our ops change the tokens by {error:.2e} of the largest, allowed are {tolerance:.0e}")
    dtype = pipeline.model.decoder.dtype
    differ = tokens[None].to(dtype) != reference.to(dtype)
    check = {
        "encoder_error": error,
        "tolerance": tolerance,
        "folded": spec.impl is None and torch.equal(explicit, tokens[None]),
        "rounded_differently": int(differ.sum()),
        "elements": differ.numel(),
    }
    return check, features[0].tolist()


def check_ids(ids: torch.Tensor, captioner: Captioner) -> None:
    """Exactly NEW_TOKENS tokens a caption, none of them the end."""
    decoder = captioner.pipeline.model.decoder
    ends = torch.tensor(getattr(decoder, "eos_ids", (decoder.eos_id,)), device=ids.device)
    if ids.shape[-1] != NEW_TOKENS or bool(torch.isin(ids, ends).any()):
        raise CheckFailed(f"a timed caption must have exactly {NEW_TOKENS} new tokens, got ids {ids.tolist()}")


def caption(captioner: Captioner, spec: RowSpec) -> list[int]:
    """One caption of the video file, from the file to the text."""
    ids = captioner.pipeline(spec.video, explain=False, **SEARCH).ids
    check_ids(ids, captioner)
    return ids.tolist()


def count_flops(captioner: Captioner, spec: RowSpec, folded: bool) -> tuple[dict[str, int], list[int]]:
    """FLOPs (2 a multiply-add) of each stage of one caption, and its ids; this caption warms up too."""
    counter = flop_counter()
    folding = captioner.pipeline.folded() if folded else contextlib.nullcontext()
    with folding, counter, captioner.pipeline.attached(counter.get_total_flops) as probe:
        ids = caption(captioner, spec)
    counted = {stage: int(sum(gains)) for stage, gains in probe.gained.items()}
    counted["whole caption"] = counter.get_total_flops()
    return counted, ids


def accounting(counted: dict[str, int], trained: tuple[str, ...]) -> dict:
    """The paper's accounting, trained modules without CLIP and LLM, and the whole caption; each in both units."""
    flops = {"trained_modules": sum(counted[stage] for stage in trained), "whole_caption": counted["whole caption"]}
    return {name: {"flops": value, "multiply_adds": value // 2} for name, value in flops.items()}


def time_captions(
    captioner: Captioner, spec: RowSpec, progress: Callable[[float], None]
) -> tuple[list[float], dict[str, list[float]], list[list[float]]]:
    """Seconds of whole captions, of each stage in each caption, and of each decode step in each caption.

    Three captions and more as the budget allows, up to 50; fewer than three, but one, where these take three times the
    budget. `spec.repeats` overrides.
    """
    read = clock(spec.device)
    captions: list[float] = []
    stages: dict[str, list[float]] = {}
    steps: list[list[float]] = []
    begin = time.perf_counter()

    def share_done() -> float:
        if spec.repeats is not None:
            return len(captions) / spec.repeats
        spent = (time.perf_counter() - begin) / spec.budget
        return max(spent / 3, min(len(captions) / 3, max(len(captions) / 50, spent)))

    while not captions or share_done() < 1:
        with captioner.pipeline.attached(read) as probe:
            start = read()
            caption(captioner, spec)
            captions.append(read() - start)
        for stage, gains in probe.gained.items():
            stages.setdefault(stage, []).append(sum(gains))
        steps.append(probe.gained[STEP])
        progress(min(share_done(), 1.0))
    return captions, stages, steps


def time_batch(captioner: Captioner, spec: RowSpec, caption_seconds: float) -> dict:
    """Captions a second where `spec.batch` videos are captioned together; the best of the runs that a budget allows.

    Where the user leaves the batch open it is 4, or 2 where one caption takes more than 8 seconds.
    """
    batch = spec.batch or (2 if caption_seconds > 8 else 4)
    read = clock(spec.device)
    sources = [spec.video] * batch
    times: list[float] = []
    while not times or (len(times) < 10 and sum(times) < spec.budget / 3):
        start = read()
        for result in captioner.pipeline.caption_batch(sources, explain=False, **SEARCH):
            check_ids(result.ids, captioner)
        times.append(read() - start)
    return {"batch": batch, "captions_per_s": batch / min(times), "runs": len(times)}


def statistics(seconds: list[float]) -> dict:
    """Median, 95th percentile (interpolated), minimum, and all of them."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return {
        "median_s": values.quantile(0.5).item(),
        "p95_s": values.quantile(0.95).item(),
        "min_s": values.min().item(),
        "captions": len(seconds),
        "all_s": seconds,
    }


def peak_memory(spec: RowSpec) -> dict:
    """Largest resident set of this process, load included; on a GPU, the largest allocation there too."""
    memory = {"resident_bytes": peak_resident_bytes()}
    if spec.device.startswith("cuda"):
        memory["gpu_bytes"] = torch.cuda.max_memory_reserved(spec.device)
    return memory


def stage_records(
    captioner: Captioner,
    spec: RowSpec,
    seconds: dict[str, list[float]],
    counted: dict[str, int],
    moved: dict[str, int],
) -> list[dict]:
    """Each stage of STAGES: medians over the captions, all runs of a stage together; shares add up to 1."""
    measured = [stage for stage in STAGES if stage in seconds and stage not in captioner.not_measured]
    medians = {stage: statistics(seconds[stage])["median_s"] for stage in measured}
    total = sum(medians.values())
    towers = dtype_name(captioner.tower_dtype)
    records = []
    for stage in STAGES:
        if stage in captioner.not_measured:
            records.append({"stage": stage, "not_measured": captioner.not_measured[stage]})
        elif stage in medians:
            runs = 1
            if stage == STEP:
                runs = NEW_TOKENS - (spec.decoder == "opt-2.7b")
            llm = spec.decoder in LLMS and stage in (PREFIX, STEP)
            records.append(
                {
                    "stage": stage,
                    "runs": runs,
                    "seconds": medians[stage],
                    "min_seconds": min(seconds[stage]),
                    "share": medians[stage] / total,
                    "flops": counted.get(stage, 0),
                    "bytes": moved.get(stage),
                    "dtype": spec.dtype if llm else towers if stage == TOWER else "float32",
                }
            )
    return records


def machine_record(device: str, dtype: str, threads: int, quick: bool) -> dict:
    """The machine and its ceilings, measured in a process of its own too."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return {"status": "skipped", "reason": f"no device {device}: this PyTorch sees no GPU"}
    record = describe(device, threads)
    record["kernels_isa"] = cpu_isa()
    dtypes = [torch.float32, getattr(torch, dtype)]
    if device == "cpu":
        dtypes.append(fastest_dtype())  # of the image tower
    dtypes = list(dict.fromkeys(dtypes))
    return record | {"ceilings": measure_ceilings(device, dtypes, quick=quick)}


def print_progress(phase: str, fraction: float) -> None:
    print(PROGRESS + json.dumps({"phase": phase, "fraction": fraction}), flush=True)


def main(task_path: str, result_path: str) -> int:
    """Run the task in one file and write its record to the other. 0: done or skipped; 1: the record holds the error."""
    task = json.loads(Path(task_path).read_text())
    threads = task["row"]["threads"] if "row" in task else task["machine"]["threads"]
    torch.set_num_threads(threads)
    code = 0
    try:
        record = run_row(RowSpec(**task["row"]), print_progress) if "row" in task else machine_record(**task["machine"])
    except Exception as error:  # whatever it is, the table reports it and goes on with the next row
        traceback.print_exc(file=sys.stderr)
        record, code = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}, 1
    Path(result_path).write_text(json.dumps(record))
    return code
