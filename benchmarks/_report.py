"""What the efficiency benchmark prints and saves: tables for the terminal and as Markdown, and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from _published import GPU, TABLE_6

MISSING = "-"
FIGURE_NAME = "efficiency.png"
RANDOM_WEIGHTS = (
    "All measured rows have random weights in the true shape: time and memory do not depend on them, the words do, so "
    "they have no CFS."
)


@dataclass
class Table:
    """Plain cells, first column left, the others right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        lines.append(f"| {' | '.join(self.columns)} |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def rich(self):
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left")
        for position, column in enumerate(self.columns):
            table.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table


STATUS_WORDS = {"skipped": "not measured", "failed": "failed"}
BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count(value: float | None) -> str:
    """13590000 -> "13.6 M"."""
    return scaled(value, ((1e9, "G"), (1e6, "M"), (1e3, "k")))


def scaled(value: float | None, units: tuple[tuple[float, str], ...]) -> str:
    if value is None:
        return MISSING
    for unit, name in units:
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value / unit < 1000 else f"{value / unit:,.0f} {name}"
    return f"{value:.3g}"


def operations(counts: dict | None) -> str:
    """Multiply-adds / FLOPs."""
    if counts is None:
        return MISSING
    return f"{count(counts['multiply_adds'])} / {count(counts['flops'])}"


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    value = seconds * 1e3
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def megabytes(value: float | None) -> str:
    return MISSING if value is None else f"{value / 1e6:,.0f}"


def floor_seconds(stage: dict, ceilings: dict) -> tuple[float | None, str]:
    """Least seconds for a stage's work on this machine, and which ceiling sets them: "bytes" or "FLOPs".

    max(bytes / read bandwidth, FLOPs / matrix peak of the stage's dtype); None where the stage's bytes are not known.
    """
    if stage.get("bytes") is None:
        return None, ""
    by_bytes = stage["bytes"] / ceilings["read_bytes_per_s"]
    by_flops = stage["flops"] / ceilings["matrix_flops_per_s"][stage["dtype"]] if stage["flops"] else 0.0
    return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "FLOPs")


def add_floors(report: dict) -> None:
    """Write each measured stage's floor beside its time."""
    ceilings = (report["machine"] or {}).get("ceilings")
    if ceilings is None:
        return
    for row in report["rows"]:
        for stage in row.get("stages", ()):
            if "not_measured" not in stage:
                stage["floor_seconds"], stage["floor_from"] = floor_seconds(stage, ceilings)


def efficiency_table(report: dict) -> Table:
    """Table 6 of the paper, its five rows and ours."""
    here = (report["machine"] or {}).get("device_name", "this machine")
    rows = [
        [
            f"{row.method} (published, {GPU})",
            "FLAN-T5-XL" if row.method == "FACE-net" else MISSING,
            f"{row.cfs}",
            count(row.trainable_parameters),
            MISSING,
            f"{count(row.multiply_adds)} / {MISSING}",
            MISSING,
            f"{row.milliseconds:,.1f}",
            f"{row.megabytes:,.0f}",
            MISSING,
        ]
        for row in TABLE_6
    ]
    rows += [_measured_cells(row) for row in report["rows"]]
    columns = [
        "Method",
        "Decoder",
        "CFS",
        "Trainable parameters",
        "All parameters",
        "FLOPs, trained modules: multiply-adds / FLOPs",
        "FLOPs, whole caption: multiply-adds / FLOPs",
        "Time a caption, ms: median (p95)",
        "Peak memory, MB",
        "Captions/s at batch",
    ]
    title = "Table 6, efficiency of emotional video captioning"
    if report["quick"]:
        title += " (quick run: tiny shapes, no figure of it is Table 6)"
    return Table(title, columns, rows, _efficiency_notes(report, here))


def decoder_name(row: dict) -> str:
    """The decoder of a measured row; a quick run has its make in a tiny shape."""
    return row["decoder"] + (", tiny" if row["spec"]["quick"] else "")


def _measured_cells(row: dict) -> list[str]:
    name, decoder = row["method"], decoder_name(row)
    if row["status"] != "measured":
        return [name, decoder, *[MISSING] * 5, STATUS_WORDS[row["status"]], *[MISSING] * 2]
    throughput, memory, time = row["throughput"], row["memory"], row["time"]
    peak = megabytes(memory["resident_bytes"])
    if "gpu_bytes" in memory:
        peak = f"{megabytes(memory['gpu_bytes'])} GPU, {peak} host"
    return [
        name,
        decoder,
        MISSING,
        count(row["parameters"]["trainable"]),
        count(row["parameters"]["all"]),
        operations(row["flops"]["trained_modules"]),
        operations(row["flops"]["whole_caption"]),
        f"{milliseconds(time['median_s'])} ({milliseconds(time['p95_s'])})",
        peak,
        f"{throughput['captions_per_s']:.3g} at {throughput['batch']}",
    ]


