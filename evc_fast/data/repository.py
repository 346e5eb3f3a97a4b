"""The caption repository: captions, what of them can be computed beforehand, and their search, equations (3)-(9).

Text features, triplets, triplet features and triplet identity depend on the repository alone: they are computed once,
when it is built, and stored, so that at caption time neither a parser nor the text tower runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from evc_fast.data.repository_files import (
    CorruptRepository,
    RepositoryError,
    StoredRepository,
    read_repository,
    write_repository,
)
from evc_fast.data.repository_index import LARGE, CaptionIndex, FlatIndex, IvfPqIndex, learn
from evc_fast.data.triplet_rules import Triplet

if TYPE_CHECKING:
    from evc_fast.data.clip import ClipTowers

__all__ = [
    "PART_PREFIX",
    "CaptionRepository",
    "CorruptRepository",
    "EncoderMismatch",
    "RepositoryError",
    "RepositoryTooSmall",
    "Retrieved",
    "distinct_parts",
]

IndexKind = Literal["flat", "ivfpq"]

PART_PREFIX = "A photo of "  # H of equation (8)


class RepositoryTooSmall(RepositoryError):
    """Fewer captions than K are left when those of the query's own video are excluded."""


class EncoderMismatch(RepositoryError):
    """The repository was built with another encoder than the one it is to be searched with."""


class Retrieved(NamedTuple):
    """The K best captions of each of B videos, best first; tensors on the device of the query.

    indices: int64 [B, K], rows of the repository
    similarity: float32 [B, K], cosine, (5)
    triplets: float32 [B, K, 3, D_t], text features of "A photo of " + part, not L2-normalised, (8), (9)
    groups: int64 [B, K], equal for triplets of equal lemmas
    captions: B lists of K sentences; triplet_texts: B lists of K (subject, predicate, object)
    """

    indices: torch.Tensor
    similarity: torch.Tensor
    triplets: torch.Tensor
    groups: torch.Tensor
    captions: list[list[str]]
    triplet_texts: list[list[Triplet]]


def distinct_parts(triplets: Sequence[Triplet]) -> tuple[list[str], torch.Tensor]:
    """The m distinct parts of n triplets, by first appearance, and int32 [n, 3], where each triplet's parts stand."""
    places: dict[str, int] = {}
    rows = [[places.setdefault(part, len(places)) for part in triplet] for triplet in triplets]
    return list(places), torch.tensor(rows, dtype=torch.int32).view(-1, 3)


