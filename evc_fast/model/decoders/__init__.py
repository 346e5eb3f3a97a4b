"""The decoders of Table 2: what reads the Q-former's tokens and writes the caption.

Every decoder is an nn.Module with
    input_dim                        d_out, the width of the tokens [B, N_q, input_dim] that it reads
    forward(tokens, target_ids)      teacher forcing: logits [B, T, vocabulary] of target_ids [B, T]
    generate(tokens, *, num_beams=5, max_new_tokens=32, min_new_tokens=0, length_penalty=1.0)
                                     caption ids [B, T], without the start token, padded after EOS
    encode(captions), decode(ids)    text to target ids and ids to text, cut to 15 words; has_tokenizer is False where
                                     ids are printed instead, "<17> <3>"
    pad_id, eos_id, device, dtype    random_weights is True where no checkpoint was read
    save_pretrained, from_pretrained

What imports transformers is imported on first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from evc_fast.model.decoders.base import SmallDecoder
    from evc_fast.model.decoders.llm import LLMDecoder, LoraOptions
    from evc_fast.model.decoders.lstm import LSTMDecoder, LSTMDecoderConfig
    from evc_fast.model.decoders.transformer import TransformerDecoder, TransformerDecoderConfig
    from evc_fast.model.decoders.vocabulary import Vocabulary

__all__ = [
    "LLMDecoder",
    "LSTMDecoder",
    "LSTMDecoderConfig",
    "LoraOptions",
    "TransformerDecoder",
    "TransformerDecoderConfig",
    "Vocabulary",
    "build_decoder",
    "load_decoder",
]

_HOME = {
    "LLMDecoder": "llm",
    "LSTMDecoder": "lstm",
    "LSTMDecoderConfig": "lstm",
    "LoraOptions": "llm",
    "TransformerDecoder": "transformer",
    "TransformerDecoderConfig": "transformer",
    "Vocabulary": "vocabulary",
}
_LLM_NAMES = ("flan-t5-xl", "opt-2.7b", "tiny-t5", "tiny-opt")
_SMALL_NAMES = ("lstm", "transformer")


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def build_decoder(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> LLMDecoder | SmallDecoder:
    """A decoder by its name in Table 2.

    Args:
        name: "flan-t5-xl" or "opt-2.7b" ("tiny-t5", "tiny-opt": their make in a small shape), "lstm" or "transformer".
        checkpoint: for an LLM, the name or folder of any checkpoint of its family (T5, OPT), or a saved decoder of it;
            for a small decoder, what its `save_pretrained` wrote. None: the true shape with random weights.
        vocabulary: words of a new small decoder; None: a placeholder of the paper's size, whose words are ids.
        dtype: of the weights; None: bfloat16 for an LLM and float32 for a small decoder, or what was saved.
        device: where it runs.
        options: an LLM's `lora` and `prompt`, and `seed` of random weights; fields of a new small decoder's config.

    Raises: ValueError on an unknown name, a vocabulary where none is taken, or a checkpoint of the other family.
    """
    if name in _LLM_NAMES:
        from evc_fast.model.decoders.llm import LLMDecoder

        if vocabulary is not None:
            raise ValueError(f'vocabulary must be None for "{name}", which has its own')
        if checkpoint is not None:
            family = "t5" if "t5" in name else "opt"
            return LLMDecoder.from_pretrained(checkpoint, dtype=dtype, device=device, family=family, **options)
        return LLMDecoder.random(name, dtype=dtype or torch.bfloat16, device=device, **options)
    if name not in _SMALL_NAMES:
        raise ValueError(f'name must be one of {", ".join((*_LLM_NAMES, *_SMALL_NAMES))}, got "{name}"')

    from evc_fast.model.decoders.vocabulary import Vocabulary

    module = importlib.import_module(f"{__name__}.{name}")
    decoder_class = module.LSTMDecoder if name == "lstm" else module.TransformerDecoder
    if checkpoint is not None:
        if vocabulary is not None or options:
            raise ValueError("vocabulary and options must not be given with a checkpoint, which has its own")
        return decoder_class.from_pretrained(checkpoint, dtype=dtype, device=device)
    seed = options.pop("seed", None)
    config = decoder_class.config_class.from_dict(options)
    vocabulary = Vocabulary.placeholder() if vocabulary is None else vocabulary
    with torch.random.fork_rng(devices=[], enabled=seed is not None):  # the caller's numbers go on as they were
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        decoder = decoder_class(config, vocabulary)
    return decoder.to(device=device, dtype=dtype).eval()


def load_decoder(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LLMDecoder | SmallDecoder:
    """Read a decoder of any kind that its `save_pretrained` wrote.

    Raises: FileNotFoundError where a file is missing, ValueError where one is damaged or holds something else.
    """
    from evc_fast.model.decoders.base import read_config

    kind = read_config(folder)["decoder"]
    classes = {"llm": "LLMDecoder", "lstm": "LSTMDecoder", "transformer": "TransformerDecoder"}
    if kind not in classes:
        raise ValueError(f'{folder} holds a decoder of unknown kind "{kind}", expected one of {", ".join(classes)}')
    decoder_class = getattr(importlib.import_module(__name__), classes[kind])
    return decoder_class.from_pretrained(folder, dtype=dtype, device=device)
