"""A few captioned videos and a tiny CLIP on disk, for tests of the command line."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from evc_fast.testing.videos import write_video

__all__ = ["CONFIG", "TEST_IDS", "TRAIN_IDS", "SameTriplet", "write_clip_folder", "write_world"]

TRAIN_IDS = tuple(f"clip{number}" for number in range(8))
TEST_IDS = tuple(f"held{number}" for number in range(3))
_CAPTIONS = (
    ("a man runs happily in the park", "the happy man runs"),
    ("a sad dog sleeps on the floor", "a dog sleeps sadly"),
    ("an angry woman eats an apple", "the woman eats an apple angrily"),
    ("a girl is calm on a chair", "a calm girl sits on a chair"),
)

CONFIG = """
model:
  encoder: {dim: 16, num_frames: 4, num_triplets: 2, num_queries: 4, num_heads: 2}
  decoder: {name: transformer, options: {num_layers: 1, num_heads: 2, ffn_dim: 32}}
trainer: {epochs: 2, batch_size: 8, num_beams: 2, max_new_tokens: 8, device: cpu, tensorboard: false}
"""
"""Of a run of four steps."""


class SameTriplet:
    """An extractor without a parser."""

    name = "nothing"

    def __call__(
        self, captions: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[tuple[str, str, str]]:
        return [("man", "do", "something")] * len(captions)


def write_world(folder: Path) -> Path:
    """videos/, captions_train.csv, captions_test.csv, clip/ and config.yaml in a folder, which is returned."""
    (folder / "videos").mkdir(parents=True)
    for number, video_id in enumerate((*TRAIN_IDS, *TEST_IDS)):
        write_video(folder / "videos" / f"{video_id}.mp4", seed=number)
    for split, ids in (("train", TRAIN_IDS), ("test", TEST_IDS)):
        rows = [
            f"{video_id},{text}" for number, video_id in enumerate(ids) for text in _CAPTIONS[number % len(_CAPTIONS)]
        ]
        (folder / f"captions_{split}.csv").write_bytes("\r\n".join(["VideoID,EmCaptions", *rows, ""]).encode())
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    write_clip_folder(folder / "clip")
    return folder


def write_clip_folder(folder: Path, seed: int = 0) -> Path:
    """CLIP towers of random weights and a tokenizer of letters, as transformers saves them; 32 pixels, width 24."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

    letters = list(string.ascii_lowercase)
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizerFast(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(pieces), "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=24))
        for parameter in model.parameters():  # no biases of 0, no norms of 1
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    preprocessor = {"size": {"shortest_edge": 32}, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return folder
