"""Table 6 of the FACE-net paper, measured here: parameters, FLOPs, time and memory of a caption of a real video file.

    python benchmarks/efficiency.py                        FLAN-T5-XL in bfloat16 on the CPU, a few minutes
    python benchmarks/efficiency.py --quick                tiny shapes, under a minute
    python benchmarks/efficiency.py --decoder all --device cuda

Rows: the paper's five, as published; then FACE-net as a user would write it, with the reference ops and transformers'
image tower, and FACE-net as evc_fast runs it, once a decoder. Each measured row runs in a process of its own. Weights
are random in the true shape. Exit code: 0, or 1 where a row failed (rows that cannot run here are skipped and say why).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from _figure import draw
from _published import GPU, TABLE_6
from _report import FIGURE_NAME, add_floors, print_report, save
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

DECODERS = ("flan-t5-xl", "opt-2.7b", "lstm", "transformer")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PROGRESS = "@progress "
COSINE = 0.999  # of every frame's image features, ours with transformers'
DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "local"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--decoder",
        default="flan-t5-xl",
        help=f"any of {', '.join(DECODERS)}, separated by commas, or all (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the LLM (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=available_cores(), help="default: all cores, %(default)s")
    parser.add_argument("--batch", type=positive, help="videos captioned together; default: 4, or 2 if slow")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, under a minute: a trial, no figures")
    parser.add_argument("--video", type=Path, help="video file to caption; default: a clip that is encoded on the spot")
    parser.add_argument("--repeats", type=positive, help="captions timed a row; default: as the time allows, 3 to 50")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timed captions a row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        arguments.decoders = decoder_names(arguments.decoder)
        check_device(arguments.device)
        check_video(arguments.video)
        check_folder(arguments.out)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return arguments


def decoder_names(text: str) -> list[str]:
    """The decoders of a list separated by commas, in its order, each once; "all" stands for those not yet named."""
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise argparse.ArgumentTypeError(f"argument --decoder: an entry of {text!r} is empty")
    unknown = [name for name in names if name not in (*DECODERS, "all")]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"argument --decoder: {', '.join(unknown)} is not among {', '.join(DECODERS)}, all"
        )
    return list(dict.fromkeys(each for name in names for each in (DECODERS if name == "all" else (name,))))


def check_device(name: str) -> None:
    """Refuse what is neither the CPU nor a GPU that this PyTorch sees."""
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not index.isdecimal())):
        raise argparse.ArgumentTypeError(f"argument --device: must be cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda":
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise argparse.ArgumentTypeError(f"argument --device: there is no {name}, this PyTorch sees {count} GPUs")


def check_video(path: Path | None) -> None:
    """Refuse a path that is no video file, as far as what is installed can tell."""
    if path is None:
        return
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"argument --video: {path} is a folder, expected a video file")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"argument --video: there is no file {path}")
    if importlib.util.find_spec("av") is not None:
        from evc_fast.data.video import read_frames

        try:
            read_frames(path, 1)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(f"argument --video: {error}") from error


def check_folder(folder: Path) -> None:
    """Create the folder of the results and write into it once, before minutes are spent on measuring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"argument --out: cannot write into {folder}: {error.strerror or error}"
        ) from error


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def row_specs(arguments: argparse.Namespace, video: Path | None) -> list[dict]:
    """The measured rows in the order of the table: reference and ours for each decoder."""
    common = {
        "device": arguments.device,
        "dtype": DTYPES[arguments.dtype],
        "threads": arguments.threads,
        "batch": arguments.batch,
        "quick": arguments.quick,
        "video": None if video is None else str(video),
        "repeats": arguments.repeats,
        "budget": 0.5 if arguments.quick else arguments.seconds,
    }
    rows = []
    for decoder in arguments.decoders:
        rest = " and generate" if decoder in ("flan-t5-xl", "opt-2.7b") else ", own beam search"
        reference = f"FACE-net, reference ops, transformers' image tower{rest}"
        rows.append({"method": reference, "decoder": decoder, "impl": "reference", **common})
        rows.append({"method": "FACE-net, ours", "decoder": decoder, "impl": None, **common})
    return rows


def prepare_video(arguments: argparse.Namespace, folder: Path) -> tuple[Path | None, str]:
    """The file that is captioned and what it is; None where PyAV is not installed to encode or decode one."""
    try:
        import av
    except ModuleNotFoundError:
        return None, "none: needs av (PyAV); fixed random frames stand in"
    if arguments.video is not None:
        return arguments.video.resolve(), str(arguments.video)
    from _clip import encode_clip

    seconds, width, height = (2, 160, 90) if arguments.quick else (10, 640, 360)
    path = encode_clip(folder / "clip.mp4", seconds=seconds, width=width, height=height)
    size = path.stat().st_size / 1e6
    return path, f"encoded here with PyAV {av.__version__}: H.264, {seconds} s, 25 fps, {width}x{height}, {size:.2f} MB"


