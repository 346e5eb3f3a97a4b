"""GraphedCall's bookkeeping without a GPU: a stand-in for CUDA graphs that computes anew at every replay."""

from __future__ import annotations

import contextlib

import pytest
import torch

from evc_fast.model import folded_graph
from evc_fast.model.folded_graph import GraphedCall


class Stand:
    """A stream, an event, or a device's guard: the CPU has no order to keep."""

    def __getattr__(self, name):
        return lambda *_: None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def calls(monkeypatch):
    """Graphs that replay the call that they captured, and what was called with which rows."""
    seen = []

    def call(x, y):
        seen.append(len(x))
        return x * 2 + (0 if y is None else y), None

    class Graph:
        def replay(self):
            for kept, now in zip(self.outputs, self.call(), strict=True):
                if kept is not None:
                    kept.copy_(now)

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield
        captured = next(c for c in made if c._graph is graph)
        graph.outputs, graph.call = captured._outputs, lambda: call(*captured._inputs)

    made = []
    plain = folded_graph._Captured.__init__
    monkeypatch.setattr(
        folded_graph._Captured, "__init__", lambda self, *given: (made.append(self), plain(self, *given))[1]
    )
    for name in ("Stream", "Event", "current_stream", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: Stand())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return GraphedCall(call), seen, made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_read_the_inputs_given_and_results_are_the_callers_own(calls, mode):
    call, _, made = calls
    with mode():
        x, y = torch.randn(3, 2), torch.randn(3, 2)
        assert torch.equal(call(x, y)[0], x * 2 + y)
        assert made == []
        first, nothing = call(x, y)
        second, _ = call(y, x)
    with torch.no_grad():
        third, _ = call(x + 1, y)
    assert nothing is None
    assert torch.equal(first, x * 2 + y)
    assert torch.equal(second, y * 2 + x)
    assert torch.equal(third, (x + 1) * 2 + y)
    assert len(made) == 1


def test_every_shape_and_type_that_comes_again_has_a_graph_and_the_oldest_goes(calls):
    call, seen, made = calls

    def twice(*given):
        for _ in range(2):
            call(*given)

    for rows in (1, 2, 3, 4):
        twice(torch.zeros(rows, 2), None)
    call(torch.zeros(1, 2), None)
    assert len(made) == 4
    twice(torch.zeros(1, 2), torch.zeros(1, 2))  # in the place of 2 rows, the longest unused
    call(torch.zeros(1, 2), None)
    assert len(made) == 5
    call(torch.zeros(2, 2), None)  # it came before: captured anew
    twice(torch.zeros(2, 2, dtype=torch.float64), None)
    assert len(made) == 7
    assert set(seen) == {1, 2, 3, 4}


def test_sizes_that_never_come_again_are_not_captured(calls):
    call, seen, made = calls
    for _ in range(2):
        for rows in range(1, 100):
            call(torch.zeros(rows, 2), None)
    assert made == []
    assert len(seen) == 2 * 99


def test_within_the_callers_own_capture_nothing_is_captured(calls, monkeypatch):
    call, _, made = calls
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.ones(2, 2)
    assert torch.equal(call(x, None)[0], x * 2)
    assert made == []
