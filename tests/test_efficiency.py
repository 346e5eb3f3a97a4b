"""benchmarks/efficiency.py: a quick run as a user makes it, and its parts: accounting, timing, skipping, failing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for a script there

import _bytes  # noqa: E402
import _clip  # noqa: E402
import _machine  # noqa: E402
import _parts  # noqa: E402
import _published  # noqa: E402
import _row  # noqa: E402
import _stages  # noqa: E402
import efficiency  # noqa: E402

from evc_fast.model.config import FaceNetConfig  # noqa: E402
from evc_fast.model.encoder import FaceNetEncoder  # noqa: E402

SPEC = _parts.RowSpec(
    method="FACE-net, tried",
    decoder="lstm",
    impl=None,
    device="cpu",
    dtype="float32",
    threads=2,
    batch=2,
    quick=True,
    video=None,
    repeats=2,
    budget=0.1,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return _clip.encode_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=1, width=96, height=64)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """What `python benchmarks/efficiency.py --quick` leaves behind."""
    out = tmp_path_factory.mktemp("efficiency")
    command = [sys.executable, str(BENCHMARKS / "efficiency.py"), "--quick", "--repeats", "3", "--threads", "1"]
    done = subprocess.run(
        [*command, "--batch", "2", "--dtype", "fp32", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(
        report=json.loads((out / "efficiency.json").read_text()),
        markdown=(out / "efficiency.md").read_text(),
        figure=(out / "efficiency.png").read_bytes(),
        printed=done.stdout,
    )


def test_a_quick_run_measures_both_rows(quick_run):
    rows = quick_run.report["rows"]
    assert [(row["decoder"], row["spec"]["impl"], row["status"]) for row in rows] == [
        ("flan-t5-xl", "reference", "measured"),
        ("flan-t5-xl", None, "measured"),
    ]
    for row in rows:
        assert len(row["ids"]) == 15
        assert row["time"]["captions"] == 3
        assert row["time"]["min_s"] <= row["time"]["median_s"] <= row["time"]["p95_s"]
        assert row["throughput"]["batch"] == 2
        assert row["throughput"]["captions_per_s"] > 0
        assert row["memory"]["resident_bytes"] > 100e6
        assert row["check"]["encoder_error"] <= row["check"]["tolerance"]
        assert row["stand_ins"] == {}
    assert set(rows[0]["served_by"].values()) == {"reference"}
    assert rows[1]["served_by"] == {"folded_encoder": "cpp"}
    assert "features_cosine" not in rows[0]["check"]
    assert rows[1]["check"]["features_cosine"] > 0.999
    assert not any("features" in row for row in rows)


def test_a_quick_run_takes_the_caption_apart(quick_run):
    for row in quick_run.report["rows"]:
        stages = row["stages"]
        assert [stage["stage"] for stage in stages] == list(_stages.STAGES)
        assert sum(stage["share"] for stage in stages) == pytest.approx(1)
        assert [stage["runs"] for stage in stages] == [1, 1, 1, 1, 1, 15]
        for stage in stages:
            assert stage["bytes"] > 0
            assert stage["floor_seconds"] > 0
            assert stage["floor_from"] in ("bytes", "FLOPs")
        counted = {stage["stage"]: stage["flops"] for stage in stages}
        assert counted["video decode"] == counted["retrieval"] == 0
        assert row["flops"]["trained_modules"]["flops"] == counted[_stages.ENCODER]
        assert row["flops"]["whole_caption"]["flops"] == sum(counted.values())
        for accounted in row["flops"].values():
            assert accounted["flops"] == 2 * accounted["multiply_adds"]
        assert [len(steps) for steps in row["step_seconds"]] == [15, 15, 15]


def test_both_rows_do_the_same_work_but_for_tower_and_encoder(quick_run):
    reference, ours = quick_run.report["rows"]
    assert reference["parameters"] == ours["parameters"]
    assert reference["ids"] == ours["ids"]
    for one, other in zip(reference["stages"], ours["stages"], strict=True):
        if one["stage"] in (_stages.TOWER, _stages.ENCODER):
            assert other["flops"] < one["flops"]
        else:
            assert (other["flops"], other["bytes"]) == (one["flops"], one["bytes"])
    straight, folded = (row["flops"]["trained_modules"]["flops"] for row in (reference, ours))
    assert folded < 0.7 * straight


def test_a_quick_run_counts_parameters(quick_run):
    from evc_fast.model.decoders.llm_random import llm_on_meta

    parameters = quick_run.report["rows"][0]["parameters"]
    llm = sum(weight.numel() for weight in llm_on_meta("tiny-t5").parameters())
    adapter = parameters["decoder"] - llm
    # LoRA of rank 16 on q and v of 2 encoder and 2 x 2 decoder attentions, each [32, 32]
    assert adapter == 2 * (2 + 2 * 2) * 16 * (32 + 32)
    assert parameters["trainable"] == parameters["encoder"] + adapter
    assert parameters["all"] == parameters["encoder"] + parameters["decoder"] + parameters["clip"]


def test_a_quick_run_says_what_it_is(quick_run):
    for text in (quick_run.printed, quick_run.markdown):
        assert "random weights" in text.lower()
        assert "quick run: tiny shapes" in text
        assert "NVIDIA RTX 3090" in text
        assert "both rows wrote the same 15 tokens" in text
    for row in _published.TABLE_6:
        assert f"| {row.method} (published, NVIDIA RTX 3090) |" in quick_run.markdown
    assert quick_run.figure.startswith(b"\x89PNG")
    machine = quick_run.report["machine"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["threads"] >= 1
    assert machine["date"][:4].isdigit()
    assert machine["ceilings"]["read_bytes_per_s"] > 0


@pytest.mark.parametrize("decoder", ["opt-2.7b", "lstm", "transformer"])
def test_every_decoder_has_its_row(decoder, clip):
    fractions = []
    spec = dataclasses.replace(SPEC, decoder=decoder, video=str(clip))
    row = _row.run_row(spec, lambda phase, fraction: fractions.append(fraction))
    assert row["status"] == "measured"
    assert len(row["ids"]) == 15
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    stages = {stage["stage"]: stage for stage in row["stages"]}
    assert (_stages.PREFIX in stages) == (decoder == "opt-2.7b")
    assert stages[_stages.STEP]["runs"] == (14 if decoder == "opt-2.7b" else 15)
    assert len(row["step_seconds"][0]) == stages[_stages.STEP]["runs"]
    assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
    trained = stages[_stages.ENCODER]["flops"]
    if decoder != "opt-2.7b":
        trained += stages[_stages.STEP]["flops"]  # a small decoder is trained whole
    assert row["flops"]["trained_modules"]["flops"] == trained


@pytest.mark.parametrize(
    ("seconds", "budget", "captions"), [(1.0, 30.0, 30), (0.01, 30.0, 50), (16.0, 30.0, 3), (50.0, 30.0, 2)]
)
def test_captions_are_timed_as_the_budget_allows(monkeypatch, seconds, budget, captions):
    """On a clock that a caption moves on: 30 s of them, at most 50, three slow ones, two very slow ones."""
    now = [0.0]
    probed = SimpleNamespace(gained={_stages.STEP: [1.0] * 15})
    captioner = SimpleNamespace(pipeline=SimpleNamespace(attached=lambda read: contextlib.nullcontext(probed)))

    def caption(*_):
        now[0] += seconds

    monkeypatch.setattr(_row, "caption", caption)
    monkeypatch.setattr(_row.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(_row, "clock", lambda device: lambda: now[0])
    fractions = []
    spec = dataclasses.replace(SPEC, repeats=None, budget=budget)
    times, stages, steps = _row.time_captions(captioner, spec, fractions.append)
    assert times == pytest.approx([seconds] * captions)
    assert len(stages[_stages.STEP]) == len(steps) == captions
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len(_row.time_captions(captioner, dataclasses.replace(spec, repeats=4), fractions.append)[0]) == 4


def test_the_counter_sees_the_straight_encoder_and_inside_folded_its_fold():
    encoder = FaceNetEncoder(FaceNetConfig()).eval().requires_grad_(False)
    inputs = torch.randn(1, 16, 512), torch.randn(1, 4, 3, 512), torch.rand(1, 4)
    pipeline = SimpleNamespace(model=SimpleNamespace(encoder=encoder))

    def counted(impl):
        with _stages.flop_counter() as counter:
            tokens = encoder(*inputs, impl=impl).tokens
        return counter.get_total_flops(), tokens

    straight, wanted = counted("reference")
    with _stages.ProbedPipeline.folded(pipeline):
        fused, found = counted(None)
        plain, _ = counted("reference")
    assert 0.35e9 < straight < 0.45e9
    assert fused == plain < 0.5 * straight  # the fused op's formula, and its products one by one
    assert torch.allclose(found, wanted, atol=1e-4)
    assert counted("reference")[0] == straight


def test_attention_on_a_cpu_is_counted():
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with torch.inference_mode(), _stages.flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * (8 + 8)


def test_bytes_of_a_t5_xl_caption():
    """1,424.9 M weights a step and 45.5 GB a caption in bfloat16, of which keys and values are a small part."""
    from evc_fast.model.decoders.llm_random import llm_on_meta

    decoder = SimpleNamespace(family="t5", base=llm_on_meta("flan-t5-xl").bfloat16(), dtype=torch.bfloat16)
    model = SimpleNamespace(decoder=decoder)
    weights = _bytes._decoder(model, prefix=0, num_beams=0, new_tokens=2)[_stages.STEP]
    weights_of_one = weights - _bytes._decoder(model, prefix=0, num_beams=0, new_tokens=1)[_stages.STEP]
    assert weights_of_one / 2 == pytest.approx(1424.9e6, rel=1e-4)
    caption = _bytes._decoder(model, prefix=44, num_beams=5, new_tokens=15)
    assert sum(caption.values()) == pytest.approx(45.5e9, rel=0.02)


def test_steps_are_told_apart():
    border = SimpleNamespace(begun=[3.0, 5.0, 8.0], done=[4.0, 7.0, 9.0])
    t5, opt = (SimpleNamespace(decoder=SimpleNamespace(base=None, family=family)) for family in ("t5", "opt"))
    small = SimpleNamespace(decoder=SimpleNamespace())
    prefix, step = _stages.PREFIX, _stages.STEP
    assert _stages.split_steps(t5, 1.0, border, 10.0) == [(prefix, 2.0), (step, 2.0), (step, 3.0), (step, 2.0)]
    assert _stages.split_steps(opt, 1.0, border, 10.0) == [(prefix, 4.0), (step, 3.0), (step, 2.0)]
    assert _stages.split_steps(small, 1.0, border, 10.0) == [(step, 3.0), (step, 3.0), (step, 3.0)]


def test_a_row_that_lacks_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(_parts, "available_memory", lambda device: 2_000_000_000)
    spec = dataclasses.replace(SPEC, decoder="flan-t5-xl", dtype="bfloat16", quick=False)
    row = _row.run_row(spec, lambda *_: None)
    assert row["status"] == "skipped"
    assert row["reason"] == "needs about 7.2 GB of memory, 2.0 GB is free"


def test_a_row_without_its_device_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = _row.run_row(dataclasses.replace(SPEC, device="cuda"), lambda *_: None)
    assert row["status"] == "skipped"
    assert row["reason"] == "no device cuda: this PyTorch sees no GPU"


def without(*absent):
    """`missing_package` where these are not installed."""
    return lambda *names: next((name for name in names if name in absent), None)


def test_an_llm_without_transformers_is_skipped(monkeypatch):
    monkeypatch.setattr(_parts, "missing_package", without("transformers", "peft"))
    row = _row.run_row(dataclasses.replace(SPEC, decoder="flan-t5-xl"), lambda *_: None)
    assert (row["status"], row["reason"]) == ("skipped", "needs transformers")


def test_stages_whose_part_is_missing_are_named_and_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(_parts, "missing_package", without("transformers", "faiss"))
    row = _row.run_row(SPEC, lambda *_: None)  # and no video, as where PyAV is missing
    assert row["status"] == "measured"
    assert row["stand_ins"] == {
        "image tower": "needs transformers",
        "retrieval": "needs faiss",
        "video decode": "needs av",
    }
    stages = {stage["stage"]: stage for stage in row["stages"]}
    for name, needs in row["stand_ins"].items():
        assert stages[name] == {"stage": name, "not_measured": needs}
    measured = [stage for stage in stages.values() if "seconds" in stage]
    assert [stage["stage"] for stage in measured] == ["encoder + Q-former", "decode step"]
    assert sum(stage["share"] for stage in measured) == pytest.approx(1)


def test_a_wrong_result_is_not_timed(monkeypatch, clip):
    def wrong(self, features, retrieved, *, explain=False):
        encoded = right(self, features, retrieved, explain=explain)
        return encoded._replace(tokens=encoded.tokens * (1.001 if self.impl is None else 1))

    right = _stages.ProbedPipeline.encode
    monkeypatch.setattr(_stages.ProbedPipeline, "encode", wrong)
    with pytest.raises(_row.CheckFailed, match=r"our ops change the tokens by 1\.00e-03"):
        _row.run_row(dataclasses.replace(SPEC, video=str(clip)), lambda *_: None)


@pytest.mark.parametrize("ids", [[5] * 14, [5] * 16, [5] * 14 + [2]])
def test_another_number_of_tokens_is_not_timed(ids):
    captioner = SimpleNamespace(pipeline=SimpleNamespace(model=SimpleNamespace(decoder=SimpleNamespace(eos_id=2))))
    with pytest.raises(_row.CheckFailed, match="exactly 15 new tokens"):
        _row.check_ids(torch.tensor(ids), captioner)
    _row.check_ids(torch.tensor([5] * 15), captioner)


def test_a_row_that_fails_is_reported():
    seen = []
    task = {"row": dataclasses.asdict(dataclasses.replace(SPEC, dtype="float7"))}
    record, good = efficiency.run_task(task, 1, lambda *event: seen.append(event))
    assert not good
    assert record["status"] == "failed"
    assert "float7" in record["reason"]
    assert "Traceback" in record["stderr"]
    assert seen == [("building", 0.0)]


def test_a_process_that_dies_is_reported():
    assert "killed (signal 9)" in efficiency.crash_reason(-9, "")
    assert efficiency.crash_reason(3, "a\nlast words") == "the row's process ended with exit code 3; last words"
    record, good = efficiency.run_task({"neither": {}}, 1, lambda *_: None)
    assert not good
    assert "KeyError" in record["reason"]


def test_the_better_measurement_of_the_machine_counts():
    first, second = ({"device": "cpu", "ceilings": {"read": read, "peaks": {"a": a}}} for read, a in ((1, 9), (2, 3)))
    assert efficiency.better_of(first, second) == {"device": "cpu", "ceilings": {"read": 2, "peaks": {"a": 9}}}
    failed = {"status": "failed", "reason": "it broke"}
    assert efficiency.better_of(first, failed) == efficiency.better_of(failed, first) == first
    assert efficiency.better_of(failed, failed) == failed


def test_image_features_are_held_against_those_of_transformers():
    def record(decoder, impl, features):
        return {"decoder": decoder, "spec": {"impl": impl}, "status": "measured", "check": {}, "features": features}

    wanted = [[3.0, 4.0], [1.0, 0.0]]
    rows = [record("lstm", "reference", wanted), record("lstm", None, [[6.0, 8.0], [1.0, 0.01]])]
    rows += [record("opt", "reference", wanted), record("opt", None, [[3.0, 4.0], [1.0, 0.1]])]
    efficiency.compare_towers(rows)
    assert [row["status"] for row in rows] == ["measured", "measured", "measured", "failed"]
    assert rows[1]["check"]["features_cosine"] == pytest.approx(1 - 0.01**2 / 2, abs=1e-6)
    assert "cosine 0.995037 with transformers'" in rows[3]["reason"]
    assert not any("features" in row for row in rows)


def test_a_failed_row_sets_the_exit_code(monkeypatch, tmp_path, capsys):
    def run_task(task, threads, on_progress):
        if "machine" in task:
            return {"status": "skipped", "reason": "not tried"}, True
        return {"status": "failed", "reason": "it broke", "stderr": ""}, False

    monkeypatch.setattr(efficiency, "run_task", run_task)
    assert efficiency.main(["--quick", "--decoder", "lstm,transformer", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "failed: it broke" in printed
    page = (tmp_path / "efficiency.md").read_text()
    assert "FACE-net, reference ops, transformers' image tower, own beam search | lstm, tiny |" in page
    assert "Machine: not measured: not tried" in page


def test_arguments():
    arguments = efficiency.parse_arguments([])
    assert arguments.decoders == ["flan-t5-xl"]
    assert (arguments.device, arguments.dtype) == ("cpu", "bf16")
    assert arguments.out == BENCHMARKS / "results" / "local"
    assert efficiency.parse_arguments(["--decoder", "all"]).decoders == list(efficiency.DECODERS)
    assert efficiency.parse_arguments(["--decoder", "lstm, all"]).decoders == [
        "lstm", "flan-t5-xl", "opt-2.7b", "transformer",
    ]  # fmt: skip
    arguments = efficiency.parse_arguments(["--decoder", "lstm, opt-2.7b"])
    specs = [_parts.RowSpec(**spec) for spec in efficiency.row_specs(arguments, None)]
    assert [(spec.decoder, spec.impl) for spec in specs] == [
        ("lstm", "reference"),
        ("lstm", None),
        ("opt-2.7b", "reference"),
        ("opt-2.7b", None),
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--decoder", "gpt,lstm"], "argument --decoder: gpt is not among"),
        (["--decoder", "lstm,,transformer"], "argument --decoder: an entry of 'lstm,,transformer' is empty"),
        (["--decoder", ""], "argument --decoder: an entry of '' is empty"),
        (["--device", "gpu"], "argument --device: must be cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:x"], "argument --device: must be cpu, cuda or cuda:N, got 'cuda:x'"),
        (["--device", "cuda:99"], "argument --device: there is no cuda:99, this PyTorch sees"),
        (["--video", str(BENCHMARKS)], "is a folder, expected a video file"),
        (["--video", "absent.mp4"], "argument --video: there is no file absent.mp4"),
        (["--threads", "0"], "must be a positive integer, got '0'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        efficiency.parse_arguments(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_refused_before_measuring(tmp_path, capsys):
    pytest.importorskip("av")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for argv, message in (
        (["--video", str(text)], "argument --video: "),
        (["--out", str(text / "results")], "argument --out: cannot write into"),
    ):
        with pytest.raises(SystemExit) as stop:
            efficiency.parse_arguments(argv)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "text.mp4" in said


def test_memory_asked_for_is_near_the_peaks_measured():
    """Peaks on a CPU: FLAN-T5-XL in bfloat16 7.05 GB, the LSTM decoder 1.31 GB."""
    full = dataclasses.replace(SPEC, quick=False)
    for decoder, dtype, peak in (("flan-t5-xl", "bfloat16", 7.05e9), ("lstm", "float32", 1.31e9)):
        needed = _parts.bytes_needed(dataclasses.replace(full, decoder=decoder, dtype=dtype))
        assert peak <= needed <= peak + 0.3e9


def test_without_matplotlib_no_figure_is_linked_or_left(monkeypatch, tmp_path):
    monkeypatch.setattr(efficiency, "run_task", lambda *_: ({"status": "skipped", "reason": "not tried"}, True))
    find = efficiency.importlib.util.find_spec
    assert efficiency.main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "efficiency.png").exists()
    assert "(efficiency.png)" in (tmp_path / "efficiency.md").read_text()
    monkeypatch.setattr(
        efficiency.importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    assert efficiency.main(["--quick", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "efficiency.png").exists()
    assert "efficiency.png" not in (tmp_path / "efficiency.md").read_text()


def test_the_machine_is_measured_on_a_small_scale():
    ceilings = _machine.measure_ceilings("cpu", [torch.float32, torch.bfloat16], quick=True)
    assert ceilings["read_bytes_per_s"] > 1e8
    assert ceilings["copy_bytes_per_s"] > 1e8
    peaks = ceilings["matrix_flops_per_s"]
    assert peaks["bfloat16"] >= peaks["float32"] == ceilings["matrix_flops_per_s_library"]["float32"]
    described = _machine.describe("cpu", 2)
    assert described["versions"]["torch"] == torch.__version__
    assert described["cores"] == os.cpu_count()


def test_peak_memory_grows_with_what_is_held():
    before = _machine.peak_resident_bytes()
    held = torch.ones(max(before, 200_000_000) // 4)
    assert _machine.peak_resident_bytes() >= held.numel() * 4
    assert _machine.available_memory("cpu") > 0


def test_the_clip_moves(clip):
    from evc_fast.data.video import read_frames

    video = read_frames(clip, 4)
    assert video.num_decoded == 25
    assert video.frames.shape == (4, 64, 96, 3)
    for first, second in zip(video.frames[:-1], video.frames[1:], strict=True):
        assert (first.int() - second.int()).abs().float().mean() > 2
