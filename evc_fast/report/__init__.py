"""Captions and all that explains them as one HTML page, which needs nothing but itself: no network, no script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from evc_fast.data.files import write_atomically
from evc_fast.report.page import report_page
from evc_fast.results import CaptionResult

__all__ = ["report_page", "write_report"]


def write_report(
    results: Sequence[CaptionResult],
    path: str | os.PathLike[str],
    *,
    title: str = "Emotional video captions",
    failed: Mapping[str, str] | None = None,
) -> None:
    """Write the page of some captions, whole or not at all, in place of one that is there.

    Args:
        results: one section each, in order; several have a table above. Made with ``pictures=True`` they show frames,
            with ``explain=True`` weights, gates and curves; what a result lacks is left out.
        path: of the page; folders that lack are made.
        title: of the page.
        failed: videos that have no caption, and why; the page lists them.

    Raises:
        ValueError: there are no results.
        TypeError: ``results`` is one result, or holds something else.
        IsADirectoryError: ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file to write the report into, {path} is a folder")
    page = report_page(results, title=title, failed=failed or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8"))
