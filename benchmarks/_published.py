"""Table 6 of the FACE-net paper as printed: what its authors measured on one NVIDIA RTX 3090, with trained weights.

Milliseconds a caption and megabytes are the paper's own units. "Parameters" are the trainable ones; "FLOPs" leave CLIP
and the LLM out. EPAN's and DCGN's figures follow from their published code when a multiply-add counts once, so the
column is read as multiply-adds here; the three rows with an LLM follow from nothing that is published.
"""

from __future__ import annotations

from typing import NamedTuple

GPU = "NVIDIA RTX 3090"


class PublishedRow(NamedTuple):
    method: str
    cfs: float
    trainable_parameters: float
    multiply_adds: float
    milliseconds: float
    megabytes: float


TABLE_6 = (
    PublishedRow("EPAN", 48.0, 21.1e6, 0.72e9, 198.6, 5602.0),
    PublishedRow("DCGN", 51.7, 21.9e6, 1.24e9, 247.8, 6201.0),
    PublishedRow("VideoBLIP", 63.6, 53.7e6, 3.31e9, 3610.0, 15852.0),
    PublishedRow("MM-ECPE", 69.3, 60.6e6, 3.72e9, 4076.8, 18742.0),
    PublishedRow("FACE-net", 70.5, 63.9e6, 3.98e9, 4252.6, 21064.0),
)
