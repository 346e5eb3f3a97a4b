"""How a repository's captions are searched: exactly, or proposed by IVF-PQ and then ranked exactly, (5)-(6).

`FlatIndex` multiplies the query with every caption's feature. `IvfPqIndex` is for repositories so large that this takes
too long or too much memory: k-means divides the captions into lists, of which the few nearest to the query are scanned
by 8-bit product-quantised codes; what the codes propose is scored again with the features themselves, which may stay
in a mapped file. Both are FAISS, and both give a query the same answer whatever else is searched with it.
"""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["LARGE", "CaptionIndex", "FlatIndex", "IvfPqContent", "IvfPqIndex", "import_faiss", "learn"]

# From so many captions on, IVF-PQ is the default: a flat index of width 512 takes 1 GB there.
LARGE = 500_000

_ROUNDING = 1e-5  # far above the rounding of a float32 inner product of unit vectors
_LEVELS = 256  # values of an 8-bit code, so also the least number of captions that codes can be learnt from
_MOST_CODE_BYTES = 128
# k-means learns from so many captions for each list, and for each value of a code.
_POINTS_A_LIST, _POINTS_A_LEVEL, _ITERATIONS = 40, 64, 10
# At a million captions this finds 94 of 100 of the four best in 18 ms; (64, 256) found 72 in 6 ms, and a video takes
# hundreds to decode and encode.
_PROBES, _CANDIDATES = 256, 1024


