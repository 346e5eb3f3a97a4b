"""Runs a function over many files in processes that may hang, swell or crash: each job gets a result or a typed error.

A decoder is a large C library that reads what strangers wrote. So each file has a process of its own: a worker program
imports what is needed once and forks a child for each job, whose memory is limited and whose time is watched. What one
file spoils is gone before the next one comes. Workers are programs, not forks of this process: it has threads, and its
main module is not imported again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from evc_fast.data.video_errors import OutOfMemory, VideoError

_START_S = 120.0  # a worker imports torch and PyAV, on a cold disk
_STARVED = 10  # a job may take this many times its time by the clock, if it waits for a processor on a busy machine
_GRACE_S = 30.0  # for an answer after that: the system may be unable to end a process that waits for a dead disk
_BYTES_PER_S = 1_000_000  # of a file beyond what `timeout_s` covers: software decoding of any codec is faster
_BOOT = "import sys, json; o = json.loads(sys.argv[1]); sys.path[:] = o['path']; import {m}; {m}._serve(o)"
_OVERDUE = 1000  # stands for the exit status of a job that was stopped
_HEADER = struct.Struct("<QQ")  # bytes of JSON, bytes of payload

Task = Callable[..., tuple[Any, bytes]]


class DecodingTimeout(VideoError):
    """The decoder gave no answer in time and was killed."""


class DecoderCrash(VideoError):
    """The decoder took its process down with it."""


@dataclass(frozen=True)
class Limits:
    """What one job may take.

    timeout_s: seconds for a file of up to 10 MB; a larger one gets a second more for each MB beyond. Time in which the
        job waited for a processor does not count, so that a busy machine blames no file.
    memory_mb: MB (2^20 bytes) that a job may come to hold. What counts is the peak that the system measured, since
        decoders take a failed allocation for damage and go on; more than twice as much cannot be allocated.
    """

    timeout_s: float = 10.0
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, not {self.timeout_s!r}")
        if isinstance(self.memory_mb, bool) or not isinstance(self.memory_mb, int) or self.memory_mb < 1:
            raise ValueError(f"memory_mb must be an integer of at least 1, not {self.memory_mb!r}")

    def seconds_for(self, size: int) -> float:
        """Seconds for a file of `size` bytes."""
        return self.timeout_s + max(0, size - 10 * _BYTES_PER_S) / _BYTES_PER_S


@dataclass(frozen=True)
class Outcome:
    """What became of one job.

    value, payload: what the task returned; kind: the error's class, "" where there was none; reason: its sentence
    typed: False for an error that neither the video nor the system explains, which is a mistake in the program
    seconds: that the job took, as `Limits` counts them
    """

    value: Any = None
    payload: bytes | bytearray = b""
    kind: str = ""
    reason: str = ""
    typed: bool = True
    seconds: float = 0.0


def run_guarded(
    task: Task,
    jobs: Iterable[Mapping[str, Any]],
    *,
    workers: int,
    limits: Limits | None = None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Outcome]:
    """Yields an `Outcome` for each job, in their order, `workers` of them at a time and few ahead.

    task: a function of a module, called with the job's entries as keywords, which returns (what JSON can hold, bytes).
    jobs: each with a "path", which names the file in messages and whose size sets the time; values that JSON can hold.
    prepare: a function of the task's module that a worker calls first; what it loads, its jobs find loaded.

    Raises ValueError for `workers` below 1 or a task of the main program, RuntimeError where a worker does not start.
    Ending the iteration early, by an exception or by `close`, kills the workers.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be an integer of at least 1, not {workers!r}")
    if task.__module__ == "__main__":
        raise ValueError(f"{task.__name__} must be a function of a module: a worker cannot import the main program")
    limits = limits or Limits()
    options = {
        "path": sys.path,
        "module": task.__module__,
        "function": task.__name__,
        "prepare": None if prepare is None else prepare.__name__,
        "memory_mb": limits.memory_mb,
    }
    return _run(options, jobs, workers, limits)


def _run(options: dict[str, Any], jobs: Iterable[Mapping[str, Any]], workers: int, limits: Limits) -> Iterator[Outcome]:
    crew = [_Worker(options, limits) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)

    def attempt(job: Mapping[str, Any]) -> Outcome:
        worker = idle.get()
        try:
            return worker.run(job)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[Outcome]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(attempt, job))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in crew:
            worker.stop()
        pool.shutdown()
        for worker in crew:
            worker.close()


