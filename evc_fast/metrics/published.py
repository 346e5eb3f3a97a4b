"""Table 1 of FACE-net's paper, to print beside our figures where the data is EmVidCap.

In 18 of its 26 rows BFS and CFS follow from the other columns within rounding; `INCONSISTENT` names the other 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

METRICS = ("Acc_sw", "Acc_c", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "BFS", "CFS")

# fmt: off
_TABLE_1 = {
    "EVC-MSVD": {
        "SA-LSTM": (68.8, 67.2, 80.7, 67.9, 56.3, 45.5, 33.0, 68.2, 72.1, 59.0, 71.3),
        "FT": (69.4, 67.1, 77.2, 60.3, 47.4, 36.3, 29.0, 63.4, 62.5, 52.5, 63.7),
        "CANet": (78.7, 76.8, 78.5, 64.0, 52.1, 41.8, 30.8, 65.7, 74.4, 57.9, 75.1),
        "VEIN": (82.7, 82.1, 82.0, 68.4, 57.1, 45.9, 33.0, 69.0, 79.6, 62.4, 80.2),
        "EPAN": (84.1, 82.8, 82.5, 69.6, 57.8, 46.2, 34.4, 69.8, 80.6, 63.1, 81.1),
        "DCGN": (86.5, 85.7, 84.5, 70.9, 59.2, 48.7, 35.7, 71.0, 85.2, 65.7, 86.6),
        "VideoBLIP": (85.7, 84.7, 94.1, 85.7, 77.5, 69.7, 43.4, 81.6, 159.4, 78.8, 142.6),
        "MM-ECPE": (90.4, 89.1, 96.9, 87.8, 80.2, 71.4, 45.5, 83.1, 168.3, 81.8, 152.6),
        "FACE-net": (91.3, 89.6, 97.5, 88.2, 80.5, 71.5, 46.1, 83.7, 169.4, 82.2, 153.6),
    },
    "EVC-VE": {
        "SA-LSTM": (48.6, 47.1, 71.0, 51.1, 34.5, 22.5, 19.6, 40.7, 30.2, 38.9, 33.7),
        "CANet": (41.9, 39.7, 66.9, 44.8, 29.3, 19.3, 18.2, 37.9, 23.3, 33.9, 26.8),
        "VEIN": (57.4, 56.8, 71.6, 52.1, 37.4, 26.3, 20.9, 41.7, 33.4, 43.0, 39.2),
        "EPAN": (63.8, 62.3, 73.6, 54.0, 38.3, 27.0, 21.2, 42.3, 34.7, 45.0, 40.4),
        "DCGN": (71.0, 69.4, 74.5, 55.3, 40.0, 28.1, 23.4, 47.7, 41.5, 47.3, 46.9),
        "VideoBLIP": (59.6, 58.8, 74.4, 55.3, 39.7, 27.4, 22.8, 48.2, 61.2, 46.8, 60.9),
        "MM-ECPE": (73.4, 72.3, 76.8, 57.5, 41.7, 28.9, 24.7, 49.5, 65.2, 49.2, 66.7),
        "FACE-net": (73.9, 72.6, 77.5, 58.1, 42.2, 29.3, 24.5, 49.7, 66.4, 49.7, 67.8),
    },
    "EVC-Combine": {
        "SA-LSTM": (53.4, 50.7, 70.6, 51.4, 36.7, 25.4, 21.0, 45.9, 38.8, 41.2, 41.5),
        "FT": (51.2, 49.6, 67.6, 47.2, 32.0, 21.6, 20.4, 43.1, 29.0, 37.6, 33.3),
        "CANet": (53.7, 52.7, 68.1, 47.7, 32.9, 22.5, 19.7, 43.7, 34.5, 38.8, 38.2),
        "VEIN": (59.0, 57.6, 72.1, 52.8, 37.9, 27.1, 21.6, 46.8, 39.4, 43.6, 43.1),
        "EPAN": (69.3, 67.2, 74.4, 55.6, 39.9, 28.0, 23.0, 47.1, 43.0, 47.0, 48.0),
        "DCGN": (74.8, 73.1, 75.6, 56.7, 40.5, 28.5, 24.9, 51.7, 49.8, 48.5, 51.7),
        "VideoBLIP": (58.4, 57.2, 74.1, 56.0, 40.8, 29.2, 25.3, 52.0, 65.6, 45.8, 63.6),
        "MM-ECPE": (75.6, 73.8, 78.1, 58.5, 42.3, 30.2, 26.4, 53.8, 67.9, 50.4, 69.3),
        "FACE-net": (75.9, 74.4, 78.7, 59.1, 43.4, 30.9, 26.9, 54.0, 69.2, 51.1, 70.5),
    },
}
# fmt: on

TABLE_1: dict[str, dict[str, dict[str, float]]] = {
    dataset: {method: dict(zip(METRICS, row, strict=True)) for method, row in rows.items()}
    for dataset, rows in _TABLE_1.items()
}
"""Data set -> method -> metric -> percent."""

INCONSISTENT: dict[tuple[str, str], tuple[str, ...]] = {
    ("EVC-MSVD", "DCGN"): ("BFS", "CFS"),
    ("EVC-MSVD", "VideoBLIP"): ("BFS", "CFS"),
    ("EVC-VE", "VEIN"): ("BFS", "CFS"),
    ("EVC-VE", "DCGN"): ("BFS", "CFS"),
    ("EVC-VE", "VideoBLIP"): ("BFS",),
    ("EVC-Combine", "DCGN"): ("BFS", "CFS"),
    ("EVC-Combine", "VideoBLIP"): ("BFS", "CFS"),
    ("EVC-Combine", "FACE-net"): ("CFS",),
}
"""(Data set, method) -> the hybrid metrics that do not follow from the row's other columns."""

_TEST_SPLITS = {(134, 5_622): "EVC-MSVD", (382, 6_527): "EVC-VE", (516, 12_149): "EVC-Combine"}


def recognise(references: Mapping[str, Sequence[str]]) -> str | None:
    """The EmVidCap test split that has as many videos and captions as these references; None for others."""
    return _TEST_SPLITS.get((len(references), sum(len(texts) for texts in references.values())))
