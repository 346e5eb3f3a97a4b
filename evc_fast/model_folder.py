"""A captioner's folder: everything that turns a video into a caption, in files that cannot execute anything.

captioner.json   format, version, which CLIP belongs to it and its fingerprint, notes
model/           encoder and decoder (`FaceNet.save_pretrained`)
repository/      captions to retrieve from (`CaptionRepository.save`); absent without retrieval
emotions/        the emotion dictionary, one text file a category
MODEL_CARD.md
clip/            the CLIP towers, where they are kept with the model
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evc_fast.data.files import write_atomically, write_json

if TYPE_CHECKING:
    from evc_fast.data.emotions import EmotionDictionary
    from evc_fast.data.repository import CaptionRepository
    from evc_fast.model.captioner import FaceNet

__all__ = [
    "CARD",
    "CLIP",
    "EMOTIONS",
    "MANIFEST",
    "MODEL",
    "REPOSITORY",
    "ModelFolder",
    "ModelFolderError",
    "find_model_folder",
    "words_digest",
    "write_model_folder",
]

MANIFEST, CARD = "captioner.json", "MODEL_CARD.md"
MODEL, REPOSITORY, EMOTIONS, CLIP = "model", "repository", "emotions", "clip"
_FORMAT, _VERSION = "evc_fast captioner", 1


class ModelFolderError(ValueError):
    """A model folder that lacks a part, is damaged, of another version, or whose parts do not belong together."""


@dataclass(frozen=True)
class ModelFolder:
    """What captioner.json says."""

    path: Path
    clip: str | None
    """Name on the hub, or the path of a folder; None: whoever loads the model must name it."""
    clip_fingerprint: str
    """Of the towers whose features the model was trained on."""
    words_sha256: str
    """`words_digest` of the dictionary that it was trained with."""
    retrieval: bool
    temporal_kernel: int = 1
    notes: tuple[str, ...] = ()
    """What everybody who reads a caption of this model must know."""

    @classmethod
    def read(cls, path: Path) -> ModelFolder:
        """Reads captioner.json and looks for the parts. Raises ModelFolderError, which names what is wrong or lacks."""
        content = _read_manifest(path)
        folder = cls(
            path=path,
            clip=content["clip"],
            clip_fingerprint=content["clip_fingerprint"],
            words_sha256=content["words_sha256"],
            retrieval=content["retrieval"],
            temporal_kernel=content["temporal_kernel"],
            notes=tuple(content["notes"]),
        )
        wanted = [MODEL, EMOTIONS, *([REPOSITORY] if folder.retrieval else [])]
        missing = [f"{name}/" for name in wanted if not (path / name).is_dir()]
        if missing:
            raise ModelFolderError(f"the model folder {path} is not whole: {', '.join(missing)} missing")
        return folder

    @property
    def clip_path(self) -> Path | None:
        """The CLIP's folder; None where it has a name on the hub, or none. "./clip" counts from the model's folder."""
        if self.clip is None or not (self.clip.startswith(".") or os.path.isabs(self.clip)):
            return None
        return (self.path / self.clip).resolve()


def write_model_folder(
    folder: str | os.PathLike[str],
    *,
    model: FaceNet,
    repository: CaptionRepository | None,
    dictionary: EmotionDictionary,
    clip: str | None,
    clip_fingerprint: str,
    card: str,
    temporal_kernel: int = 1,
    notes: Sequence[str] = (),
) -> None:
    """Write all parts into an empty folder, captioner.json last. Its CLIP, where it keeps one, is the caller's to copy.

    Args:
        folder: made if absent.
        repository: None without retrieval.
        clip: name on the hub; or a folder, absolute, or from ``folder`` on if it begins with "."; None: not known.
        clip_fingerprint: of the towers.
        card: Markdown, see :mod:`evc_fast.model_card`.

    Raises:
        ModelFolderError: ``folder`` is not empty, or a repository is missing or superfluous.
        ValueError: the decoder's LoRA adapter is merged already.
    """
    folder = Path(folder)
    if (repository is not None) != model.encoder.config.retrieval:
        raise ModelFolderError(f"repository must be given exactly with retrieval={model.encoder.config.retrieval}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ModelFolderError(f"{folder} must be empty to save a model into")
    model.save_pretrained(folder / MODEL)
    if repository is not None:
        repository.save(folder / REPOSITORY)
    dictionary.save(folder / EMOTIONS)
    write_atomically(folder / CARD, card.encode())
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "clip": clip,
        "clip_fingerprint": clip_fingerprint,
        "words_sha256": words_digest(dictionary),
        "retrieval": repository is not None,
        "temporal_kernel": temporal_kernel,
        "notes": list(notes),
    }
    write_json(folder / MANIFEST, content)


def find_model_folder(name: str | os.PathLike[str]) -> Path:
    """The folder with captioner.json that `name` means: itself, a run's ``best/``, or a hub's cache of one model.

    Local paths only. Raises FileNotFoundError where there is no such folder, ModelFolderError where it holds no model.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no model folder {folder}: models are read from local folders, none is fetched"
        )
    if (folder / MANIFEST).is_file():
        return folder
    if (folder / "best" / MANIFEST).is_file():  # of a training run
        return folder / "best"
    reference = folder / "refs" / "main"
    if reference.is_file():  # models--OWNER--NAME of the hub's cache
        snapshot = folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
        if (snapshot / MANIFEST).is_file():
            return snapshot
    raise ModelFolderError(f"{folder} is no model folder: it has no {MANIFEST}, which Captioner.save_pretrained writes")


def words_digest(dictionary: EmotionDictionary) -> str:
    """SHA-256 of the dictionary's words in the order of E_0's rows."""
    return hashlib.sha256("\n".join(dictionary.words).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFolderError(f"{folder} is no model folder: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ModelFolderError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ModelFolderError(f"{path} does not describe a captioner")
    version = content.get("version")
    if version != _VERSION:
        raise ModelFolderError(f"{path} is of version {version!r}, this evc_fast reads version {_VERSION}")
    texts = content.get("notes")
    kernel = content.get("temporal_kernel")
    right = {
        "clip": "clip" in content and (content["clip"] is None or isinstance(content["clip"], str)),
        "clip_fingerprint": isinstance(content.get("clip_fingerprint"), str),
        "words_sha256": isinstance(content.get("words_sha256"), str),
        "retrieval": isinstance(content.get("retrieval"), bool),
        "temporal_kernel": type(kernel) is int and kernel >= 1,
        "notes": isinstance(texts, list) and all(isinstance(text, str) for text in texts),
    }
    wrong = [key for key, fits in right.items() if not fits]
    if wrong:
        raise ModelFolderError(f"{path} has no {wrong[0]} that can be used")
    return content
