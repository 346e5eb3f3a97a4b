"""What benchmarks/gpu.sh leaves behind: its parts, targets and figures on one page, all tables, all results.

    python _gpu_summary.py WORK OUTDIR [--rehearsal]

WORK holds parts/ (one line each: name, status, seconds, note, separated by tabs) and results/ (the benchmarks' own
pages and JSON). Needs Python's own library alone; what a part did not leave is left out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ORDER = (
    "ceilings",
    "build",
    "tests",
    "memcheck",
    "racecheck",
    "encoder",
    "training",
    "efficiency",
    "ops",
    "compiled",
    "lora",
    "suite",
)
REHEARSAL = "A rehearsal on a CPU, in small sizes: no figure means anything."


def parts(work: Path) -> list[list[str]]:
    """Name, status, seconds and note of every part so far, in the order of the script."""
    found = [path.read_text(encoding="utf-8", errors="replace").rstrip("\n") for path in (work / "parts").iterdir()]
    return sorted((line.split("\t") for line in found), key=lambda line: ORDER.index(line[0]))


def results(work: Path) -> dict[str, dict]:
    """The JSON of every benchmark that wrote one, by its name."""
    paths = ((name, work / "results" / f"{name}.json") for name in ORDER)
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths if path.exists()}


def revision() -> str:
    """Of the checkout, "+" where it has changed since; "unknown" where there is no repository."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode == 1
    except OSError:
        return "unknown"
    return head.stdout.strip() + "+" * changed if head.returncode == 0 else "unknown"


def machine_lines(found: dict[str, dict]) -> list[str]:
    machine = next((each["machine"] for each in found.values() if "date" in (each.get("machine") or {})), None)
    if machine is None:
        return ["Machine: nothing has been measured"]
    device = f"Device: {machine['device_name']}"
    if "gpu" in machine:
        gpu = machine["gpu"]
        device += f", compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors"
        device += f", {gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [device, f"Host: {machine['processor']}, {machine['cores']} cores", f"Versions: {versions}"]


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.3g} ms"


def figures(found: dict[str, dict]) -> list[str]:
    """The few figures that a reader looks for first."""
    lines = []
    if "ceilings" in found:
        measured = found["ceilings"]["machine"]["ceilings"]
        rates = measured["matrix_flops_per_s_library"].items()
        lines.append(
            f"copy {measured['copy_bytes_per_s'] / 1e9:,.0f} GB/s; products in TFLOP/s: "
            + ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in rates)
            + "; an empty kernel "
            + ", ".join(f"{micro(seconds)} {how}" for how, seconds in measured["launch_s"].items())
        )
    for record in found.get("encoder", {}).get("records", []):
        rows = record["rows"].items()
        lines.append(f"encoder, B = {record['batch']}: " + ", ".join(f"{n} {micro(r['median_s'])}" for n, r in rows))
    for record in found.get("training", {}).get("records", []):
        steps = ", ".join(f"{name} {micro(phases['step'])}" for name, phases in record["median_s"].items())
        lines.append(f"training step, B = {record['batch']}, dropout {record['dropout']:g}: {steps}")
    for row in found.get("efficiency", {}).get("rows", []):
        line = f"caption, {row['decoder']}, {'reference' if row['spec']['impl'] else 'ours'}: "
        if row["status"] == "measured":
            memory = row["memory"].get("gpu_bytes", row["memory"]["resident_bytes"])
            line += f"{micro(row['time']['median_s'])}, {memory / 1e9:.2f} GB"
        else:
            line += f"not measured: {row['reason']}"
        lines.append(line)
        lines += [f"  {stage}: not measured: {needs}" for stage, needs in row.get("stand_ins", {}).items()]
    for record in found.get("lora", {}).get("records", []):
        if "seconds" in record:
            memory = "" if record["gpu_bytes"] is None else f", {record['gpu_bytes'] / 1e9:.1f} GB"
            how = "on" if record["checkpointing"] else "off"
            lines.append(f"LoRA step, {record['row']}, checkpointing {how}: {micro(record['seconds']['step'])}{memory}")
    return lines


def summary(work: Path, found: dict[str, dict], *, rehearsed: bool) -> str:
    targets = [line for name in ("encoder", "training") for line in found.get(name, {}).get("targets", [])]
    page = ["# evc_fast on a GPU, measured", ""]
    page += [f"**{REHEARSAL}**", ""] if rehearsed else []
    page += [f"- {line}" for line in (f"Revision: {revision()}", *machine_lines(found))]
    page += ["", "| part | ended | seconds | |", "|---|---|---:|---|"]
    page += [
        f"| {name} | {status} | {seconds} | {note.replace('|', '/')} |" for name, status, seconds, note in parts(work)
    ]
    for title, lines in (("Targets", targets), ("Figures, medians", figures(found))):
        if lines:
            page += ["", f"## {title}", "", *(f"- {line}" for line in lines)]
    return "\n".join([*page, ""])


def main(work: Path, out: Path, *flags: str) -> None:
    found = results(work)
    page = summary(work, found, rehearsed="--rehearsal" in flags)
    (out / "summary.md").write_text(page, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pages = [work / "results" / f"{name}.md" for name in ORDER]
    tables = [path.read_text(encoding="utf-8") for path in pages if path.exists()]
    (out / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    figure = work / "results" / "efficiency.png"
    if figure.exists():
        shutil.copy(figure, out / figure.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
