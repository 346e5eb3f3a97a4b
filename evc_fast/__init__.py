"""evc_fast: emotional video captioning with FACE-net, measured and fast."""

__version__ = "0.1.0"
