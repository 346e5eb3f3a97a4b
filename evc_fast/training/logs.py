"""What a run writes down while it goes: log.jsonl, TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evc_fast.data.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["LOG_NAME", "RunLog", "read_log"]

LOG_NAME = "log.jsonl"


class RunLog:
    """Records of one run, one JSON object a line; what follows the step that a run resumes from is forgotten.

    Args:
        folder: of the run.
        step: records of later steps are removed; 0 begins anew.
        tensorboard: also write numbers for TensorBoard, into ``folder/tensorboard``.

    Raises ModuleNotFoundError where TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool) -> None:
        self._writer: SummaryWriter | None = None
        if tensorboard:
            self._writer = _summary_writer(folder / "tensorboard", step)
        path = folder / LOG_NAME
        kept = [record for record in read_log(path) if record["step"] <= step] if step and path.is_file() else []
        write_atomically(path, "".join(_line(record) for record in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it has "kind" and "step"."""
        self._file.write(_line(record))
        self._file.flush()

    def show(self, group: str, numbers: dict[str, float | None], step: int) -> None:
        """Numbers for TensorBoard."""
        if self._writer is not None:
            for name, value in numbers.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log. A last line that was cut short by a kill is left out; ValueError on any other."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorBoard's logs need tensorboard: pip install 'evc-fast[train]', or set trainer.tensorboard=false",
            name=error.name,
        ) from error
    return SummaryWriter(folder, purge_step=step + 1 if step else None)
