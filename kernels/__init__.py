"""Triton kernels of the ops (installed as `evc_fast.kernels`): none yet, see `python -m evc_fast` for what serves each op."""
