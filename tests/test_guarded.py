"""Workers that hang, swell and crash: each job has its outcome, and the rest goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import faulty_tasks

from evc_fast.data import guarded
from evc_fast.data.guarded import Limits, run_guarded

LIMITS = Limits(timeout_s=20, memory_mb=128)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.file"
    path.write_bytes(b"bytes")
    return path


def run(file, actions, workers=1, limits=LIMITS, **options):
    jobs = ({"path": file, "action": action, "value": number} for number, action in enumerate(actions))
    return list(run_guarded(faulty_tasks.act, jobs, workers=workers, limits=limits, **options))


def gone(process: int, within: float = 5.0) -> bool:
    """Whether a process ends; a zombie has ended."""
    for _ in range(int(within / 0.05)):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_results_come_in_order_whoever_made_them(file):
    outcomes = run(file, ["answer", "print"] * 10, workers=2)
    assert [outcome.value[0] for outcome in outcomes] == list(range(20))
    assert [bytes(outcome.payload) for outcome in outcomes] == [b"payload of %d" % number for number in range(20)]
    assert all(outcome.kind == outcome.reason == "" for outcome in outcomes)


def test_every_fault_is_typed_and_the_next_job_runs(file):
    expected = {
        "answer": ("", ""),
        "segfault": ("DecoderCrash", "some.file took its process down with it|was killed by SIGSEGV"),
        "exit": ("DecoderCrash", "ended with status 3"),
        "swell": ("OutOfMemory", "more memory than the limit"),
        "swell and hide it": ("OutOfMemory", "more memory than the limit"),
        "claim": ("OutOfMemory", "more memory than the limit"),
        "typed": ("EmptyVideo", "some.file is empty"),
        "untyped": ("ZeroDivisionError", "nobody foresaw: ZeroDivisionError: one by none"),
    }
    actions = [action for fault in expected for action in (fault, "answer")]
    outcomes = run(file, actions)
    for (action, (kind, reason)), outcome in zip(expected.items(), outcomes[::2], strict=True):
        assert outcome.kind == kind and any(part in outcome.reason for part in reason.split("|")), action
        assert outcome.typed == (action != "untyped")
    assert all(outcome.kind == "" for outcome in outcomes[1::2])


def test_a_hang_is_killed(file):
    outcomes = run(file, ["sleep", "answer", "spin", "answer"], limits=Limits(1.5))
    for hung in outcomes[::2]:
        assert hung.kind == "DecodingTimeout" and "took more than 1.5 s" in hung.reason and hung.seconds >= 1.5
    assert all(after.kind == "" for after in outcomes[1::2])


def test_waiting_for_a_processor_is_no_hang(monkeypatch):
    begin = time.monotonic()
    monkeypatch.setattr(guarded, "_waited", lambda process: min(time.monotonic() - begin, 1.0))
    with subprocess.Popen(["sleep", "60"]) as child:
        assert guarded._watch(child.pid, 0.5) == guarded._OVERDUE
        child.returncode = 0  # it has been waited for
    assert time.monotonic() - begin >= 1.5


def test_each_job_has_a_process_of_its_own(file):
    outcomes = run(file, ["answer"] * 5, prepare=faulty_tasks.prepare)
    assert len({outcome.value[1] for outcome in outcomes}) == 5
    assert all(outcome.value[2] == ["ready", number] for number, outcome in enumerate(outcomes))


def test_a_missing_file_needs_no_worker(tmp_path):
    (outcome,) = run(tmp_path / "nothing", ["answer"])
    assert outcome.kind == "FileNotFoundError" and "nothing cannot be read" in outcome.reason and outcome.typed


def test_ending_early_kills_the_workers(file):
    jobs = ({"path": file, "action": "answer" if number < 2 else "sleep"} for number in range(9))
    with closing(run_guarded(faulty_tasks.act, jobs, workers=2)) as outcomes:
        processes = {next(outcomes).value[1] for _ in range(2)}
    assert all(gone(process) for process in processes)


def test_a_worker_that_does_not_start_says_why(file, tmp_path, monkeypatch):
    (tmp_path / "broken_task.py").write_text(
        "def task(path): pass\nimport os\nif 'PARENT' not in os.environ: import nil\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PARENT", "here")
    import broken_task

    monkeypatch.delenv("PARENT")
    with pytest.raises(RuntimeError, match="did not start: ModuleNotFoundError: No module named 'nil'"):
        list(run_guarded(broken_task.task, [{"path": file}], workers=1))


def test_arguments_are_checked(file):
    for workers in (0, True, 1.0):
        with pytest.raises(ValueError, match="workers must be an integer of at least 1"):
            run_guarded(faulty_tasks.act, [], workers=workers)
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        Limits(timeout_s=0)
    for memory in (0, 1.5, True):
        with pytest.raises(ValueError, match="memory_mb must be an integer of at least 1"):
            Limits(memory_mb=memory)

    def local(path):
        return path, b""

    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="local must be a function of a module"):
        run_guarded(local, [], workers=1)


def test_a_large_file_gets_more_time():
    assert Limits(10).seconds_for(5_000_000) == 10
    assert Limits(10).seconds_for(200_000_000) == 200


def test_workers_end_when_their_parent_is_killed(file):
    program = f"""if True:
        import sys; sys.path[:] = {sys.path!r}
        import faulty_tasks
        from evc_fast.data.guarded import *
        jobs = [{{"path": {str(file)!r}, "action": action}} for action in ("answer", *["sleep"] * 9)]
        for outcome in run_guarded(faulty_tasks.act, jobs, workers=1, limits=Limits(3.0)):
            print("one is done", flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        (worker,) = _until(lambda: children(parent.pid))
        assert parent.stdout.readline() == b"one is done\n"  # the next one sleeps, and dies of its alarm
        (child,) = _until(lambda: children(worker))
        parent.kill()
    assert gone(child, within=30) and gone(worker, within=30)


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found


def _until(look):
    for _ in range(1200):
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("the program started no process")
