"""From captions to a caption repository: triplets, text features, and the index that finds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evc_fast.data.repository import CaptionRepository, IndexKind, RepositoryError

if TYPE_CHECKING:
    from evc_fast.data.captions import CaptionSet
    from evc_fast.data.clip import ClipTowers
    from evc_fast.data.triplets import TripletExtractor

__all__ = ["build_repository"]


def build_repository(
    captions: CaptionSet,
    towers: ClipTowers,
    extractor: TripletExtractor | None = None,
    *,
    index: IndexKind | None = None,
    batch_size: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> CaptionRepository:
    """The repository of n captions, (4) and (7)-(9), with everything computed that does not depend on a video.

    captions: with the ids of their videos, so that a video's own captions can be left out when it is the query.
    towers: of which the text tower encodes captions and triplets; a repository is searched with the same towers only.
    extractor: of the triplets, default `SpacyTriplets()`; it sees each distinct sentence once.
    index: "flat", "ivfpq", or None, which is flat below 500,000 captions.
    progress: `progress(stage, done, total)` with the stages "triplets" and "text features", in sentences.

    Raises RepositoryError where there are no captions, or the extractor gives other than three words a sentence;
    ImportError, in one sentence, where the default extractor's spaCy or its model is not installed.
    """
    if not len(captions):
        raise RepositoryError("there are no captions to make a repository of")
    if extractor is None:
        from evc_fast.data.triplets import SpacyTriplets

        extractor = SpacyTriplets()

    def stage(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else (lambda done, total: progress(name, done, total))

    sentences = [caption.text for caption in captions]
    distinct = list(dict.fromkeys(sentences))
    found = extractor(distinct, progress=stage("triplets"))
    if len(found) != len(distinct):
        raise RepositoryError(f"the extractor {extractor.name} gave {len(found)} triplets for {len(distinct)} captions")
    triplets = dict(zip(distinct, found, strict=True))
    return CaptionRepository.build(
        sentences,
        [caption.video_id for caption in captions],
        [triplets[sentence] for sentence in sentences],
        towers,
        batch_size=batch_size,
        progress=stage("text features"),
        triplet_extractor=extractor.name,
        index=index,
    )