def run_task(task: dict, threads: int, on_progress: Callable[[str, float], None]) -> tuple[dict, bool]:
    """Run one task in a process of its own: its record, and whether it ended well. A crash becomes a record too."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        task_path, result_path = Path(folder) / "task.json", Path(folder) / "result.json"
        task_path.write_text(json.dumps(task))
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(task_path), str(result_path)]
        with (Path(folder) / "stderr").open("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            try:
                for line in process.stdout:
                    if line.startswith(PROGRESS):
                        event = json.loads(line.removeprefix(PROGRESS))
                        on_progress(event["phase"], event["fraction"])
                code = process.wait()
            finally:
                if process.poll() is None:  # interrupted: the row does not outlive the table
                    process.kill()
                    process.wait()
            errors.seek(0)
            said = errors.read().strip()
        if not result_path.exists():
            return {"status": "failed", "reason": crash_reason(code, said), "stderr": said}, False
        record = json.loads(result_path.read_text())
        if code:
            record["stderr"] = said
        return record, code == 0


def crash_reason(code: int, said: str) -> str:
    """One sentence on a process that ended without a record."""
    last = said.splitlines()[-1] if said else "it said nothing"
    if code == -9:
        return f"the row's process was killed (signal 9), as the system does when memory runs out; {last}"
    return f"the row's process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}; {last}"


def compare_towers(records: list[dict]) -> None:
    """Hold the image features of each decoder's rows against each other, in place.

    Features leave the records; ours get the least cosine of a frame, and fail where it is below COSINE.
    """
    features = [record.pop("features", None) for record in records]
    of_reference = {
        record["decoder"]: values
        for record, values in zip(records, features, strict=True)
        if values is not None and record["spec"]["impl"] == "reference"
    }
    for record, values in zip(records, features, strict=True):
        if values is None or record["spec"]["impl"] == "reference" or record["decoder"] not in of_reference:
            continue
        pairs = zip(values, of_reference[record["decoder"]], strict=True)
        cosine = min(cosine_of(one, other) for one, other in pairs)
        record["check"]["features_cosine"] = cosine
        if not cosine >= COSINE:
            reason = f"its image features have cosine {cosine:.6f} with transformers', allowed is {COSINE}"
            record |= {"status": "failed", "reason": reason}


def cosine_of(one: list[float], other: list[float]) -> float:
    """Of two vectors."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / (math.hypot(*one) * math.hypot(*other))


def better_of(first: dict, second: dict) -> dict:
    """The machine as measured before and after the rows, with the higher of its ceilings: load can only hide them."""
    if "ceilings" not in first or "ceilings" not in second:
        return first if "ceilings" in first else second

    def higher(one: object, other: object) -> object:
        return {name: higher(one[name], other[name]) for name in one} if isinstance(one, dict) else max(one, other)

    return first | {"ceilings": higher(first["ceilings"], second["ceilings"])}


def measure(arguments: argparse.Namespace, console: Console) -> tuple[dict, bool]:
    """The whole report, and whether every task ended well."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        console=console,
    )  # fmt: skip
    good = True
    with tempfile.TemporaryDirectory() as folder, bar:
        total = bar.add_task("encoding the video", total=None)
        video, description = prepare_video(arguments, Path(folder))
        rows = row_specs(arguments, video)
        bar.update(total, total=2 + len(rows))

        def run(task: dict, name: str) -> dict:
            nonlocal good
            done = bar.tasks[0].completed

            def show(phase: str, fraction: float) -> None:
                bar.update(total, description=f"{name}: {phase}", completed=done + fraction)

            show("starting", 0.0)
            record, ended_well = run_task(task, arguments.threads, show)
            good = good and ended_well
            bar.update(total, completed=done + 1)
            return record

        settings = {
            "device": arguments.device,
            "dtype": DTYPES[arguments.dtype],
            "threads": arguments.threads,
            "quick": arguments.quick,
        }
        machine = run({"machine": settings}, "machine")
        records = []
        for spec in rows:
            record = run({"row": spec}, f"{spec['decoder']}, {'reference' if spec['impl'] else 'ours'}")
            records.append({"method": spec["method"], "decoder": spec["decoder"], "spec": spec} | record)
            # After each row, so that the end of a long run is not the end of what it found.
            so_far = [{key: value for key, value in each.items() if key != "features"} for each in records]
            save(assembled(arguments, settings, description, machine, so_far), arguments.out)
        compare_towers(records)
        good = good and not any(record["status"] == "failed" for record in records)
        machine = better_of(machine, run({"machine": settings}, "machine, once more"))
    return assembled(arguments, settings, description, machine, records), good


def assembled(
    arguments: argparse.Namespace, settings: dict, description: str, machine: dict, records: list[dict]
) -> dict:
    """The report, floors included."""
    report = {
        "kind": "evc_fast efficiency",
        "random_weights": True,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "arguments": settings | {"batch": arguments.batch, "decoders": arguments.decoders},
        "video": {"description": description},
        "machine": machine,
        "published": {"gpu": GPU, "rows": [row._asdict() for row in TABLE_6]},
        "rows": records,
    }
    add_floors(report)
    return report


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    # Asked to end, it ends as after Ctrl-C: no row's process stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # into a file or a pipe: no line is folded
    console.print("FACE-net's efficiency, measured here. Weights are random: times and memory are real, words are not.")
    report, good = measure(arguments, console)
    print_report(report, console)
    figure = arguments.out / FIGURE_NAME
    figure.unlink(missing_ok=True)  # that of an earlier run is not of these figures
    drawn = importlib.util.find_spec("matplotlib") is not None
    paths = save(report, arguments.out, figure=drawn)
    console.print()
    if drawn:
        paths.append(draw(report, figure))
    else:
        console.print("No figure: needs matplotlib")
    console.print(f"Saved {', '.join(str(path) for path in paths)}", markup=False, highlight=False, soft_wrap=True)
    for record in report["rows"]:
        if record["status"] == "failed":
            console.print(f"Failed: {record['method']}, {record['decoder']}: {record['reason']}", markup=False)
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        from _row import main as work

        raise SystemExit(work(*sys.argv[2:4]))
    raise SystemExit(main())