class _Worker:
    """This process's end of one worker, which is started when it is needed, and again should it die."""

    def __init__(self, options: dict[str, Any], limits: Limits) -> None:
        self._limits = limits
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        self._closed = False

    def run(self, job: Mapping[str, Any]) -> Outcome:
        path = os.fspath(job["path"])
        try:
            allowed = self._limits.seconds_for(os.stat(path).st_size)
        except OSError as error:
            return Outcome(kind=type(error).__name__, reason=f"{path} cannot be read: {error.strerror}")
        request = json.dumps({"job": {**job, "path": path}, "seconds": allowed}).encode() + b"\n"
        self._start()
        begin = time.monotonic()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            answer, payload = self._receive(begin + _STARVED * allowed + _GRACE_S)
        except TimeoutError:
            self._kill()
            answer, payload = {"died": _OVERDUE, "seconds": time.monotonic() - begin}, b""
        except (EOFError, BrokenPipeError, ValueError):  # ValueError: it was killed in the middle of its answer
            answer, payload = {"died": self._kill(), "seconds": time.monotonic() - begin}, b""
        if "died" not in answer:
            return Outcome(payload=payload, **answer)
        status, seconds = answer["died"], answer["seconds"]
        if status in (_OVERDUE, -signal.SIGALRM):
            reason = f"decoding {path} took more than {allowed:g} s and was stopped"
            return Outcome(kind=DecodingTimeout.__name__, reason=reason, seconds=seconds)
        how = f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
        reason = f"decoding {path} took its process down: it {how}"
        return Outcome(kind=DecoderCrash.__name__, reason=reason, seconds=seconds)

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if self._closed:
            raise RuntimeError("this pool of decoding workers is closed")
        self._log.seek(0)
        self._log.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(m=__name__), json.dumps(self._options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},  # no thread that a fork would lose
            process_group=0,  # Ctrl-C is ours to handle; and its child is killed with it
        )
        try:
            self._receive(time.monotonic() + _START_S)
        except (TimeoutError, EOFError):
            self._kill()
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"a decoding worker did not start: {lines[-1]}") from None

    def _receive(self, deadline: float) -> tuple[Any, bytearray]:
        first, second = _HEADER.unpack(self._read(_HEADER.size, deadline))
        return json.loads(self._read(first, deadline)), self._read(second, deadline)

    def _read(self, count: int, deadline: float) -> bytearray:
        data, descriptor = bytearray(), self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1e3):
                raise TimeoutError
            piece = os.read(descriptor, min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _kill(self) -> int:
        """Ends the worker and its child; the exit status, negative for a signal."""
        process = self._process
        if process.returncode is None:  # as long as it was not waited for, its number is its own
            with contextlib.suppress(ProcessLookupError):  # both have ended
                os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a request that it did not live to read
                pipe.close()
        return process.wait()

    def stop(self) -> None:
        """From any thread: kills the processes, so that whoever waits for an answer sees the end of the pipe."""
        self._closed = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """When no thread uses it any more."""
        if self._process is not None:
            self._kill()
        self._log.close()


def _serve(options: dict[str, Any]) -> None:
    """The worker: one line of JSON a job on standard input, one answer each on standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints does not get between the answers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module = importlib.import_module(options["module"])
    task: Task = getattr(module, options["function"])
    if options["prepare"] is not None:
        getattr(module, options["prepare"])()
    _answer(answers, {"value": "ready"})
    for line in sys.stdin.buffer:
        request, begin = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            _do(task, request, options["memory_mb"] << 20, answers)
            os._exit(0)
        status = _watch(child, request["seconds"])
        if status != 0:
            _answer(answers, {"died": status, "seconds": time.monotonic() - begin})


def _watch(child: int, seconds: float) -> int:
    """Waits for a child, and kills it when its time is over: its exit status, negative for a signal, or _OVERDUE."""
    begin, left, overdue = time.monotonic(), seconds, False
    descriptor = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(left * 1e3):
            left = seconds - (time.monotonic() - begin - _waited(child))
            if left <= 0:
                os.kill(child, signal.SIGKILL)
                overdue = True
                break
            left = max(left, 0.05)
    finally:
        os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return _OVERDUE if overdue else status


def _waited(process: int | str) -> float:
    """Seconds for which a process was ready to run and no processor was free; 0 where the system does not count."""
    try:
        with open(f"/proc/{process}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) * 1e-9
    except FileNotFoundError:
        return 0.0


def _do(task: Task, request: dict[str, Any], limit: int, answers: Any) -> None:
    """The child: one job."""
    path = request["job"]["path"]
    most = _own_memory("VmHWM") + limit
    _limit_allocations(2 * limit)
    # By default the alarm ends the process, though it be stuck in C; it also ends one that nobody watches any more.
    signal.setitimer(signal.ITIMER_REAL, _STARVED * request["seconds"])
    begin, waited = time.monotonic(), _waited("self")
    try:
        value, payload = task(**request["job"])
        answer: dict[str, Any] = {"value": value}
    except Exception as error:  # every job gets its answer
        answer, payload = _described(error, path), b""
    signal.setitimer(signal.ITIMER_REAL, 0)
    if _own_memory("VmHWM") > most:  # what a decoder gives for want of memory may look whole, or damaged
        answer, payload = _described(MemoryError(), path), b""
    answer["seconds"] = time.monotonic() - begin - (_waited("self") - waited)
    _answer(answers, answer, payload)


def _answer(pipe: Any, value: Any, payload: bytes = b"") -> None:
    text = json.dumps(value).encode()
    pipe.write(_HEADER.pack(len(text), len(payload)))
    pipe.write(text)
    pipe.write(payload)
    pipe.flush()


def _described(error: Exception, path: str) -> dict[str, Any]:
    lack = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    if lack or isinstance(error, OutOfMemory):
        reason = f"decoding {path} takes more memory than the limit of its process"
        return {"kind": OutOfMemory.__name__, "reason": reason, "typed": True}
    if isinstance(error, (VideoError, OSError)):
        return {"kind": type(error).__name__, "reason": str(error), "typed": True}
    reason = f"decoding {path} failed in a way that nobody foresaw: {type(error).__name__}: {error}"
    return {"kind": type(error).__name__, "reason": reason, "typed": False}


def _own_memory(field: str) -> int:
    """Bytes of one field of this process's status."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(f"{field}:"))


def _limit_allocations(more: int) -> None:
    """Lets this process allocate `more` bytes from here on; RLIMIT_DATA counts private writable memory alone."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _own_memory("VmData") + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
