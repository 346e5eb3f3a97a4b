"""CUDA graphs of a folded encoder: large batches run its products by the library, launched as one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Outputs = tuple[Tensor | None, ...]

_KEPT = 4  # graphs: each holds its inputs, its outputs and what stands between them
_REMEMBERED = 64  # sizes that came once, and are captured if they come again
_WARM_UPS = 2  # the library chooses its algorithms and takes its workspace before anything is captured


class _Captured:
    """One call with inputs and outputs at fixed addresses."""

    @torch.inference_mode(False)  # tensors made in it could not be written outside of it
    @torch.no_grad()
    def __init__(self, call: Callable[..., Outputs], inputs: Sequence[Tensor | None]) -> None:
        self._inputs = [None if x is None else x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may allocate meanwhile, as a loader that pins memory does: "global" would refuse it to them.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = call(*self._inputs)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> None:
        """Until no replay reads or writes this memory, on whatever stream it was called."""
        self._done.synchronize()

    def __call__(self, inputs: Sequence[Tensor | None]) -> Outputs:
        torch.cuda.current_stream().wait_event(self._done)  # a call on another stream still reads these buffers
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        self._graph.replay()
        outputs = tuple(None if x is None else x.clone() for x in self._outputs)
        self._done.record()
        return outputs


class GraphedCall:
    """``call(*inputs)`` on a GPU through a CUDA graph, captured when inputs have the same shapes and types again.

    A capture costs many calls, and a size that never comes again would not repay it. What ``call`` reads beside its
    inputs must keep its address. The results are the caller's own. Threads take turns.
    """

    def __init__(self, call: Callable[..., Outputs]) -> None:
        self._call = call
        self._captured: OrderedDict[tuple, _Captured] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor | None) -> Outputs:
        if torch.cuda.is_current_stream_capturing():  # it becomes part of the caller's graph
            return self._call(*inputs)
        key = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        with self._lock, torch.cuda.device(inputs[0].device):
            if key not in self._captured:
                if self._is_new(key):
                    return self._call(*inputs)
                if len(self._captured) == _KEPT:
                    self._captured.popitem(last=False)[1].wait()
                self._captured[key] = _Captured(self._call, inputs)
            self._captured.move_to_end(key)
            return self._captured[key](inputs)

    def _is_new(self, key: tuple) -> bool:
        new = key not in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return new
