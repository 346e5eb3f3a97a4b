"""Triton kernels of the ops, installed as `evc_fast.kernels`: none yet."""