def _efficiency_notes(report: dict, here: str) -> list[str]:
    measured = [row for row in report["rows"] if row["status"] == "measured"]
    on_gpu = report["arguments"]["device"].startswith("cuda")
    notes = [
        RANDOM_WEIGHTS,
        f"Published rows: the paper's Table 6, measured by its authors on one {GPU} with trained weights. They are not "
        f"comparable with a time on {here}.",
        "Trained modules: the paper's accounting, without CLIP and LLM (a merged LoRA adapter costs nothing). Its own "
        "unit is not stated; EPAN's and DCGN's figures follow from their code with a multiply-add counted once. The "
        "reference rows have them as the paper prints them; ours as they run, which on a CPU is folded.",
        "Whole caption: image tower, encoder, Q-former, decoder with all beams and steps, by PyTorch's FlopCounterMode "
        "(matrix products as they are executed, 2 FLOPs a multiply-add).",
        "Time: video file in, text out, 5 beams, exactly 15 new tokens. All parameters: CLIP (both towers), encoder, "
        "decoder. Trainable: the encoder, and the small decoder or the LLM's LoRA adapter, before it is merged.",
        "Memory: largest resident set of the row's own process up to the last of the single captions, loading included"
        + (", and the largest reservation on the GPU." if on_gpu else "."),
        "The two rows of a decoder differ in the image tower and in the encoder with its Q-former. An LLM's search is "
        "the generate of transformers in both.",
        "Rows run one after another in processes of their own with the same threads, so a change of the machine's load "
        "between them falls on one alone.",
    ]
    for row in report["rows"]:
        if row["status"] != "measured":
            notes.append(f"{row['method']}, {row['decoder']}: {STATUS_WORDS[row['status']]}: {row['reason']}")
    for row in measured:
        served = ", ".join(f"{op} by {name}" for op, name in row["served_by"].items())
        cosine = row["check"].get("features_cosine")
        tower = "" if cosine is None else f"; image features with cosine 1 - {max(1 - cosine, 0):.0e} to transformers'"
        notes.append(
            f"{row['method']}, {row['decoder']}: {row['time']['captions']} captions timed, the fastest in "
            f"{milliseconds(row['time']['min_s'])} ms; {served}; our encoder against the straight one with reference "
            f"ops {row['check']['encoder_error']:.1e} relative before timing{tower}."
        )
        if row["time"]["p95_s"] > 1.5 * row["time"]["min_s"]:
            notes.append(
                f"{row['method']}, {row['decoder']}: the times scatter, so something else was running here too."
            )
        notes.extend(
            f"{row['method']}, {row['decoder']}: {stage} not measured, {reason}; random data stands in."
            for stage, reason in row["stand_ins"].items()
        )
    notes.extend(_same_ids(measured))
    return notes


def _same_ids(measured: list[dict]) -> list[str]:
    by_decoder: dict[str, list[dict]] = {}
    for row in measured:
        by_decoder.setdefault(row["decoder"], []).append(row)
    notes = []
    for decoder, rows in by_decoder.items():
        if len(rows) > 1 and len({tuple(row["ids"]) for row in rows}) == 1:
            notes.append(f"{decoder}: both rows wrote the same 15 tokens.")
        elif len(rows) > 1:
            check = rows[0]["check"]
            notes.append(
                f"{decoder}: the rows wrote different tokens. In the decoder's dtype {check['rounded_differently']:,} "
                f"of {check['elements']:,} elements of the encoder's tokens differ between the encoders on the same "
                "features, more with those of two image towers, and random weights leave near-ties between beams that "
                "so little decides."
            )
    return notes


