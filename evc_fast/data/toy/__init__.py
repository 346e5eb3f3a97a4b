"""A toy world of drawn people and animals: rendered clips, their captions, and a small CLIP trained on them.

`python -m evc_fast.data.toy build OUT` rebuilds everything that ships in `assets/`.
"""

from __future__ import annotations

from evc_fast.data.toy.world import ToyWorld, ToyWorldError, plan_world, render_world

__all__ = ["ToyWorld", "ToyWorldError", "plan_world", "render_world"]
