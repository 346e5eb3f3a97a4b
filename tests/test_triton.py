"""The Triton kernels under Triton's interpreter, in a process of its own, on the shared cases against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("evc_fast.kernels") is None,
    reason="needs triton, and an installed evc_fast",
)

# The interpreter runs every program in Python: what costs it minutes is left to a GPU.
CHECK = """
import importlib.util, sys
import torch
from evc_fast.ops import dispatch
from evc_fast.testing.cases import CASES, LAYOUTS

spec = importlib.util.spec_from_file_location("test_ops", sys.argv[1])
test_ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_ops)
torch.set_num_threads(1)
op, names, layouts = sys.argv[2], sys.argv[3].split(","), sys.argv[4:]
assert next(i for i in dispatch.implementations(op) if i.name == "triton").available
assert not next(i for i in dispatch.implementations(op) if i.name == "cpp").available
cases = [case for case in CASES if case.op == op and case.name in names]
assert len(cases) == len(names), [case.name for case in cases]
for case in cases:
    test_ops.check_against_plain(case, torch.float32, "triton")
    for layout in layouts:
        test_ops.check_against_plain(case, torch.float32, "triton", layout=layout)
        test_ops.check_against_plain(case, torch.float32, "triton", gradient_layout=layout)
print("checked", len(cases))
"""


def interpreted(op: str, names: str, *layouts: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", CHECK, str(TESTS / "test_ops.py"), op, names, *layouts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("entropy_calibration", "odd,tiny"),
        ("factored_hidden", "odd,tiny,one-frame"),
        ("emotion_attention", "odd,tiny"),
        ("routing_aggregation", "odd,tiny"),
    ],
)
def test_values_and_gradients_under_the_interpreter(op, names):
    assert "checked" in interpreted(op, names, "sliced")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("entropy_calibration", "no-self,no-cross,groups,groups-same,one-hot,tiny-entropy,dominant-similarity,empty"),
        ("factored_hidden", "one-triplet,many-terms,saturated,empty"),
        ("emotion_attention", "one-frame,one-word,one-wide-heads,empty"),
        ("routing_aggregation", "one-triplet,one-frame,logits-1e4,empty"),
    ],
)
def test_more_values_under_the_interpreter(op, names):
    assert "checked" in interpreted(op, names)
