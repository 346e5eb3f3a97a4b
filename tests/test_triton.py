"""The Triton kernels under Triton's interpreter, in a process of its own, on the shared cases against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TEST_OPS = str(Path(__file__).parent / "test_ops.py")
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


# Five videos in one or two chunks: a program adds several videos' gradients of the dictionary.
CHECK_CHUNKS = """
import importlib.util, sys
import torch
from evc_fast.kernels import emotion_attention
from evc_fast.testing.cases import Case

spec = importlib.util.spec_from_file_location("test_ops", sys.argv[1])
test_ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_ops)
torch.set_num_threads(1)
emotion_attention.MIN_CHUNKS, emotion_attention.PROGRAMS = 1, 4
sizes = {"B": 5, "K": 2, "N": 5, "W": 21, "d": 24}
for heads in (2, 4):
    case = Case("emotion_attention", "videos of a chunk", sizes, {"num_heads": heads})
    test_ops.check_against_plain(case, torch.float32, "triton")
print("checked")
"""

CHECK_FOLDED = """
import sys
import torch
from evc_fast.testing.encoder_cases import ENCODER_OPTIONS, build_encoder, cast_inputs, encoder_inputs, named_outputs
from evc_fast.testing.tolerances import FORWARD_FACTOR, assert_as_good_as_plain

torch.set_num_threads(1)
names = sys.argv[1:] or list(ENCODER_OPTIONS)
for name in names:
    encoder = build_encoder(**ENCODER_OPTIONS[name])
    folded = encoder.fold(dtype=torch.float32)
    inputs = cast_inputs(encoder_inputs(encoder.config, 2), torch.float32)
    exact = cast_inputs(inputs, torch.float64)
    with torch.no_grad():
        oracle = named_outputs(encoder(*exact, explain=True, impl="reference"))
        plain = named_outputs(folded(*inputs, explain=True, impl="reference"))
        actual = named_outputs(folded(*inputs, explain=True, impl="triton"))
    assert actual.keys() == oracle.keys() and oracle["tokens"] is not None
    for what, value in oracle.items():
        assert (value is None) == (actual[what] is None), f"{name}: {what}"
        if value is not None:
            assert_as_good_as_plain(actual[what], plain[what], value, FORWARD_FACTOR, f"{name}: {what}")
print("checked", len(names))
"""


def interpreted(code: str, *arguments: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize(
    ("op", "names", "layouts"),
    [
        ("entropy_calibration", "odd,tiny", ["sliced"]),
        ("factored_hidden", "odd,tiny,one-frame", ["sliced"]),
        ("emotion_attention", "odd,tiny", []),
        pytest.param("emotion_attention", "odd,tiny", ["sliced"], marks=pytest.mark.slow),
        ("routing_aggregation", "odd,tiny", ["sliced"]),
    ],
)
def test_values_and_gradients_under_the_interpreter(op, names, layouts):
    assert "checked" in interpreted(CHECK, TEST_OPS, op, names, *layouts)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("entropy_calibration", "no-self,no-cross,groups,groups-same,one-hot,tiny-entropy,dominant-similarity,empty"),
        ("entropy_calibration", "logits-1e4"),
        ("factored_hidden", "one-triplet,many-frames,many-terms,saturated,empty"),
        ("emotion_attention", "one-frame,one-word,one-wide-heads,empty"),
        ("emotion_attention", "many-frames"),
        ("routing_aggregation", "one-triplet,one-frame,many-frames,many-triplets,logits-1e4,empty"),
    ],
)
def test_more_values_under_the_interpreter(op, names):
    assert "checked" in interpreted(CHECK, TEST_OPS, op, names)


@needs_triton
@pytest.mark.slow
def test_several_videos_of_a_chunk_under_the_interpreter():
    assert "checked" in interpreted(CHECK_CHUNKS, TEST_OPS)


@needs_triton
def test_folded_encoder_under_the_interpreter():
    assert "checked 3" in interpreted(CHECK_FOLDED, "paper", "no_retrieval", "emotion_first_video_merge")


@needs_triton
@pytest.mark.slow
def test_folded_encoder_of_every_configuration_under_the_interpreter():
    assert "checked 17" in interpreted(CHECK_FOLDED)
