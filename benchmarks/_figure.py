"""The figure of the efficiency benchmark: latency and memory, ours beside the paper's."""

from __future__ import annotations

from pathlib import Path

from _published import GPU, TABLE_6
from _report import decoder_name

PUBLISHED_COLOUR, REFERENCE_COLOUR, OURS_COLOUR = "#a7a9ac", "#e3a857", "#2f6db5"


def draw(report: dict, path: Path) -> Path:
    """Two panels of bars, milliseconds a caption (logarithmic) and peak memory; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    bars = [(row.method, row.milliseconds, row.megabytes, PUBLISHED_COLOUR) for row in TABLE_6]
    on_gpu = report["arguments"]["device"].startswith("cuda")
    for row in report["rows"]:
        if row["status"] == "measured":
            reference = row["spec"]["impl"] == "reference"
            label = f"FACE-net {'reference' if reference else 'ours'}, {decoder_name(row)}"
            peak = row["memory"]["gpu_bytes" if on_gpu else "resident_bytes"] / 1e6
            colour = REFERENCE_COLOUR if reference else OURS_COLOUR
            bars.append((label, row["time"]["median_s"] * 1e3, peak, colour))
    bars.reverse()  # the first at the top

    names = [bar[0] for bar in bars]
    positions = range(len(bars))
    colours = [bar[3] for bar in bars]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.9 + 0.42 * len(bars)), sharey=True)
    panels = (
        (axes[0], [bar[1] for bar in bars], "milliseconds a caption (log scale)"),
        (axes[1], [bar[2] for bar in bars], f"peak memory, MB ({'GPU' if on_gpu else 'resident, load included'})"),
    )
    for axis, values, label in panels:
        axis.barh(positions, values, color=colours, height=0.7)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        for position, value in zip(positions, values, strict=True):
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
            axis.annotate(f"{value:,.0f}", (value, position), **place)
    axes[0].set_xscale("log")
    axes[0].set_xlim(left=min(bar[1] for bar in bars) / 2, right=max(bar[1] for bar in bars) * 3)
    axes[1].set_xlim(right=max(bar[2] for bar in bars) * 1.15)
    axes[0].set_yticks(positions, names)

    machine = report["machine"] or {}
    here = f"{machine.get('device_name', 'this machine')}, {machine.get('threads', '?')} threads"
    legend = [
        Patch(color=PUBLISHED_COLOUR, label=f"published, {GPU}"),
        Patch(color=REFERENCE_COLOUR, label=f"plain PyTorch and transformers, {here}"),
        Patch(color=OURS_COLOUR, label=f"evc_fast, {here}"),
    ]
    title = "Table 6: a caption's time and memory"
    if report["quick"]:
        title += " (quick run: tiny shapes)"
    title += f"\nmeasured rows: random weights, exactly 15 tokens, 5 beams; {report['date'][:10]}"
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=legend, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
