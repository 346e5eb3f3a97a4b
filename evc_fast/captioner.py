"""Videos to captions by a saved model, in two lines.

captioner = Captioner.from_pretrained("my-model")
print(captioner("clip.mp4"))
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.files import replacing_folder
from evc_fast.model.captioner import FaceNet
from evc_fast.model_card import ModelFacts, model_card, part_facts
from evc_fast.model_folder import (
    CARD,
    CLIP,
    EMOTIONS,
    MANIFEST,
    MODEL,
    REPOSITORY,
    ModelFolder,
    ModelFolderError,
    find_model_folder,
    words_digest,
    write_model_folder,
)
from evc_fast.ops.dispatch import Impl
from evc_fast.pipeline import CaptionPipeline
from evc_fast.results import CaptionResult

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.repository import CaptionRepository
    from evc_fast.data.video_errors import VideoError

__all__ = ["TOY_MODEL", "TOY_NOTE", "Captioner", "ModelFolderError"]

TOY_MODEL = Path(__file__).parent / "data" / "toy" / "assets" / "model"
"""The model that the package ships."""
TOY_NOTE = (
    "this is the model of the toy world: it knows short clips of drawn people and animals and nothing else; name "
    "another by evc-fast caption --model FOLDER or Captioner.from_pretrained(FOLDER)"
)


class Captioner:
    """All that turns a video file into a caption, its explanation, and the dictionary that names the emotions.

    Args:
        towers: frozen CLIP towers.
        repository: captions to retrieve from, built with these towers; None without retrieval.
        model: encoder and decoder.
        dictionary: emotion words, in whose order the model's E_0 is.
        temporal_kernel: t of (1), see :class:`CaptionPipeline`.
        notes: what everybody who reads a caption must know; every result carries them.
        card: the model card; None makes one of what the parts tell.
        impl: which implementation of the fused ops runs; None chooses.

    Attributes:
        pipeline: the :class:`CaptionPipeline` that does the work, stage by stage.

    Raises:
        ValueError, TypeError: parts that do not fit together, as of :class:`CaptionPipeline`.
    """

    def __init__(
        self,
        towers: ClipTowers,
        repository: CaptionRepository | None,
        model: FaceNet,
        dictionary: EmotionDictionary,
        *,
        temporal_kernel: int = 1,
        notes: Sequence[str] = (),
        card: str | None = None,
        impl: Impl | None = None,
    ) -> None:
        augmented = model.encoder.config.emotion_augmentation
        self.pipeline = CaptionPipeline(
            towers,
            repository,
            model,
            emotion_words=dictionary.words if augmented else None,
            impl=impl,
            temporal_kernel=temporal_kernel,
            notes=notes,
        )
        self.dictionary = dictionary
        self.card = card
        self._clip_name = towers.name

    def __call__(self, video: str | os.PathLike[str], *, video_id: str | None = None, **options: Any) -> CaptionResult:
        """Caption one video file; ``options`` as of :meth:`CaptionPipeline.caption_batch`."""
        return self.pipeline(video, video_id=video_id, **options)

    def caption(
        self,
        videos: Sequence[str | os.PathLike[str]],
        *,
        batch_size: int = 8,
        video_ids: Sequence[str | None] | None = None,
        failed: Callable[[str | os.PathLike[str], VideoError], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> list[CaptionResult]:
        """Caption many video files; the captions do not depend on ``batch_size``.

        Args:
            videos: files, one result each, in order.
            batch_size: how many are encoded and decoded at once: memory, and on a GPU speed.
            video_ids: as of :meth:`CaptionPipeline.caption_batch`.
            failed: is given each file that cannot be read, and why, and the file has no result; None raises.
            progress: ``progress(done, total)`` after each batch.
            options: as of :meth:`CaptionPipeline.caption_batch`.

        Raises:
            VideoError: a file cannot be read, and ``failed`` is None.
            ValueError, TypeError: arguments, as of :meth:`CaptionPipeline.caption_batch`.
        """
        if isinstance(videos, (str, os.PathLike)):
            raise TypeError("videos must be a list of video files, got one path: call the captioner itself with it")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if video_ids is not None and not isinstance(video_ids, str) and len(video_ids) != len(videos):
            raise ValueError(f"video_ids must be as many as videos, {len(videos)}, got {len(video_ids)}")
        results: list[CaptionResult] = []
        for start in range(0, len(videos), batch_size):
            end = min(start + batch_size, len(videos))
            ids = (
                video_ids[start:end]
                if isinstance(video_ids, Sequence) and not isinstance(video_ids, str)
                else video_ids
            )
            results += self.pipeline.caption_batch(videos[start:end], video_ids=ids, failed=failed, **options)
            if progress is not None:
                progress(end, len(videos))
        return results

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str] | None = None,
        *,
        clip: str | os.PathLike[str] | ClipTowers | None = None,
        device: torch.device | str = "cpu",
        decoder_dtype: torch.dtype | None = None,
        impl: Impl | None = None,
    ) -> Captioner:
        """Read a model folder; nothing is fetched from a network.

        Args:
            folder: what :meth:`save_pretrained` wrote, a training run's folder, or the hub's cache of one model. None
                is the model that the package ships, which knows its toy world only; its captions say so.
            clip: the towers, or their folder, in place of those that the folder names.
            device: where towers, encoder and decoder run.
            decoder_dtype: of the decoder; None: as saved.
            impl: which implementation of the fused ops runs; None chooses.

        Raises:
            FileNotFoundError: there is no such folder.
            ModelFolderError: it is no model folder, lacks a part, is of another version, or its CLIP is not here.
            EncoderMismatch: the CLIP is another than the one that the model was trained with.
            ValueError: a part is damaged.
        """
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device} is not there: this machine, or this build of PyTorch, has no GPU")
        if folder is None and not (TOY_MODEL / MANIFEST).is_file():
            raise FileNotFoundError(f"this installation has no toy model ({TOY_MODEL}): name a model folder")
        path = find_model_folder(TOY_MODEL if folder is None else folder)
        stored = ModelFolder.read(path)
        dictionary = EmotionDictionary.from_folder(path / EMOTIONS)
        if words_digest(dictionary) != stored.words_sha256:
            raise ModelFolderError(f"{path / EMOTIONS} holds other words than the model was trained with")
        _require_llm(path / MODEL / "decoder")
        towers = _towers(stored, clip, device)
        if towers.fingerprint != stored.clip_fingerprint:
            from evc_fast.data.repository import EncoderMismatch

            raise EncoderMismatch(
                f"the model in {path} was trained with the CLIP {stored.clip_fingerprint[:12]}, and {towers.name} is "
                f"{towers.fingerprint[:12]}: name the right one as clip"
            )
        repository = None
        if stored.retrieval:
            from evc_fast.data.repository import CaptionRepository

            repository = CaptionRepository.load(path / REPOSITORY, towers.fingerprint)
        model = FaceNet.from_pretrained(path / MODEL, device=device, decoder_dtype=decoder_dtype)
        card = path / CARD
        captioner = cls(
            towers,
            repository,
            model,
            dictionary,
            temporal_kernel=stored.temporal_kernel,
            notes=[*([TOY_NOTE] if path == TOY_MODEL else []), *stored.notes],
            card=card.read_text(encoding="utf-8") if card.is_file() else None,
            impl=impl,
        )
        if not isinstance(clip, str | os.PathLike) and stored.clip is not None and stored.clip_path is None:
            captioner._clip_name = stored.clip  # its name on the hub, not where it lies here
        return captioner

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, include_clip: bool = False, facts: ModelFacts | None = None
    ) -> None:
        """Write the model folder, whole or not at all, in place of a model that is there.

        Args:
            folder: see :mod:`evc_fast.model_folder`.
            include_clip: keep the towers' files with the model, so that it can be moved; else their name or folder is
                written down.
            facts: for the model card; None keeps the card that there is, or makes one of what the parts tell.

        Raises:
            ModelFolderError: ``folder`` is there and holds something else, or the towers have no folder to copy.
            NotADirectoryError: ``folder`` is a file.
        """
        folder = Path(os.path.abspath(folder))
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder must be a directory to save into, {folder} is a file")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise ModelFolderError(f"{folder} holds something else than a model: name a new folder")
        towers = self.pipeline.towers
        source = Path(towers.name)
        if include_clip and not source.is_dir():
            raise ModelFolderError(f"the towers {towers.name} have no folder whose files could be kept with the model")
        clip = None if towers.random_weights else self._clip_name
        if include_clip:
            clip = f"./{CLIP}"
        elif clip is not None and Path(clip).is_dir():
            clip = os.path.abspath(clip)
        with replacing_folder(folder) as partial:
            write_model_folder(
                partial,
                model=self.pipeline.model,
                repository=self.pipeline.repository,
                dictionary=self.dictionary,
                clip=clip,
                clip_fingerprint=towers.fingerprint,
                card=self._card(facts),
                temporal_kernel=self.pipeline.temporal_kernel,
                notes=[note for note in self.pipeline.notes if note != TOY_NOTE],
            )
            if include_clip:
                shutil.copytree(source, partial / CLIP)

    def _card(self, facts: ModelFacts | None) -> str:
        if facts is None and self.card is not None:
            return self.card
        if facts is None:
            pipeline = self.pipeline
            parts, frozen = part_facts(pipeline.model, pipeline.repository, self.dictionary, self._clip_name)
            facts = ModelFacts(parts=parts, frozen=frozen, notes=tuple(pipeline.notes))
        return model_card(facts)


def _towers(stored: ModelFolder, clip: str | os.PathLike[str] | ClipTowers | None, device: torch.device) -> ClipTowers:
    """The towers that are asked for, or those that the model's folder names; from this machine only."""
    from evc_fast.data.clip import ClipTowers

    if isinstance(clip, ClipTowers):
        return clip
    if clip is not None:
        name: str | Path = os.fspath(clip)
        path = Path(name) if os.path.isdir(name) else _cached(str(name), f"clip {name!r}")
        return ClipTowers.from_pretrained(path, device=device)
    if stored.clip is None:
        raise ModelFolderError(
            f"{stored.path / MANIFEST} names no CLIP: name the towers that it was trained with as clip"
        )
    if stored.clip_path is None:
        return ClipTowers.from_pretrained(_cached(stored.clip, f"the CLIP of {stored.path}"), device=device)
    if not stored.clip_path.is_dir():
        raise ModelFolderError(f"the CLIP of {stored.path} is not there: {stored.clip_path}; name its folder as clip")
    return ClipTowers.from_pretrained(stored.clip_path, device=device)


def _require_llm(decoder: Path) -> None:
    """Raise ModelFolderError where a saved decoder needs an LLM of the hub that is not on this machine."""
    from evc_fast.model.decoders.base import read_config

    base = read_config(decoder).get("base")
    if isinstance(base, str) and not os.path.isdir(base) and not os.path.isabs(base):
        _cached(base, f"the language model of {decoder}")


def _cached(name: str, what: str) -> Path:
    from evc_fast.data.hub import cached_folder

    path = cached_folder(name)
    if path is None:
        raise ModelFolderError(
            f"{what} is not on this machine, and nothing is fetched: get it by `hf download {name}`, or name a folder"
        )
    return path
