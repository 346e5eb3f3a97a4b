"""A trained model, opened to caption videos whose features are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evc_fast.cli.command import UsageError
from evc_fast.cli.console import Update

if TYPE_CHECKING:
    from evc_fast.data.emotions import EmotionDictionary
    from evc_fast.data.features import FeatureStore
    from evc_fast.data.repository import CaptionRepository


@dataclass(frozen=True)
class OpenRun:
    """A trained model, loaded when it is to caption, and what it needs for videos whose features are there."""

    model: Path
    device: str
    features: FeatureStore
    repository: CaptionRepository | None
    dictionary: EmotionDictionary

    def without_features(self, video_ids: Sequence[str]) -> list[str]:
        """Those of the videos that cannot be captioned."""
        return [video_id for video_id in video_ids if video_id not in self.features]

    def caption(self, video_ids: Sequence[str], update: Update, batch_size: int, num_beams: int) -> dict[str, str]:
        """Video id -> caption, without retrieving a video's own; all of them must have features.

        The model is loaded for it, and gone afterwards. Errors as of `FaceNet.from_pretrained`.
        """
        from evc_fast.model.captioner import FaceNet
        from evc_fast.training.dataset import VideoBatches
        from evc_fast.training.evaluation import caption_videos

        model = FaceNet.from_pretrained(self.model, device=self.device)
        videos = VideoBatches(video_ids, self.features, self.repository, model.encoder.config.num_triplets)
        rows = range(len(video_ids))
        return caption_videos(model, videos, rows, batch_size=batch_size, num_beams=num_beams, progress=update)


def open_run(folder: Path, features: Path | None, repository: Path | None, device: str) -> OpenRun:
    """The best model of a run's folder, or that of a captioner's folder, not loaded yet.

    features: None takes those that the run was trained with; repository: None takes the model's own.
    Errors as of `Captioner.from_pretrained`; UsageError where no features are named.
    """
    from evc_fast.cli.options import silence_transformers, work_offline

    work_offline()
    silence_transformers()
    from evc_fast.data.emotions import EmotionDictionary
    from evc_fast.data.features import FeatureStore
    from evc_fast.data.repository import CaptionRepository
    from evc_fast.model_folder import EMOTIONS, MODEL, REPOSITORY, ModelFolder, find_model_folder

    home = ModelFolder.read(find_model_folder(folder))
    if features is None and (folder / "config.yaml").is_file():
        from evc_fast.training.config import load_config

        features = load_config(folder / "config.yaml").data.features
    if features is None:
        raise UsageError(f"name the features of the videos by --features: {folder} does not say")
    store = FeatureStore.open(features)
    if store.fingerprint != home.clip_fingerprint:
        raise UsageError(
            f"the features in {features} are of another CLIP ({store.encoder}) than the model in {folder} was "
            "trained with"
        )
    found = None
    if home.retrieval:
        found = CaptionRepository.load(repository or home.path / REPOSITORY, store.fingerprint)
    return OpenRun(home.path / MODEL, device, store, found, EmotionDictionary.from_folder(home.path / EMOTIONS))
