"""The small CLIP as a folder: written, measured, and the one that ships with the package."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evc_fast.data.clip import ClipTowers
from evc_fast.data.files import replacing_folder, write_json
from evc_fast.data.preprocessing import CLIP_MEAN, CLIP_STD
from evc_fast.data.toy.scenes import SIZE, Scene
from evc_fast.data.toy.small_clip import EMOTION_TEMPLATE, FACTS, ClipRecipe, fact_prompts

CLIP_ASSETS = Path(__file__).with_name("assets") / "clip"
"""The small CLIP that the package ships: a folder that `ClipTowers.from_pretrained` reads."""


def save_clip(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], manifest: Mapping[str, object] | None
) -> None:
    """Writes model, tokenizer, preprocessing and manifest.json to a folder, in place of what it held.

    manifest: None leaves it out. Weights are stored in float16; the folder appears when it is complete.
    """
    preprocessing = {
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "image_processor_type": "CLIPImageProcessor",
    }
    with replacing_folder(Path(folder)) as partial:
        copy.deepcopy(model).half().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "preprocessor_config.json", preprocessing)
        if manifest is not None:
            write_json(partial / "manifest.json", manifest)


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of the packages that every part depends on, and of `others`, for a manifest."""
    packages = ("torch", "transformers", "numpy", "av", *others)
    return {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}


def make_manifest(seed: int, recipe: ClipRecipe, metrics: Mapping[str, object]) -> dict[str, object]:
    """What manifest.json says of the small CLIP: seed, recipe, versions, metrics."""
    return {
        "what": "a small CLIP of the toy world of evc_fast.data.toy, trained on its training clips only",
        "command": f"python -m evc_fast.data.toy build OUT --seed {seed}",
        "seed": seed,
        "recipe": asdict(recipe),
        "emotion_template": EMOTION_TEMPLATE,
        "versions": versions(),
        "metrics": dict(metrics),
    }


def zero_shot(towers: ClipTowers, frames: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of clips, uint8 frames [n, N, H, W, 3], whose nearest prompt names their subject, action, emotion, place.

    The clip's feature is the mean over its frames, as in retrieval; the prompts are `fact_prompts`.
    """
    features = torch.cat([towers.encode_frames(clip).mean(0, keepdim=True) for clip in frames])
    shares = {}
    for fact, prompts in fact_prompts().items():
        nearest = (F.normalize(features, dim=-1) @ F.normalize(towers.encode_text(prompts), dim=-1).T).argmax(1)
        truth = torch.tensor([FACTS[fact].index(getattr(scene, fact)) for scene in scenes])
        shares[fact] = (nearest.cpu() == truth).float().mean().item()
    return shares
