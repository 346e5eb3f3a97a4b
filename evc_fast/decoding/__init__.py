"""Searches over generated sequences."""

from evc_fast.decoding.beam_search import BeamSearchOutput, beam_search, check_search_options

__all__ = ["BeamSearchOutput", "beam_search", "check_search_options"]