class CaptionRepository:
    """n captions with their features, searched by exact inner product in FAISS; by IVF-PQ first where they are many.

    Made by `build`, `from_features` or `load`.
    captions: list of n sentences; video_ids: list of n, None for a caption of no video
    width: D_t; encoder_fingerprint: of the towers that made the features; random_weights: whether those were noise
    triplet_extractor: what made the triplets, None where that is not known; index_kind: "flat" or "ivfpq"
    """

    def __init__(self, stored: StoredRepository) -> None:
        """From content that one of the three constructors has checked."""
        self.captions = stored.captions
        self.video_ids = stored.video_ids
        self.encoder_fingerprint = stored.encoder_fingerprint
        self.random_weights = stored.random_weights
        self.triplet_extractor = stored.triplet_extractor
        self.width = stored.text_features.shape[1]
        self._parts = stored.parts
        # Copies, so that nothing but the text features of an IVF-PQ index holds on to a mapped file.
        self._part_indices = stored.part_indices.clone()  # int32 [n, 3] into the m distinct parts
        self._part_features = stored.part_features.clone()  # float32 [m, D_t]: few thousand words for 28,860 captions
        self._groups = torch.unique(stored.part_indices, dim=0, return_inverse=True)[1]  # int64 [n]
        self._video_counts = Counter(video for video in stored.video_ids if video is not None)
        numbers = {video: number for number, video in enumerate(self._video_counts)}
        self._video_numbers = torch.tensor([numbers.get(video, -1) for video in stored.video_ids])
        self._number_of_video = numbers
        self._index: CaptionIndex = (
            FlatIndex(stored.text_features) if stored.index is None else IvfPqIndex(stored.index, stored.text_features)
        )
        self.index_kind: IndexKind = "flat" if stored.index is None else "ivfpq"

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def build(
        cls,
        captions: Sequence[str],
        video_ids: Sequence[str | None],
        triplets: Sequence[Triplet],
        towers: ClipTowers,
        *,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
        triplet_extractor: str | None = None,
        index: IndexKind | None = None,
    ) -> CaptionRepository:
        """Encodes n captions (4) and the distinct parts of their triplets (8) with the text tower.

        `progress(done, total)` counts sentences after each batch. triplet_extractor, index: as for `from_features`,
        whose errors are raised here too; the texts are checked before anything is encoded.
        """
        captions, video_ids, triplets = _check_texts(captions, video_ids, triplets)
        parts, _ = distinct_parts(triplets)
        total = len(captions) + len(parts)

        def encode(sentences: list[str], before: int) -> torch.Tensor:
            report = None if progress is None else (lambda done, _: progress(before + done, total))
            return towers.encode_text(sentences, batch_size=batch_size, progress=report)

        return cls.from_features(
            captions,
            video_ids,
            triplets,
            encode(captions, 0),
            encode([PART_PREFIX + part for part in parts], len(captions)),
            encoder_fingerprint=towers.fingerprint,
            random_weights=towers.random_weights,
            triplet_extractor=triplet_extractor,
            index=index,
        )

    @classmethod
    def from_features(
        cls,
        captions: Sequence[str],
        video_ids: Sequence[str | None],
        triplets: Sequence[Triplet],
        text_features: torch.Tensor,
        part_features: torch.Tensor,
        *,
        encoder_fingerprint: str,
        random_weights: bool = False,
        triplet_extractor: str | None = None,
        index: IndexKind | None = None,
    ) -> CaptionRepository:
        """From features that are there already; `text_features` is normalised here, `part_features` is kept as it is.

        text_features: [n, D_t] of the captions; part_features: [m, D_t] of "A photo of " + part, a row for each of the
        m parts that `distinct_parts(triplets)` lists; triplet_extractor: the name of what made the triplets.
        index: "flat" searches exactly; "ivfpq" learns an index that proposes captions, which are then ranked exactly,
        and needs 256 captions; None is flat below 500,000 captions. Raises RepositoryError for no captions, empty ones,
        unequal numbers, parts that are no words, and NaN, infinite or zero features, naming the row.
        """
        if index not in ("flat", "ivfpq", None):
            raise ValueError(f"index must be 'flat', 'ivfpq' or None, not {index!r}")
        captions, video_ids, triplets = _check_texts(captions, video_ids, triplets)
        parts, part_indices = distinct_parts(triplets)
        text_features = _check_features("text_features", text_features, len(captions), "captions")
        part_features = _check_features("part_features", part_features, len(parts), "distinct parts")
        if part_features.shape[1] != text_features.shape[1]:
            raise RepositoryError(
                f"part_features are {part_features.shape[1]} wide and text_features {text_features.shape[1]}: "
                "both must come from one text tower"
            )
        lengths = text_features.norm(dim=1, keepdim=True)
        if bool((lengths == 0).any()):
            raise RepositoryError(f"text_features has only zeros in row {int((lengths == 0).nonzero()[0, 0])}")
        text_features = text_features / lengths
        approximate = index == "ivfpq" or (index is None and len(captions) >= LARGE)
        return cls(
            StoredRepository(
                captions=captions,
                video_ids=video_ids,
                parts=parts,
                part_indices=part_indices,
                part_features=part_features,
                text_features=text_features,
                encoder_fingerprint=encoder_fingerprint,
                random_weights=random_weights,
                triplet_extractor=triplet_extractor,
                index=learn(text_features) if approximate else None,
            )
        )

    def require_encoder(self, fingerprint: str) -> None:
        """Raises EncoderMismatch unless `fingerprint` (of `ClipTowers`) is that of the encoder used in building."""
        _check_encoder(self.encoder_fingerprint, fingerprint)

    def search(
        self,
        frame_features: torch.Tensor,
        k: int = 4,
        exclude_video_ids: Sequence[str | None] | str | None = None,
    ) -> Retrieved:
        """The `k` captions most like each video, those of its own `video_id` excluded, (3)-(6).

        frame_features: image features [B, N, D_v], or [N, D_v] for one video (B = 1), not normalised.
        exclude_video_ids: one id for each of the B videos, None where nothing is excluded; a string for one video.
        Exact: the same captions as sorting all cosines, captions of equal cosine in the order of the repository. With
        an IVF-PQ index the cosines and their order are exact, and some of the k best captions may be missed for others.
        Raises ValueError or TypeError for the arguments, RepositoryTooSmall where fewer than `k` captions are left.
        """
        queries = self._check_query(frame_features)
        excluded = self._check_exclusion(exclude_video_ids, len(queries))
        counts = [self._video_counts.get(video, 0) for video in excluded]
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, not {k!r}")
        for video, count in zip(excluded, counts, strict=True):
            if len(self) - count < k:
                without = f" without the {count} of video {video!r}" if count else ""
                raise RepositoryTooSmall(
                    f"the repository has {len(self) - count} captions{without}, fewer than k = {k}"
                )
        own = torch.tensor([-2 if video is None else self._number_of_video.get(video, -2) for video in excluded])
        indices, similarity = self._index.nearest(queries, own, self._video_numbers, k, max(counts))
        device = frame_features.device
        return Retrieved(
            indices=indices.to(device),
            similarity=similarity.to(device),
            triplets=self._part_features[self._part_indices[indices].long()].float().to(device),  # (9)
            groups=self._groups[indices].to(device),
            captions=[[self.captions[index] for index in row] for row in indices.tolist()],
            triplet_texts=[[self.triplet(index) for index in row] for row in indices.tolist()],
        )

    def set_effort(self, *, probes: int | None = None, candidates: int | None = None) -> None:
        """How hard an IVF-PQ index looks, None as before: more finds more of the best captions, and takes longer.

        probes: lists that are scanned; candidates: captions that are then ranked exactly. Kept by `save`. Raises
        ValueError for numbers below 1, and for a repository whose index is flat and finds all.
        """
        _check_effort(probes=probes, candidates=candidates)
        if not isinstance(self._index, IvfPqIndex):
            raise ValueError("set_effort is for an IVF-PQ index: this repository's is flat, and always finds the best")
        self._index.set_effort(probes, candidates)

    def triplet(self, index: int) -> Triplet:
        """Subject, predicate and object of caption `index`."""
        subject, predicate, object_ = (self._parts[place] for place in self._part_indices[index].tolist())
        return subject, predicate, object_

    def _check_query(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, D] or [N, D] -> the unit mean over frames, float64 [B, D] on the CPU."""
        if not isinstance(features, torch.Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
            raise TypeError(f"frame_features must be a floating-point tensor [B, N, {self.width}], not {kind}")
        if features.dim() not in (2, 3) or features.shape[-1] != self.width or 0 in features.shape:
            raise ValueError(
                f"frame_features must be [B, N, {self.width}] or [N, {self.width}], as wide as the repository's text "
                f"features, not {list(features.shape)}"
            )
        features = features.detach().to("cpu", torch.float64)
        features = features.unsqueeze(0) if features.dim() == 2 else features
        broken = (~torch.isfinite(features)).any(dim=-1).nonzero()
        if len(broken):
            video, frame = broken[0].tolist()
            raise ValueError(f"frame_features has NaN or infinite values in video {video}, frame {frame}")
        mean = features.mean(dim=1)  # (3)
        length = mean.norm(dim=1, keepdim=True)
        if bool((length == 0).any()):
            raise ValueError(f"frame_features has a mean of only zeros in video {int((length == 0).nonzero()[0, 0])}")
        return mean / length  # (5): the captions' features are of length 1 already

    @staticmethod
    def _check_exclusion(exclude: Sequence[str | None] | str | None, batch: int) -> list[str | None]:
        if exclude is None:
            return [None] * batch
        excluded = [exclude] if isinstance(exclude, str) else list(exclude)
        if len(excluded) != batch:
            raise ValueError(f"exclude_video_ids has {len(excluded)} ids for {batch} videos")
        if not all(video is None or isinstance(video, str) for video in excluded):
            raise TypeError("exclude_video_ids must hold strings, or None where nothing is excluded")
        return excluded

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `manifest.json`, `captions.json`, `features.safetensors` into `folder`, which is made if need be.

        An IVF-PQ index is written beside them, as `index.safetensors`.
        """
        write_repository(
            folder,
            StoredRepository(
                captions=self.captions,
                video_ids=self.video_ids,
                parts=self._parts,
                part_indices=self._part_indices,
                part_features=self._part_features,
                text_features=self._index.features,
                encoder_fingerprint=self.encoder_fingerprint,
                random_weights=self.random_weights,
                triplet_extractor=self.triplet_extractor,
                index=self._index.content,
            ),
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], encoder_fingerprint: str | None = None) -> CaptionRepository:
        """Reads what `save` wrote. The file is mapped; a flat index copies its text features once, straight into FAISS,
        and an IVF-PQ index reads them where they lie, so that they take no memory that cannot be given back.

        encoder_fingerprint: of the towers that will be used; EncoderMismatch where the repository has another.
        Raises FileNotFoundError where there is no folder, CorruptRepository where its files do not make a repository.
        """
        stored = read_repository(folder)
        if encoder_fingerprint is not None:
            _check_encoder(stored.encoder_fingerprint, encoder_fingerprint, f" in {os.fspath(folder)}")
        return cls(stored)


