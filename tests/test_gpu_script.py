"""benchmarks/gpu.sh rehearsed on a CPU, and the pieces that it puts together: timing, rows, targets, pages."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for a script there

import _device  # noqa: E402
import _encoder_gpu  # noqa: E402
import _gpu_summary  # noqa: E402
import _impls  # noqa: E402
import _ops_gpu  # noqa: E402
import _training_gpu  # noqa: E402
import encoder  # noqa: E402
import every_kernel  # noqa: E402
import lora  # noqa: E402
import ops  # noqa: E402
import training  # noqa: E402

from evc_fast.ops import dispatch  # noqa: E402
from evc_fast.testing.cases import benchmark_case  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = BENCHMARKS / "gpu.sh"
GPU = _device.Device("cpu", rehearsal=True)
CEILINGS = {
    "read_bytes_per_s": 4e12,
    "copy_bytes_per_s": 4e12,
    "matrix_flops_per_s": {"float32": 5e13, "bfloat16": 8e14, "float16": 8e14},
    "matrix_flops_per_s_library": {"float32": 5e13, "bfloat16": 8e14, "float16": 8e14},
}


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    command = [shutil.which("bash"), str(SCRIPT), *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=570)


# ---- the script ----


def test_the_script_in_pieces(tmp_path):
    """Two parts and no build; what they left is summed up, and every part's log is there."""
    done = run_script(str(tmp_path / "out"), "--installed", "--only", "memcheck ceilings", EVC_FAST_GPU_DRY_RUN="1")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["logs.tar.gz", "results.json", "summary.md", "tables.md"]
    found = json.loads((out / "results.json").read_text())
    assert list(found) == ["ceilings"]
    assert found["ceilings"]["machine"]["ceilings"]["launch_s"]["in a graph"] > 0
    page = (out / "summary.md").read_text()
    assert done.stdout.endswith(page)  # printed last
    assert "| ceilings | ok |" in page
    assert re.search(r"\| memcheck \| ok \| \d+ \| \d+ cases, 0 wrong \|", page)
    assert "A rehearsal on a CPU" in page
    tables = (out / "tables.md").read_text()
    assert "# What the device can do, measured: a rehearsal on a CPU, no figure means anything" in tables
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {Path(name).name for name in logs.getnames()} == {"logs", "ceilings.txt", "memcheck.txt"}


@pytest.mark.slow
def test_the_whole_script(tmp_path):
    """Every part but the build, which the packaging tests make."""
    done = run_script(str(tmp_path / "out"), "--installed", "--cpu", "--seconds", "560")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [
        "ceilings",
        "tests",
        "memcheck",
        "racecheck",
        "encoder",
        "training",
        "efficiency",
        "ops",
        "compiled",
        "lora",
    ]
    for part in parts:
        assert f"| {part} | ok |" in done.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found) == ["ceilings", "encoder", "training", "efficiency", "ops", "compiled", "lora"]
    for text in ("G2, B = 1, bfloat16, in a CUDA graph:", "G3, B = 256", "G4, B = 32, dropout 0.1, ours"):
        assert text in done.stdout
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 16 * 2**20
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_part_that_fails_or_has_no_time_keeps_none_of_the_others(tmp_path):
    """Under a python3 that cannot run one of the parts."""
    broken = tmp_path / "python3"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *lora.py*) echo "it broke"; exit 7;; *) exec "{sys.executable}" "$@";; esac\n'
    )
    broken.chmod(0o755)
    only = ("--cpu", "--installed", "--only", "ceilings lora")
    done = run_script(str(tmp_path / "out"), *only, PYTHON=str(broken))
    assert done.returncode == 1
    assert "| ceilings | ok |" in done.stdout
    assert "| lora | failed |" in done.stdout and "exit code 7; last: it broke" in done.stdout
    done = run_script(str(tmp_path / "late"), *only, "--seconds", "12")
    assert done.returncode == 1
    assert "| lora | not run | 0 | the 12 s were used up |" in done.stdout


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    slow = tmp_path / "python3"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *ceilings.py*) echo begun; sleep 60;; *) exec "{sys.executable}" "$@";; esac\n'
    )
    slow.chmod(0o755)
    only = ("--cpu", "--installed", "--only", "ceilings", "--seconds", "15")
    done = run_script(str(tmp_path / "out"), *only, PYTHON=str(slow))
    assert done.returncode == 1
    assert "| ceilings | stopped | 1" in done.stdout and "after 10 s; last: begun" in done.stdout


