"""`python -m evc_fast`: versions, devices, instruction sets, and which implementation serves each op, and why.

`--json` prints the same as one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

import evc_fast
from evc_fast.data.image_tower import choose_product, fastest_dtype
from evc_fast.ops import dispatch

CORE = ("numpy", "safetensors", "transformers", "peft", "av", "matplotlib", "rich")
OPTIONAL = (
    *("typer", "PyYAML", "pydantic", "accelerate", "tensorboard", "h5py", "pycocoevalcap", "spacy"),
    *("open_clip_torch", "torchvision", "triton", "onnxruntime"),
)
FAISS = ("faiss-cpu", "faiss-gpu-cu12")  # either provides `import faiss`


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not installed. Imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "evc_fast": evc_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed_version(name) for name in CORE},
    }
    found["faiss"] = next((version for name in FAISS if (version := installed_version(name))), None)
    found.update({name: version for name in OPTIONAL if (version := installed_version(name))})
    return found


def extras() -> dict[str, list[str]]:
    """Each extra of the installed package to the distributions that it would bring and that are not here."""
    try:
        about = metadata.metadata("evc-fast")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return {}
    return {extra: sorted(missing_of(extra)) for extra in about.get_all("Provides-Extra") or []}


def missing_of(extra: str) -> set[str]:
    """Distributions that are not installed of those that an extra names, extras that it includes with them."""
    missing: set[str] = set()
    for requirement in map(Requirement, metadata.requires("evc-fast") or []):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "evc-fast":
            missing = missing.union(*map(missing_of, requirement.extras))
        elif installed_version(requirement.name) is None:
            missing.add(requirement.name)
    return missing


def devices() -> dict[str, str]:
    """Device type, with its index beyond the CPU, to a description."""
    found = {"cpu": f"{cpu_model()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            memory = card.total_memory / 2**30
            found[f"cuda:{index}"] = f"{card.name}, sm_{card.major}{card.minor}, {memory:.0f} GiB"
    return found


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()


def isa() -> dict[str, object]:
    """Instruction sets: `usable` are built into the library and run here, `used` is the one of the kernels."""
    return {
        "used": dispatch.cpu_isa(),
        "usable": dispatch.cpu_isas_supported(),
        "forced": os.environ.get("EVC_FAST_ISA"),
        "torch": torch.backends.cpu.get_cpu_capability(),
    }


def served(op: str, device_types: list[str]) -> list[dict[str, object]]:
    """Each implementation of `op`, fastest first: what it serves on this machine, and why not the rest."""
    found = dispatch.implementations(op)
    winners = {
        (device, dtype): next(x.name for x in found if x.available and takes(x, device, dtype))
        for device in device_types
        for dtype in dispatch.FLOATING_DTYPES
    }
    rows = []
    for each in found:
        serves = {
            device: [short(dtype) for dtype in dispatch.FLOATING_DTYPES if winners[device, dtype] == each.name]
            for device in device_types
        }
        why = [each.reason] if not each.available else []
        if each.available:
            before = sorted({name for key, name in winners.items() if name != each.name and takes(each, *key)})
            why += [f"{name} is faster and serves the rest" for name in before]
            if not all(takes(each, *key) for key in winners):
                places = "any device" if "any" in each.devices else " and ".join(each.devices)
                why.append(f"it takes {', '.join(map(short, each.dtypes))} tensors on {places}")
        rows.append(
            {
                "implementation": each.name,
                "available": each.available,
                "serves": {device: dtypes for device, dtypes in serves.items() if dtypes},
                "why_not_the_rest": "; ".join(why),
            }
        )
    return rows


def takes(each: dispatch.Implementation, device: str, dtype: torch.dtype) -> bool:
    return (device in each.devices or "any" in each.devices) and dtype in each.dtypes


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def report() -> dict[str, object]:
    """Everything that is printed, as JSON types."""
    found = devices()
    types = list(dict.fromkeys(name.partition(":")[0] for name in found))
    return {
        "location": str(Path(evc_fast.__file__).parent),
        "platform": platform.platform(),
        "versions": versions(),
        "extras": extras(),
        "devices": found,
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "image_tower": {"dtype": short(fastest_dtype()), "product": choose_product(None, fastest_dtype())},
        "ops": {op: served(op, types) for op in dispatch.SERVED},
    }


def tables(found: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """`report()` as (title, column heads, rows)."""
    sets = found["isa"]
    usable = ", ".join(sets["usable"]) or "none"
    forced = f" (EVC_FAST_ISA={sets['forced']})" if sets["forced"] else ""
    machine = [
        ["evc_fast from", found["location"]],
        ["platform", found["platform"]],
        *([name, text] for name, text in found["devices"].items()),
        ["instruction sets usable", f"{usable}; torch itself detects {sets['torch']}"],
        ["instruction set in use", f"{sets['used']}{forced}"],
        ["image tower on the CPU", "{dtype}, products by {product}".format(**found["image_tower"])],
    ]
    ops = []
    for op, rows in found["ops"].items():
        for row in rows:
            serves = "; ".join(f"{device}: {', '.join(dtypes)}" for device, dtypes in row["serves"].items())
            ops.append([op, row["implementation"], serves or "nothing", row["why_not_the_rest"]])
    lacking = [[extra, ", ".join(missing) or "nothing"] for extra, missing in found["extras"].items()]
    return [
        ("Versions", ["package", "version"], [[k, v or "not installed"] for k, v in found["versions"].items()]),
        *([("Extras", ["pip install 'evc-fast[...]'", "lacks"], lacking)] if lacking else []),
        ("Machine", ["what", "found"], machine),
        ("Ops", ["op", "implementation", "serves", "why not the rest"], ops),
    ]


def print_plain(title: str, heads: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    print(f"\n{title}")
    for row in [heads, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_rich(title: str, heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for column, head in enumerate(heads):
        # Names stay whole on a narrow terminal; sentences wrap.
        width = max(len(row[column]) for row in rows) if column == 0 else None
        table.add_column(head, min_width=width, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def run_installed_instead() -> None:
    """`-m` in an unbuilt checkout finds the checkout first, but the question is about the installed evc_fast."""
    hidden = importlib.machinery.PathFinder.find_spec("evc_fast", sys.path[1:])  # sys.path[0] is the current folder
    if evc_fast._in_unbuilt_checkout() and hidden and not sys.flags.safe_path:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "evc_fast", *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evc_fast", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = report()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    show(found, rich=sys.stdout.isatty() and installed_version("rich") is not None)


def show(found: dict, *, rich: bool) -> None:
    """Print `report()` as tables: drawn by rich, or plain lines."""
    for table in tables(found):
        (print_rich if rich else print_plain)(*table)


if __name__ == "__main__":
    run_installed_instead()
    main()