def stage_table(row: dict) -> Table:
    """The stages of one measured row, held against the machine's floor."""
    rows = []
    for stage in row["stages"]:
        if "not_measured" in stage:
            rows.append([stage["stage"], f"not measured: {stage['not_measured']}", *[MISSING] * 6])
            continue
        runs, floor = stage["runs"], stage.get("floor_seconds")
        rows.append(
            [
                stage["stage"] if runs == 1 else f"{stage['stage']} (one of {runs})",
                milliseconds(stage["seconds"] / runs),
                f"{stage['share']:.1%}",
                count(stage["flops"] / runs) if stage["flops"] else MISSING,
                MISSING if stage["bytes"] is None else scaled(stage["bytes"] / runs, BYTE_UNITS),
                milliseconds(None if floor is None else floor / runs),
                f"{stage['seconds'] / floor:.1f}x" if floor else MISSING,
                f"{stage['floor_from']}, {stage['dtype']}" if floor else MISSING,
            ]
        )
    columns = ["Stage", "Time, ms", "Share", "FLOPs", "Bytes", "Floor, ms", "Time / floor", "Floor set by"]
    total = sum(stage["seconds"] for stage in row["stages"] if "seconds" in stage)
    steps = [sorted(times) for times in zip(*row["step_seconds"], strict=True)]
    notes = [
        f"Medians over {row['time']['captions']} captions; stages add up to {milliseconds(total)} ms of "
        f"{milliseconds(row['time']['median_s'])} ms a caption. Share: all runs of the stage together.",
        "Decode steps, ms, median of each: " + ", ".join(milliseconds(times[len(times) // 2]) for times in steps) + ".",
    ]
    if row["decoder"] == "flan-t5-xl":
        notes.append("The first decode step also makes cross-attention's keys and values of the prefix, once a beam.")
    if row["decoder"] == "opt-2.7b":
        notes.append("OPT has no encoder: its first pass, over [tokens ; prompt], stands there; it gives one token.")
    return Table(f"Stages: {row['method']}, {row['decoder']}", columns, rows, notes)


def floor_notes(machine: dict) -> list[str]:
    """What the floors are made of."""
    ceilings = machine["ceilings"]
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in ceilings["matrix_flops_per_s"].items())
    library = ceilings["matrix_flops_per_s_library"]
    notes = [
        "Floor: max(bytes / read bandwidth, FLOPs / matrix peak of the stage's dtype). Measured before and after the "
        f"rows, the better counts: read {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s, copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written), matrix peak in GFLOP/s: {peaks}.",
        "Bytes: a lower bound. Weights, inputs, outputs and cached keys and values once each; nothing that a stage "
        "writes and reads again inside itself. Weights that stay in the caches between two captions can beat it.",
        "FLOPs: as executed.",
    ]
    slow = [name for name, rate in library.items() if rate < ceilings["matrix_flops_per_s"][name]]
    notes.extend(
        f"PyTorch's own {name} products reach {library[name] / 1e9:,.1f} GFLOP/s here; the peak is float32's, since "
        f"{name} data can be widened in registers."
        for name in slow
    )
    return notes


def header(report: dict) -> list[str]:
    """Device, versions and date, one line each."""
    machine = report["machine"]
    lines = [f"Date: {report['date']}", f"Video: {report['video']['description']}"]
    if "ceilings" not in (machine or {}):
        return [*lines, f"Machine: not measured: {(machine or {}).get('reason', 'unknown')}"]
    memory = MISSING if machine["memory_bytes"] is None else f"{machine['memory_bytes'] / 1e9:.0f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        *lines,
        f"Device: {machine['device']} ({machine['device_name']}), {machine['cores']} cores, {machine['threads']} "
        f"threads, {memory} memory, {machine['system']}",
        f"Instruction set: {machine['isa']} (PyTorch), {machine['kernels_isa']} (evc_fast)",
        f"LLM dtype: {report['arguments']['dtype']}; encoder and small decoders: float32; image tower: "
        + (", ".join(_tower_dtypes(report)) or MISSING),
        f"Versions: {versions}",
    ]


def _tower_dtypes(report: dict) -> list[str]:
    stages = [stage for row in report["rows"] for stage in row.get("stages", ()) if stage["stage"] == "image tower"]
    return list(dict.fromkeys(stage["dtype"] for stage in stages if "dtype" in stage))


def tables(report: dict) -> list[Table]:
    """All tables of a report, floors included."""
    stages = [stage_table(row) for row in report["rows"] if row["status"] == "measured"]
    if stages and "ceilings" in (report["machine"] or {}):
        stages[-1].notes += floor_notes(report["machine"])
    return [efficiency_table(report), *stages]


def markdown(report: dict, *, figure: bool = False) -> str:
    """The report as a Markdown page, with a link to its figure where one is drawn."""
    lines = ["# Efficiency of FACE-net, measured", "", *(f"- {line}" for line in header(report)), ""]
    lines += ["**Random weights.** " + RANDOM_WEIGHTS, ""]
    if figure:
        lines += [f"![latency and memory]({FIGURE_NAME})", ""]
    return "\n".join([*lines, *(table.markdown() for table in tables(report))])


def print_report(report: dict, console) -> None:
    """The report on a terminal."""
    for line in header(report):
        console.print(line, markup=False, highlight=False)
    for table in tables(report):
        console.print()
        console.print(table.rich())
        for note in table.notes:
            console.print(f"- {note}", markup=False, highlight=False)


def save(report: dict, folder: Path, *, figure: bool = False) -> list[Path]:
    """Write efficiency.json and efficiency.md; the figure is `_figure.draw`'s."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "efficiency.json", folder / "efficiency.md"]
    paths[0].write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(report, figure=figure), encoding="utf-8")
    return paths