def test_without_a_build_nothing_else_is_run(tmp_path):
    broken = tmp_path / "python3"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *"-m pip"*) echo "no pip"; exit 1;; *) exec "{sys.executable}" "$@";; esac\n'
    )
    broken.chmod(0o755)
    done = run_script(str(tmp_path / "out"), "--cpu", "--only", "build encoder", PYTHON=str(broken))
    assert done.returncode == 1
    assert "| build | failed |" in done.stdout
    assert "| encoder | not run | 0 | there is no build |" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["--cpu"], ["out", "--only", "nothing"], ["out", "--seconds", "x"], ["a", "b"]]
)
def test_wrong_arguments_are_refused(arguments, tmp_path):
    given = [str(tmp_path / a) if a in ("out", "a", "b") else a for a in arguments]
    done = run_script(*given)
    assert done.returncode == 2
    assert "usage" in done.stderr or "bash benchmarks/gpu.sh OUTDIR" in done.stderr
    assert not (tmp_path / "out").exists()


SANITIZERS = {
    "absent": ("", "not measured", "needs compute-sanitizer"),
    "refused": ("echo 'Error: Device not supported'; exit 1", "not measured", "does not support this device"),
    "clean": (
        'case "$*" in *canary*) echo "Invalid __global__ write";; esac; echo "$@"; echo "ERROR SUMMARY: 0 errors"',
        "ok",
        "ERROR SUMMARY: 0 errors",
    ),
    "blind": ('echo "$@"; echo "ERROR SUMMARY: 0 errors"', "ok", "ERROR SUMMARY: 0 errors"),
    "found": ('echo "ERROR SUMMARY: 2 errors"; exit 9', "failed", "exit code 9; last: ERROR SUMMARY: 2 errors"),
}


@pytest.mark.parametrize(("script", "status", "note"), SANITIZERS.values(), ids=SANITIZERS)
def test_the_sanitizers_answer(script, status, note, tmp_path, request):
    """The part as on a GPU machine, with a tool of ours in the sanitizer's place, or none."""
    tools = tmp_path / "tools"
    tools.mkdir()
    path = f"{tools}:/usr/bin:/bin"
    if not script and shutil.which("compute-sanitizer", path=f"{path}:/usr/local/cuda/bin"):
        pytest.skip("this machine has one")
    if script:
        (tools / "compute-sanitizer").write_text(f"#!/bin/sh\n{script}\n")
        (tools / "compute-sanitizer").chmod(0o755)
    (tools / "nvcc").write_text("#!/bin/sh\nexit 0\n")
    (tools / "nvcc").chmod(0o755)
    done = run_script(str(tmp_path / "out"), "--installed", "--only", "racecheck", PATH=path)
    assert done.returncode == (status == "failed"), done.stdout + done.stderr
    assert re.search(rf"\| racecheck \| {status} \| \d+ \| .*{note}", done.stdout)
    if status == "ok":
        with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
            log = logs.extractfile("logs/racecheck.txt").read().decode()
        watched = " --kernel-name kns=evc" if request.node.callspec.id == "clean" else ""
        assert f"--tool racecheck --error-exitcode 9 --print-limit 20{watched} {sys.executable} " in log
        assert ("every kernel is watched" in log) == (not watched)
        assert "benchmarks/every_kernel.py --device cuda" in log


# ---- timing ----