class CaptionIndex(Protocol):
    """What finds captions.

    features: float32 [n, D], of length 1, as they are kept for the whole repository
    content: what was learnt of them, to be stored beside them; None where nothing was
    """

    features: torch.Tensor
    content: IvfPqContent | None

    def nearest(
        self, queries: torch.Tensor, own: torch.Tensor, numbers: torch.Tensor, k: int, most_hidden: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k captions of largest cosine that are not of the query's own video: rows int64, cosines float32 [B, k].

        queries: float64 [B, D], of length 1; own: int64 [B], number of each query's own video, or one that no caption
        has; numbers: int64 [n], of each caption's video; most_hidden: the most captions that one of those videos has.
        At least k captions must be left to each query.
        """
        ...


class FlatIndex:
    """Exact: the same captions as sorting all cosines, captions of equal cosine in the order of the repository."""

    content = None

    def __init__(self, features: torch.Tensor) -> None:
        """features: float32 [n, D], of length 1; copied once, into FAISS."""
        self._faiss = import_faiss()
        count, width = features.shape
        self._index = self._faiss.IndexFlatIP(width)
        self._index.add(features.numpy())
        # FAISS holds the only copy of the features; this is a view of it.
        self.features = torch.from_numpy(self._faiss.rev_swig_ptr(self._index.get_xb(), count * width)).view(-1, width)

    def nearest(
        self, queries: torch.Tensor, own: torch.Tensor, numbers: torch.Tensor, k: int, most_hidden: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # FAISS may propose the hidden captions first, so it is asked for as many more.
        return self._nearest(queries, own, numbers, k, k + most_hidden + 8)

    def _nearest(
        self, queries: torch.Tensor, own: torch.Tensor, numbers: torch.Tensor, k: int, wanted: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FAISS proposes `wanted` captions, which are scored again in float64 and rounded, so that neither the order of
        equal captions nor the last digit depends on how many videos are searched at once. What FAISS left out is no
        better than its last proposal: where that comes within rounding of the k-th best, the query is asked again.
        """
        wanted = min(len(self.features), wanted)
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        proposed, rows = self._index.search(queries.float().numpy(), wanted)
        candidates = torch.from_numpy(rows).sort(dim=1).values
        indices, best = _best(self.features, queries, candidates, numbers[candidates] == own[:, None], k)
        if wanted < len(self.features):
            open_queries = torch.from_numpy(proposed[:, -1]) >= best[:, -1] - _ROUNDING
            for row in open_queries.nonzero()[:, 0].tolist():
                one = slice(row, row + 1)
                indices[one], best[one] = self._nearest(queries[one], own[one], numbers, k, 4 * wanted)
        return indices, best


@dataclass(frozen=True)
class IvfPqContent:
    """A trained IVF-PQ index of n captions of width D: L lists, codes of M bytes.

    centroids: float32 [L, D]; codebooks: float32 [M, 256, D / M], of what is left when a caption's centroid is taken
    off it; lists: int32 [n], each caption's list; codes: uint8 [n, M].
    probes: lists scanned for a query; candidates: captions that are then scored exactly.
    """

    centroids: torch.Tensor
    codebooks: torch.Tensor
    lists: torch.Tensor
    codes: torch.Tensor
    probes: int
    candidates: int


def learn(
    features: torch.Tensor,
    *,
    lists: int | None = None,
    code_bytes: int | None = None,
    probes: int = _PROBES,
    candidates: int = _CANDIDATES,
) -> IvfPqContent:
    """The lists and codes of n captions.

    features: float32 [n, D], of length 1. lists: default 2 sqrt(n), but 39 captions in each on average at least;
    code_bytes: a divisor of D, default the largest up to 128. Raises ValueError for fewer than 256 captions.
    """
    count, width = features.shape
    if count < _LEVELS:
        raise ValueError(f"an IVF-PQ index needs at least {_LEVELS} captions to learn from, not {count}")
    lists = lists or max(1, min(round(2 * math.sqrt(count)), count // 39))
    code_bytes = code_bytes or _largest_code(width)
    faiss = import_faiss()
    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFPQ(quantizer, width, lists, code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.niter = _POINTS_A_LIST, _ITERATIONS
    index.pq.cp.max_points_per_centroid, index.pq.cp.niter = _POINTS_A_LEVEL, _ITERATIONS
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    index.train(features.numpy())
    index.add(features.numpy())
    codes, of_list = np.empty((count, code_bytes), np.uint8), np.empty(count, np.int32)
    for number in range(lists):
        size = index.invlists.list_size(number)
        if size:
            rows = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
            of_list[rows] = number
            codes[rows] = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * code_bytes).reshape(size, -1)
    centroids = faiss.rev_swig_ptr(quantizer.get_xb(), lists * width).reshape(lists, width).copy()
    codebooks = faiss.vector_to_array(index.pq.centroids).reshape(code_bytes, _LEVELS, -1)
    learnt = (torch.from_numpy(array) for array in (centroids, codebooks, of_list, codes))
    return IvfPqContent(*learnt, probes, candidates)


class IvfPqIndex:
    """Approximate in which captions it finds, exact in their cosines and their order.

    Captions of the query's own video never take another's place: where too few others were proposed, more lists are
    scanned, in the end all.
    """

    def __init__(self, content: IvfPqContent, features: torch.Tensor) -> None:
        """features: float32 [n, D], of length 1; kept as they are, so they may be mapped from a file."""
        self.content, self.features = content, features
        self._faiss = faiss = import_faiss()
        count, width = features.shape
        lists, code_bytes = len(content.centroids), content.codes.shape[1]
        self._quantizer = faiss.IndexFlatIP(width)  # kept here: the index below does not own it
        self._quantizer.add(content.centroids.numpy())
        self._index = faiss.IndexIVFPQ(self._quantizer, width, lists, code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(content.codebooks.contiguous().numpy().ravel(), self._index.pq.centroids)
        self._index.is_trained = True
        order = content.lists.argsort(stable=True)
        codes = content.codes[order].numpy()
        bounds = torch.searchsorted(content.lists[order], torch.arange(lists + 1, dtype=torch.int32)).tolist()
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            rows, part = order[begin:end].numpy(), codes[begin:end]
            pointers = faiss.swig_ptr(rows), faiss.swig_ptr(part)
            self._index.invlists.add_entries(number, end - begin, *pointers)
        self._index.ntotal = count

    def set_effort(self, probes: int | None, candidates: int | None) -> None:
        """Lists to scan and captions to rank from now on; None as before."""
        probes, candidates = probes or self.content.probes, candidates or self.content.candidates
        self.content = replace(self.content, probes=probes, candidates=candidates)

    def nearest(
        self, queries: torch.Tensor, own: torch.Tensor, numbers: torch.Tensor, k: int, most_hidden: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = min(len(self.features), max(self.content.candidates, 16 * k) + most_hidden)
        return self._nearest(queries, own, numbers, k, wanted, self.content.probes)

    def _nearest(
        self, queries: torch.Tensor, own: torch.Tensor, numbers: torch.Tensor, k: int, wanted: int, probes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`wanted` is at least k + most_hidden, so that k others are among them once all lists are scanned."""
        centroids = self.content.centroids
        probes = min(probes, len(centroids))
        singles = queries.float()
        # Row by row: a matrix product may round a query's scores by how many are searched with it.
        scores, lists = torch.stack([centroids @ query for query in singles]).topk(probes, dim=1)
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        self._index.nprobe = probes
        _, rows = self._index.search_preassigned(singles.numpy(), wanted, lists.numpy(), scores.numpy())
        candidates = torch.from_numpy(rows).sort(dim=1).values  # -1, first, where the lists hold fewer
        hidden = (candidates < 0) | (numbers[candidates.clamp(min=0)] == own[:, None])
        indices, best = _best(self.features, queries, candidates.clamp(min=0), hidden, k)
        too_few = (~hidden).sum(dim=1) < k
        for row in too_few.nonzero()[:, 0].tolist():
            one = slice(row, row + 1)
            indices[one], best[one] = self._nearest(queries[one], own[one], numbers, k, wanted, 4 * probes)
        return indices, best


def _best(
    features: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor, hidden: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of candidates int64 [B, m], ascending, the k best that are not hidden [B, m], and their cosines in float32."""
    # (5); sums of single rows: a matrix product may treat equal rows differently by where they stand. Query by query:
    # the candidates of one stay in the caches, those of a whole batch do not.
    pairs = zip(candidates, queries, strict=True)
    scored = [(features.index_select(0, rows) * query).sum(dim=1) for rows, query in pairs]
    cosines = torch.stack(scored).float()
    # (6); ascending rows and a stable sort: captions of equal cosine keep the order of the repository.
    order = cosines.masked_fill(hidden, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :k]
    return candidates.gather(1, order), cosines.gather(1, order)


def _largest_code(width: int) -> int:
    """The most bytes, up to 128, that divide a feature into parts of one width."""
    return max(size for size in range(1, min(width, _MOST_CODE_BYTES) + 1) if width % size == 0)


def import_faiss() -> Any:
    """FAISS, or an ImportError that says how to get it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(f"the caption repository needs FAISS ({error}): pip install faiss-cpu") from error
