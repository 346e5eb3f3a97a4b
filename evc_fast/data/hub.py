"""Models that were fetched from the Hugging Face hub before, found without reaching for it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cached_folder"]


def cached_folder(name: str) -> Path | None:
    """The folder in which this machine keeps the hub's model `name`, None where it has none. Opens no connection."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