def test_a_rehearsal_times_by_the_clock(monkeypatch):
    """On a clock that a call moves on."""
    now = [0.0]
    monkeypatch.setattr(_device.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def run():
            now[0] += seconds

        return run

    assert GPU.pace(taking(0.25), 4) == pytest.approx(0.25)
    assert GPU.calls(taking(3e-4)) == 7  # a region of 2 ms
    assert GPU.calls(taking(1.0)) == 1
    assert GPU.latency(taking(0.5)) == GPU.cold(taking(0.5)) == 0.5
    times, turns = GPU.take_turns({"slow": taking(0.1), "fast": taking(1e-3)}, 1.0)
    assert turns >= 5
    for name, seconds in (("slow", 0.1), ("fast", 1e-3)):
        assert times[name] == pytest.approx(
            {"seconds": seconds, "median_s": seconds, "cold_s": seconds, "latency_s": seconds}
        )


def test_what_a_cpu_cannot_measure_is_none():
    run = lambda: None  # noqa: E731
    assert GPU.launches(run) is None
    assert GPU.peak_bytes(run) is None
    assert GPU.captured(run) is run
    assert not _device.Device("cpu").gpu


def test_launches_are_counted_in_the_profilers_trace(monkeypatch):
    """In a trace of a GPU's form: work on the GPU counts, what the host does for it does not."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cpu_op", "ac2g", "kernel", None)

    class Profile:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def export_chrome_trace(self, path):
            events = [{"name": "x"} | ({} if kind is None else {"cat": kind}) for kind in kinds]
            Path(path).write_text(json.dumps({"traceEvents": events * _device.COUNTED_CALLS}))

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    device = _device.Device("cpu")
    device.kind = "cuda"
    called = []
    assert device.launches(lambda: called.append(1)) == 4
    assert len(called) == 1 + _device.COUNTED_CALLS  # the first sets the profiler up


def test_devices_that_are_not_there_are_refused(capsys):
    for argv, message in (
        (["--device", "cuda:99"], "there is no cuda:99"),
        (["--device", "gpu"], "must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99", "--rehearse"], "there is no cuda:99"),
    ):
        for module in (encoder, training, ops, lora):
            with pytest.raises(SystemExit) as stop:
                module.parse_arguments(argv)
            assert stop.value.code == 2
            assert message in capsys.readouterr().err


# ---- implementations ----


def implementation(name: str, **given) -> dispatch.Implementation:
    return dispatch.Implementation(name, lambda: "", ("cpu",), (torch.float32,), **given)


def test_rows_name_what_they_lack():
    cpu = _device.Device("cpu")
    assert _impls.obstacle("routing_aggregation", "other", cpu, torch.float32) == (
        "routing_aggregation has no implementation named other"
    )
    assert "CUDA tensors" in _impls.obstacle("routing_aggregation", "triton", cpu, torch.float32)
    assert _impls.stand_in("triton", cpu) == "triton"
    assert _impls.stand_in("triton", GPU) == "cpp"
    assert _impls.serving("routing_aggregation", cpu, torch.float16, gradients=True) == "reference"


def test_an_implementation_without_gradients_is_timed_forward_alone(monkeypatch):
    found = (implementation("cpp", gradients=False), implementation("reference"))
    monkeypatch.setattr(dispatch, "implementations", lambda op: found)
    arguments = ops.parse_arguments(["--rehearse", "--batch", "1", "--seconds", "0", "--no-compile"])
    case = benchmark_case("routing_aggregation", 1)
    monkeypatch.setattr(type(case), "call", lambda self, *tensors, impl: self.plain(*tensors))
    record = ops.measure(case, torch.float32, arguments, 1e12)
    assert record["failed"] == {}
    assert set(record["seconds"]["forward"]) == {"eager", "cpp", "reference"}
    for phase in ("backward", "full", f"full{_ops_gpu.GRAPH}"):
        assert set(record["seconds"][phase]) == {"eager", "reference"}
    (table,) = ops.tables([record])
    assert len(table.rows) == 5


def test_an_op_that_cannot_be_captured_is_timed_as_it_is_called(monkeypatch):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    device = _device.Device("cpu", rehearsal=True)
    monkeypatch.setattr(device, "captured", refuse)
    case = benchmark_case("routing_aggregation", 1)
    tensors = case.inputs()
    gradients = [torch.ones_like(o) for o in case.differentiable(case.plain(*tensors))]
    found = _ops_gpu.take_turns_on_gpu(device, case, {"eager": case.plain}, (), tensors, gradients, 0.0)
    assert found["uncaptured"] == {"eager": "operation not permitted when stream is capturing"}
    assert found["seconds"][f"forward{_ops_gpu.GRAPH}"] == {}
    assert found["seconds"]["full"]["eager"] > 0


# ---- the encoder's rows and targets ----


def timed(seconds: float, launches: float | None = 3.0) -> dict:
    return {
        "dtype": "bfloat16",
        "median_s": seconds,
        "seconds": seconds,
        "cold_s": 2 * seconds,
        "latency_s": 3 * seconds,
        "launches": launches,
        "flops": 10**9,
        "weight_bytes": 8 * 10**6,
        "moved_bytes": 12 * 10**6,
        "peak_bytes": 10**6,
        "error": 1e-3,
    }


def encoder_record(**rows: float) -> dict:
    record = {"batch": 1, "turns": 5, "skipped": {}, "failed": {}}
    record["rows"] = {name.replace("_", "-"): timed(seconds) for name, seconds in rows.items()}
    encoder.add_floors(record, CEILINGS | {"matrix_flops_per_s_packed": {}})
    return record


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "reached"),
        ({"seconds": 41e-6}, "missed"),
        ({"launches": 4}, "missed"),
        ({"launches": None}, "missed"),
        ({"eager": 14 * 30e-6}, "missed"),
        ({"graph": 3.9 * 30e-6}, "missed"),
    ],
    ids=str,
)
def test_every_condition_of_a_target_counts(changes, verdict):
    record = encoder_record(eager=changes.get("eager", 1e-3), ours_bf16=changes.get("seconds", 30e-6))
    record["rows"]["eager-graph"] = timed(changes.get("graph", 2e-4))
    record["rows"]["ours-bf16"]["launches"] = changes.get("launches", 3)
    called, graph = _encoder_gpu.gpu_judged(_encoder_gpu.GPU_TARGETS[0], record)
    assert called.startswith("G2, B = 1, bfloat16, as called: ")
    assert f": {verdict}; " in called
    assert "us from the copy bandwidth, 4000.0 GB/s" in called
    assert graph == "G2, B = 1, bfloat16, in a CUDA graph: not measured: the row was left out"


def test_the_gpu_table_has_rows_for_what_was_not_measured():
    record = encoder_record(eager=1e-3, ours=5e-5)
    record["skipped"]["ours-fp16"] = "no CUDA device is to be found here"
    table = _encoder_gpu.gpu_table(record)
    assert [len(row) for row in table.rows] == [len(table.columns)] * 3
    assert table.rows[1][6] == "20.00"
    assert table.rows[2][2] == "not measured"
    assert "ours-fp16: not measured: no CUDA device is to be found here" in table.notes


def test_graphs_of_rows_that_failed_are_not_timed(monkeypatch, tmp_path):
    subject = encoder.Subject({}, 1, tmp_path, GPU)

    def spoiled(subject):
        run = _encoder_gpu.straight(subject)
        return lambda inputs: [run(inputs)[0] * 1.01, run(inputs)[1]]

    row = dataclasses.replace(_encoder_gpu.GPU_ROWS["eager-folded"], prepare=spoiled)
    monkeypatch.setitem(_encoder_gpu.GPU_ROWS, "eager-folded", row)
    record = encoder.measure(2, subject, ["eager-folded", "eager-folded-graph", "eager-graph"], 0.0)
    assert list(record["rows"]) == ["eager", "eager-graph"]
    assert "its tokens err by" in record["failed"]["eager-folded"]
    assert record["skipped"] == {"eager-folded-graph": "the row eager-folded was not timed"}


def test_rows_of_another_device_are_refused(capsys):
    with pytest.raises(SystemExit):
        encoder.parse_arguments(["--rows", "eager-graph"])
    assert "argument --rows: eager-graph is no row of cpu" in capsys.readouterr().err
    assert encoder.parse_arguments(["--rehearse"]).batch == [1, 8, 32, 256]


# ---- the training step ----


def test_a_wrong_graph_is_not_timed(monkeypatch):
    right = training.graphed

    def spoiled(model, inputs, device):
        run = right(model, inputs, device)
        return lambda *features: run(*features)._replace(tokens=run(*features).tokens * 1.01)

    monkeypatch.setattr(training, "graphed", spoiled)
    arguments = training.parse_arguments(["--rehearse", "--no-compile", "--seconds", "0", "--batch", "2"])
    record = training.measure(2, 0.1, arguments, 1e12)
    assert "errs by" in record["failed"][training.GRAPHED]
    assert training.GRAPHED not in record["seconds"]
    assert training.in_a_graph(training.OURS) in record["median_s"]


def test_a_step_that_cannot_be_captured_is_said(monkeypatch):
    def refuse(model, inputs, device):
        raise RuntimeError("a hook stands in the way\nmore")

    monkeypatch.setattr(training, "graphed", refuse)
    arguments = training.parse_arguments(["--rehearse", "--no-compile", "--seconds", "0", "--batch", "2"])
    record = training.measure(2, 0.0, arguments, 1e12)
    assert record["skipped"] == {training.GRAPHED: "it cannot be captured: a hook stands in the way"}
    notes = training.gpu_table(record, training.EAGER).notes
    assert f"{training.GRAPHED}: not measured: it cannot be captured: a hook stands in the way" in notes


def test_dropout_is_given_back():
    module = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    with pytest.raises(KeyError), _training_gpu.without_dropout(module):
        assert [module[0].p, module[2].p] == [0, 0]
        raise KeyError
    assert [module[0].p, module[2].p] == [0.3, 0.1]


def test_g4_is_judged_for_each_of_ours():
    record = {"batch": 32, "dropout": 0.1, "failed": {}, "skipped": {"ours": "no GPU"}}
    record["median_s"] = {"eager": {"step": 3.2}, "graph": {"step": 1.0}, "compiled": {"step": 1.6}}
    lines = _training_gpu.gpu_judgements([record], "eager", ("ours", "graph"), "compiled")
    assert lines == [
        "G4, B = 32, dropout 0.1, ours: target >= 3x eager; not measured: no GPU",
        "G4, B = 32, dropout 0.1, graph: target >= 3x eager; measured 3.20x, reached; compiled 2.00x",
    ]
    assert _training_gpu.gpu_judgements([record | {"batch": 1}], "eager", ("graph",), "compiled") == []


# ---- the LoRA step, and every kernel ----


def test_gradients_that_turn_are_not_timed():
    gradients = [torch.tensor([1.0, 0.0]), torch.tensor([2.0])]
    assert lora.strays((1.0, gradients), (1.0, gradients)) == ""
    assert "its loss is 1.1000" in lora.strays((1.1, gradients), (1.0, gradients))
    turned = [torch.tensor([1.0, 1.0]), torch.tensor([2.0])]
    assert "gradient turns by" in lora.strays((1.0, turned), (1.0, gradients))
    assert "its loss is nan" in lora.strays((float("nan"), gradients), (1.0, gradients))


def test_a_kernel_that_errs_is_told(monkeypatch, capsys):
    monkeypatch.setattr(every_kernel, "OP_CASES", ("tiny",))
    monkeypatch.setattr(every_kernel, "ENCODER_OPTIONS", {"paper": {}})
    assert every_kernel.main(["--rehearse"]) == 0
    monkeypatch.setattr(every_kernel, "run_op", lambda case, dtype, device: 0.5)
    assert every_kernel.main(["--rehearse"]) == 1
    assert "WRONG routing_aggregation-tiny, float32: 5.0e-01" in capsys.readouterr().out
    assert every_kernel.main([]) == every_kernel.UNAVAILABLE
    assert "not measured: " in capsys.readouterr().out


def test_errors_of_values_that_are_not_finite_are_infinite():
    wanted = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert every_kernel.error_of(torch.tensor([1.0, torch.nan]), wanted) == float("inf")
    assert every_kernel.error_of(torch.tensor([1.0, 2.2]), wanted) == pytest.approx(0.1)
    assert every_kernel.error_of(wanted[:0], wanted[:0]) == 0


# ---- the summary ----


def test_a_summary_of_what_was_left(tmp_path):
    for name in ("parts", "results"):
        (tmp_path / name).mkdir()
    for name, status, note in (("lora", "stopped", "after 9 s | last: x"), ("build", "ok", "")):
        (tmp_path / "parts" / name).write_text(f"{name}\t{status}\t7\t{note}\n")
    machine = {
        "device_name": "NVIDIA H200",
        "gpu": {"capability": "9.0", "multiprocessors": 132, "memory_bytes": 150 * 2**30, "cuda": "13.0"},
        "processor": "a processor",
        "cores": 16,
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-21",
    }
    record = {"batch": 1, "rows": {"eager": {"median_s": 1e-3}, "ours-bf16": {"median_s": 3.5e-5}}}
    report = {"machine": machine, "records": [record], "targets": ["G2: reached"]}
    (tmp_path / "results" / "encoder.json").write_text(json.dumps(report))
    (tmp_path / "results" / "encoder.md").write_text("# The encoder\n")
    row = {"decoder": "flan-t5-xl", "spec": {"impl": None}, "status": "measured", "time": {"median_s": 0.5}}
    row |= {"memory": {"gpu_bytes": 6e9, "resident_bytes": 2e9}, "stand_ins": {"video decode": "needs av"}}
    (tmp_path / "results" / "efficiency.json").write_text(json.dumps({"machine": machine, "rows": [row]}))
    _gpu_summary.main(tmp_path, tmp_path)
    page = (tmp_path / "summary.md").read_text()
    assert "rehearsal" not in page
    assert "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 150 GiB, CUDA 13.0" in page
    assert page.index("| build | ok | 7 |") < page.index("| lora | stopped | 7 | after 9 s / last: x |")
    assert "- G2: reached" in page
    assert "encoder, B = 1: eager 1 ms, ours-bf16 35.0 us" in page
    assert "caption, flan-t5-xl, ours: 500 ms, 6.00 GB" in page
    assert "video decode: not measured: needs av" in page
    assert (tmp_path / "tables.md").read_text() == "# The encoder\n"
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"encoder", "efficiency"}
