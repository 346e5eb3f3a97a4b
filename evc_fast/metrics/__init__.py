"""Metrics of generated captions: of words (BLEU, METEOR, ROUGE-L, CIDEr), of emotions (Acc_sw, Acc_c), and of both."""

from evc_fast.metrics.scores import METRICS, MetricsError, Scores, evaluate

__all__ = ["METRICS", "MetricsError", "Scores", "evaluate"]
