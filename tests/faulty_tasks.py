"""Tasks for `run_guarded` that do what decoders do at their worst; worker processes import them."""

from __future__ import annotations

import os
import signal
import time

from evc_fast.data.video_errors import EmptyVideo

_prepared: list[str] = []


def prepare() -> None:
    _prepared.append("ready")


def act(path: str, action: str = "answer", value: object = None) -> tuple[object, bytes]:
    """Does `action`; an answer tells the value, the process, and what `prepare` left."""
    if action == "sleep":
        time.sleep(600)
    elif action == "spin":
        while True:
            pass
    elif action == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif action == "exit":
        os._exit(3)
    elif action == "swell":
        _swell()
    elif action == "swell and hide it":
        try:
            _swell()
        except MemoryError:
            return "as if nothing had been", b""
    elif action == "claim":
        bytearray(1 << 40)
    elif action == "typed":
        raise EmptyVideo(f"{path} is empty")
    elif action == "untyped":
        raise ZeroDivisionError("one by none")
    elif action == "print":
        print("what a library says", flush=True)
        os.write(1, b"and what it says past Python\n")
    _prepared.append(value)  # no other job is to see it
    return [value, os.getpid(), _prepared], b"payload of " + str(value).encode()


def _swell() -> None:
    held = []
    while True:
        held.append(b"x" * (8 << 20))