def _check_effort(**counts: int | None) -> None:
    for argument, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument} must be an integer of at least 1, not {value!r}")


def _check_encoder(built_with: str, wanted: str, place: str = "") -> None:
    if wanted != built_with:
        raise EncoderMismatch(
            f"the repository{place} was built with the encoder {built_with[:12]}, not with {wanted[:12]}: "
            "build it again with the towers that encode the frames"
        )


def _check_texts(
    captions: Sequence[str], video_ids: Sequence[str | None], triplets: Sequence[Triplet]
) -> tuple[list[str], list[str | None], list[Triplet]]:
    if isinstance(captions, str):
        raise TypeError("captions must be a sequence of sentences, not one string")
    captions, video_ids, triplets = list(captions), list(video_ids), list(triplets)
    if not captions:
        raise RepositoryError("captions is empty: a repository needs at least one")
    if not len(captions) == len(video_ids) == len(triplets):
        raise RepositoryError(
            f"captions, video_ids and triplets must be of one length, "
            f"not {len(captions)}, {len(video_ids)} and {len(triplets)}"
        )
    for row, (caption, video, triplet) in enumerate(zip(captions, video_ids, triplets, strict=True)):
        if not isinstance(caption, str) or not caption.strip():
            raise RepositoryError(f"captions[{row}] must be a sentence, not {caption!r}")
        if video is not None and not isinstance(video, str):
            raise RepositoryError(f"video_ids[{row}] must be a string or None, not {video!r}")
        if isinstance(triplet, str) or len(triplet) != 3 or not all(isinstance(p, str) and p.strip() for p in triplet):
            raise RepositoryError(
                f"triplets[{row}] must be three words, subject, predicate and object, not {triplet!r}"
            )
    return captions, video_ids, [tuple(triplet) for triplet in triplets]


def _check_features(argument: str, features: torch.Tensor, rows: int, what: str) -> torch.Tensor:
    """[rows, D] of any floating type and device -> the same in float32 on the CPU."""
    if not isinstance(features, torch.Tensor) or not features.is_floating_point():
        kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
        raise TypeError(f"{argument} must be a floating-point tensor [{rows}, D_t], not {kind}")
    if features.dim() != 2 or features.shape[0] != rows or features.shape[1] == 0:
        raise RepositoryError(f"{argument} must be [{rows}, D_t] for {rows} {what}, not {list(features.shape)}")
    features = features.detach().to("cpu", torch.float32).contiguous()
    broken = (~torch.isfinite(features)).any(dim=1).nonzero()
    if len(broken):
        raise RepositoryError(f"{argument} has NaN or infinite values in row {int(broken[0])}")
    return features
