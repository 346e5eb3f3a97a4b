"""LLM checkpoints of a few thousand random weights with a tokenizer of their family, for tests of training."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Literal

import torch

from evc_fast.model.decoders.llm_random import random_llm

__all__ = ["tiny_llm_folder"]


def tiny_llm_folder(family: Literal["t5", "opt"], folder: Path) -> Path:
    """A folder that `LLMDecoder.from_pretrained` reads; words are cut into letters and a few longer pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ("ha", "pp", "ily", "an")
    if family == "t5":
        entries = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, *string.digits, *pieces, "▁a", "▁m"]
        tokenizer = Tokenizer(models.Unigram([(entry, -float(len(entries))) for entry in entries], unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        entries = ["<unk>", "<pad>", "</s>", "Ġ", *string.ascii_lowercase, *string.digits, *pieces, "il", "Ġa", "Ġm"]
        merges = [("h", "a"), ("p", "p"), ("i", "l"), ("il", "y"), ("a", "n"), ("Ġ", "a"), ("Ġ", "m")]
        vocabulary = {entry: number for number, entry in enumerate(entries)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>", "unk_token": "<unk>"}
    random_llm(f"tiny-{family}", dtype=torch.float32).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
