"""Exporters of the encoder, installed as `evc_fast.export`: none yet."""
