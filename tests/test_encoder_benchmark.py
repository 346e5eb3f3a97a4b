"""benchmarks/encoder.py: a small run as a user makes it, and its parts: checking, turns, floors, targets."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for a script there

import _encoder_parts  # noqa: E402
import _encoder_rows  # noqa: E402
import encoder  # noqa: E402

from evc_fast.testing.encoder_cases import build_encoder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = ("unfolded", "eager-folded", "eager-folded-bf16", "ours", "ours-bf16")
CEILINGS = {
    "read_bytes_per_s": 10e9,
    "matrix_flops_per_s_library": {"float32": 100e9, "bfloat16": 5e9},
    "matrix_flops_per_s_packed": {"float32": 120e9, "bfloat16": 110e9},
}


@pytest.fixture
def ceilings(monkeypatch):
    """Measuring the machine takes seconds: figures in its place, and few calls of each part."""
    monkeypatch.setattr(encoder, "ceilings_now", lambda dtypes, device: CEILINGS)
    hasty = functools.partial(_encoder_parts.best_seconds, least=1, most=1)
    monkeypatch.setattr(_encoder_parts, "best_seconds", lambda run, device, budget: hasty(run, device))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """An encoder at small widths."""
    return _encoder_rows.Subject({}, 1, tmp_path_factory.mktemp("artefacts"))


def test_a_small_run(ceilings, tmp_path, capsys):
    argv = ["--batch", "3", "1", "--rows", *OWN, "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert encoder.main(argv, sizes={}) == 0
    report = json.loads((tmp_path / "encoder.json").read_text())
    page = (tmp_path / "encoder.md").read_text()
    assert [record["batch"] for record in report["records"]] == [3, 1]
    for record in report["records"]:
        assert list(record["rows"]) == ["eager", *OWN]  # the baseline is always there
        assert record["failed"] == record["skipped"] == {}
        assert record["positions"] == {"ours": "", "ours-bf16": ""}
        for name, row in record["rows"].items():
            assert 0 < row["seconds"] < 60
            assert row["error"] < (0.05 if row["dtype"] == "bfloat16" else 1e-5)
            assert row["floor_s"] > 0
            assert f"| {name}: " in page
        straight, folded = (record["rows"][name] for name in ("eager", "ours"))
        assert folded["flops"] < straight["flops"]
        assert folded["flops"] == record["rows"]["eager-folded"]["flops"]
        assert record["rows"]["ours-bf16"]["weight_bytes"] == folded["weight_bytes"] / 2
    printed = capsys.readouterr().out
    for text in (printed, page):
        assert "C1, B = 1, float32: target >= 3x eager; measured" in text
        assert "C2" not in text  # no batch of 32 was run
        assert "Its parts, B = 3" in text and "the FFN's second layer" in text
        assert "the same to the bit" in text


@pytest.mark.slow
def test_compilers_and_engines_have_their_rows(ceilings, tmp_path):
    for package in ("evc_fast.export", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs an installed evc_fast with the export extra")
    rows = ["torch.compile", "onnx", "onnx-folded", "pt2"]
    argv = ["--batch", "2", "--rows", *rows, "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert encoder.main(argv, sizes={}) == 0
    (record,) = json.loads((tmp_path / "encoder.json").read_text())["records"]
    assert list(record["rows"]) == ["eager", *rows]
    assert all(row["error"] < 1e-5 for row in record["rows"].values())


def test_the_papers_sizes():
    assert encoder.parse_arguments([]).batch == [1, 32]
    made = build_encoder(**encoder.PAPER).config
    assert (made.num_frames, made.num_triplets, made.num_emotions) == (16, 4, 179)
    assert (made.dim, made.ffn_hidden_dim, made.num_queries, made.output_dim) == (300, 1200, 32, 2048)
    assert made.video_dim == made.text_dim == 512


def test_the_parts_are_all_of_the_folded_products(tmp_path):
    subject = _encoder_rows.Subject(encoder.PAPER, 1, tmp_path)
    for batch in (1, 3):
        executed = encoder.executed_flops(encoder.ROWS["ours"], subject, subject.inputs(batch))
        assert sum(product.flops(batch) for product in _encoder_parts.PRODUCTS) == executed


def test_the_fused_op_executes_what_its_plain_products_do(subject):
    inputs = subject.inputs(2)
    plain = dataclasses.replace(encoder.ROWS["eager"], graph="plain")
    counted = encoder.COUNTED | {"plain": lambda s: _encoder_rows.folded(s, torch.float32, "reference")}
    flops = encoder.executed_flops(encoder.ROWS["ours"], subject, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "COUNTED", counted)
        assert encoder.executed_flops(plain, subject, inputs) == flops
    assert 0 < flops < encoder.executed_flops(encoder.ROWS["unfolded"], subject, inputs)


def spoiled(factor):
    """The straight encoder, its tokens off by a factor."""

    def prepare(subject):
        run = _encoder_rows.straight(subject)
        return lambda inputs: [run(inputs)[0] * factor, run(inputs)[1]]

    return prepare


def test_a_wrong_row_is_not_timed(monkeypatch, subject):
    row = dataclasses.replace(encoder.ROWS["eager-folded"], prepare=spoiled(1.001))
    monkeypatch.setitem(encoder.ROWS, "eager-folded", row)
    record = encoder.measure(2, subject, ["eager-folded"], 0.0)
    assert list(record["rows"]) == ["eager"]
    assert "its tokens err by" in record["failed"]["eager-folded"]


def test_an_encoder_that_does_not_fold_itself_is_not_timed(monkeypatch, subject):
    row = dataclasses.replace(encoder.ROWS["ours"], prepare=_encoder_rows.unfolded)
    monkeypatch.setitem(encoder.ROWS, "ours", row)
    record = encoder.measure(2, subject, ["ours"], 0.0)
    assert record["failed"] == {"ours": "the encoder did not fold itself"}


def test_tokens_that_depend_on_the_batch_are_found(subject):
    run = _encoder_rows.automatic(subject)
    inputs = subject.inputs(3)
    assert encoder.unlike(run, inputs, 1) == ""

    def by_position(x):
        tokens = run(x)[0]
        return [tokens + torch.arange(len(tokens))[:, None, None] * 1e-6]

    def by_neighbours(x):
        return [run(x)[0] + x[0].mean() * 1e-3]

    def by_threads(x):
        return [run(x)[0] + torch.get_num_threads()]

    assert "the same video at each of 3 positions differs" in encoder.unlike(by_position, inputs, 1)
    assert "position 0 of 3 differs from the video alone" in encoder.unlike(by_neighbours, inputs, 1)
    assert "2 threads" in encoder.unlike(by_threads, inputs, 1)
    assert torch.get_num_threads() == 1


def test_what_is_missing_is_named(monkeypatch, ceilings, tmp_path, capsys):
    monkeypatch.setattr(_encoder_rows, "missing_package", lambda *names: names[0])
    argv = ["--batch", "2", "--rows", "onnx", "tensorrt", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)]
    assert encoder.main(argv, sizes={}) == 0
    printed = capsys.readouterr().out
    assert "- onnx: not measured: needs onnx" in printed
    assert "- tensorrt: not measured: needs tensorrt" in printed
    assert "| onnx: ONNX Runtime, straight graph | float32 | not measured |" in (tmp_path / "encoder.md").read_text()


def test_slow_rows_sit_turns_out(monkeypatch):
    """On a clock that a call moves on: eager takes 1 s, another row 10 s."""
    now = [0.0]
    calls = {"eager": 0, "slow": 0, "fast": 0}

    def taking(name, seconds):
        def run(inputs):
            calls[name] += 1
            now[0] += seconds

        return run

    monkeypatch.setattr(encoder.time, "perf_counter", lambda: now[0])
    runs = {"eager": taking("eager", 1.0), "slow": taking("slow", 10.0), "fast": taking("fast", 0.02)}
    best, turns = encoder.take_turns(runs, [], 60.0)
    assert best == pytest.approx({"eager": 1.0, "slow": 10.0, "fast": 0.02})
    assert calls["eager"] == 2 * turns
    assert calls["fast"] >= turns * encoder.BURST / 0.02
    assert 2 <= calls["slow"] < calls["eager"]


def test_the_peak_is_the_best_product_of_the_run():
    assert encoder.peak_of(CEILINGS, "float32") == (120e9, "our packed float32 product")
    assert encoder.peak_of(CEILINGS, "bfloat16") == (120e9, "our packed float32 product")  # widened in registers
    faster = CEILINGS | {"matrix_flops_per_s_library": {"float32": 100e9, "bfloat16": 400e9}}
    assert encoder.peak_of(faster, "bfloat16") == (400e9, "PyTorch's bfloat16 product")


def test_the_floor_is_the_higher_of_two():
    rows = {
        "eager": {"dtype": "float32", "flops": 12 * 10**8, "weight_bytes": 10**7},
        "ours": {"dtype": "float32", "flops": 10**6, "weight_bytes": 10**7},
    }
    encoder.add_floors({"rows": rows}, CEILINGS)
    assert rows["eager"]["floor_s"] == pytest.approx(1e-2)
    assert rows["eager"]["floor_from"] == "120 GFLOP/s of our packed float32 product"
    assert rows["ours"]["floor_s"] == pytest.approx(1e-3)
    assert rows["ours"]["floor_from"] == "the read bandwidth, 10.0 GB/s"


def record_of(eager, seconds, floor):
    rows = {"eager": {"seconds": eager}, "ours": {"seconds": seconds, "floor_s": floor, "floor_from": "a product"}}
    return {"batch": 1, "rows": rows}


@pytest.mark.parametrize(
    ("eager", "seconds", "floor", "words"),
    [
        (6.0, 1.5, 1.2, "measured 4.00x, reached; within 25% of this machine's limit"),
        (4.0, 2.0, 1.9, "measured 2.00x, missed at this machine's limit; within 5% of this machine's limit"),
        (4.0, 2.0, 1.6, "measured 2.00x, missed; within 25% of this machine's limit"),
        (4.0, 4.0, 1.0, "measured 1.00x, missed; 4.0 times this machine's limit"),
    ],
)
def test_targets_are_judged_as_they_are(eager, seconds, floor, words):
    target = encoder.Target("C1", 1, "ours", 3.0)
    parts = [{"batch": 1, "seconds": {"library": 0.9, "ours": 0.5}}, {"batch": 1, "seconds": {"library": 0.1}}]
    line = encoder.judged(target, record_of(eager, seconds, floor), parts)
    assert line.startswith(f"C1, B = 1, float32: target >= 3x eager; {words}")
    assert line.endswith(f"its float32 parts alone, at their own shapes, take {0.6 / seconds:.0%} of its time")
    shared = dataclasses.replace(target, share=0.9)
    reached = seconds * 0.9 <= floor or eager >= 3 * seconds
    assert ("reached" in encoder.judged(shared, record_of(eager, seconds, floor), parts)) == reached


def test_a_target_whose_row_was_not_timed_says_so():
    record = {"batch": 1, "rows": {"eager": {"seconds": 1.0}}}
    assert encoder.judgements([record], [])[0] == "C1, B = 1, float32: target >= 3x eager; not measured"


def test_a_busy_machine_is_told():
    calm, busy = ({"load": load, "cores": 2} for load in (0.5, 3.0))
    sound, ahead = record_of(4.0, 2.0, 2.1), record_of(4.0, 2.0, 3.0)
    for record in (sound, ahead):
        record["rows"]["eager"]["floor_s"] = 1.0
    assert encoder.disturbances([sound], calm) == []
    assert encoder.disturbances([sound], busy) == ["The machine was busy when the run began: load 3.0 on 2 cores."]
    (told,) = encoder.disturbances([sound, ahead], calm)
    assert told == "The peak was measured while something else was running: ours at B = 1 beat the floor."
