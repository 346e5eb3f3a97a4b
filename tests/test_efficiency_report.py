"""What benchmarks/efficiency.py prints and saves: floors, tables, notes, figure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as Python does for a script there

import _figure  # noqa: E402
import _published  # noqa: E402
import _report  # noqa: E402


def report_of(rows):
    machine = {
        "device": "cpu",
        "device_name": "a processor",
        "cores": 2,
        "threads": 2,
        "memory_bytes": None,
        "system": "Linux",
        "isa": "AVX2",
        "kernels_isa": "avx2",
        "versions": {"torch": "2"},
        "ceilings": {
            "read_bytes_per_s": 10e9,
            "copy_bytes_per_s": 12e9,
            "matrix_flops_per_s": {"float32": 100e9, "bfloat16": 100e9},
            "matrix_flops_per_s_library": {"float32": 100e9, "bfloat16": 5e9},
        },
    }
    report = {
        "date": "2026-01-02T03:04:05",
        "quick": False,
        "arguments": {"device": "cpu", "dtype": "bfloat16"},
        "video": {"description": "a file"},
        "machine": machine,
        "rows": rows,
    }
    _report.add_floors(report)
    return report


def test_the_floor_is_the_higher_of_two():
    ceilings = report_of([])["machine"]["ceilings"]
    stage = {"bytes": 10_000_000, "flops": 50_000_000, "dtype": "float32"}
    assert _report.floor_seconds(stage, ceilings) == (pytest.approx(1e-3), "bytes")
    stage["flops"] = 200_000_000
    assert _report.floor_seconds(stage, ceilings) == (pytest.approx(2e-3), "FLOPs")
    assert _report.floor_seconds({"bytes": None, "flops": 1, "dtype": "float32"}, ceilings) == (None, "")


def measured_row(**changes):
    stage = {"runs": 1, "seconds": 0.5, "min_seconds": 0.4, "share": 0.25, "flops": 10**9, "bytes": 10**8}
    row = {
        "method": "FACE-net, ours",
        "decoder": "flan-t5-xl",
        "spec": {"quick": False, "impl": None},
        "status": "measured",
        "ids": list(range(15)),
        "parameters": {"trainable": 13_590_000, "all": 3_010_000_000},
        "flops": {
            "trained_modules": {"multiply_adds": 194_700_000, "flops": 389_400_000},
            "whole_caption": {"multiply_adds": 273 * 10**9, "flops": 546 * 10**9},
        },
        "time": {"median_s": 2.1, "p95_s": 2.5, "min_s": 2.0, "captions": 3},
        "memory": {"resident_bytes": 7_053_000_000},
        "throughput": {"batch": 2, "captions_per_s": 0.4567},
        "served_by": {"emotion_attention": "cpp"},
        "check": {"encoder_error": 2e-7, "rounded_differently": 8, "elements": 65_536},
        "stand_ins": {},
        "stages": [
            {"stage": "encoder", "dtype": "float32", **stage},
            {"stage": "decode step", "dtype": "bfloat16", **stage, "runs": 15, "seconds": 1.5, "share": 0.75},
        ],
        "step_seconds": [[0.1] * 15] * 3,
    }
    return row | changes


def test_the_tables_as_markdown():
    skipped = {
        "method": "FACE-net, ours",
        "decoder": "opt-2.7b",
        "spec": {"quick": False, "impl": None},
        "status": "skipped",
        "reason": "needs about 7 GB of memory, 2 GB is free",
    }
    page = _report.markdown(report_of([measured_row(), skipped]))
    lines = page.splitlines()
    assert (
        "| FACE-net, ours | flan-t5-xl | - | 13.6 M | 3.01 G | 195 M / 389 M | 273 G / 546 G | 2,100 (2,500) | 7,053 "
        "| 0.457 at 2 |"
    ) in lines
    assert "| FACE-net, ours | opt-2.7b | - | - | - | - | - | not measured | - | - |" in lines
    assert "- FACE-net, ours, opt-2.7b: not measured: needs about 7 GB of memory, 2 GB is free" in lines
    assert "| encoder | 500 | 25.0% | 1 G | 100 MB | 10 | 50.0x | bytes, float32 |" in lines
    assert "| decode step (one of 15) | 100 | 75.0% | 66.7 M | 6.67 MB | 0.667 | 150.0x | bytes, bfloat16 |" in lines
    assert any(line.startswith("- PyTorch's own bfloat16 products reach 5.0 GFLOP/s here") for line in lines)
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {11, 9}  # ten columns, eight columns


def test_stages_that_were_not_measured_say_what_they_need():
    row = measured_row(stand_ins={"retrieval": "needs faiss"})
    row["stages"].insert(0, {"stage": "retrieval", "not_measured": "needs faiss"})
    page = _report.markdown(report_of([row]))
    assert "| retrieval | not measured: needs faiss | - | - | - | - | - | - |" in page
    assert "- FACE-net, ours, flan-t5-xl: retrieval not measured, needs faiss; random data stands in." in page


def test_times_that_scatter_say_so():
    assert "the times scatter" not in _report.markdown(report_of([measured_row()]))
    assert "image features" not in _report.markdown(report_of([measured_row()]))
    busy = measured_row(time={"median_s": 2.1, "p95_s": 9.0, "min_s": 2.0, "captions": 3})
    page = _report.markdown(report_of([busy]))
    assert "3 captions timed, the fastest in 2,000 ms" in page
    checked = measured_row(check={"encoder_error": 2e-7, "features_cosine": 0.99996})
    assert "before timing; image features with cosine 1 - 4e-05 to" in _report.markdown(report_of([checked]))
    assert "- FACE-net, ours, flan-t5-xl: the times scatter" in page


def test_rows_that_wrote_other_words_say_so():
    other = measured_row(ids=list(range(1, 16)), spec={"quick": False, "impl": "reference"})
    assert "In the decoder's dtype 8 of 65,536 elements" in _report.markdown(report_of([measured_row(), other]))
    assert "both rows wrote the same 15 tokens" in _report.markdown(report_of([measured_row(), measured_row()]))


def test_the_figure_is_drawn_with_and_without_measured_rows(tmp_path):
    for name, rows in (("some", [measured_row()]), ("none", [])):
        path = _figure.draw(report_of(rows), tmp_path / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "some.png").stat().st_size != (tmp_path / "none.png").stat().st_size


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (3.014e9, "3.01 G"), (13.59e6, "13.6 M"), (1500, "1.5 k"), (12, "12")]
)
def test_counts_are_short(value, text):
    assert _report.count(value) == text


def test_published_rows_are_those_of_the_paper():
    assert [(row.method, row.milliseconds, row.megabytes) for row in _published.TABLE_6] == [
        ("EPAN", 198.6, 5602),
        ("DCGN", 247.8, 6201),
        ("VideoBLIP", 3610.0, 15852),
        ("MM-ECPE", 4076.8, 18742),
        ("FACE-net", 4252.6, 21064),
    ]
    assert _published.TABLE_6[-1].trainable_parameters == 63.9e6
    assert _published.TABLE_6[-1].multiply_adds == 3.98e9
