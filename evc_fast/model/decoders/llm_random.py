"""LLMs in their true shape with random weights, for where no checkpoint is at hand.

Time and memory do not depend on the weights, so such a model measures like the trained one; its words mean nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

__all__ = ["RANDOM_SHAPES", "llm_on_meta", "random_llm"]

_OPT_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
_T5_IDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
# The published shapes of google/flan-t5-xl and facebook/opt-2.7b, and small ones of the same make for tests.
RANDOM_SHAPES: dict[str, T5Config | OPTConfig] = {
    "flan-t5-xl": T5Config(
        vocab_size=32_128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_T5_IDS,
    ),
    "opt-2.7b": OPTConfig(
        vocab_size=50_272, hidden_size=2560, ffn_dim=10_240, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=2048, **_OPT_IDS,
    ),
    "tiny-t5": T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_T5_IDS,
    ),
    "tiny-opt": OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, **_OPT_IDS,
    ),
}  # fmt: skip

_BLOCK = 1_048_573  # prime: no row length divides it, so no two rows of a tiled matrix are equal


def llm_on_meta(shape: str) -> PreTrainedModel:
    """The model of `shape` without memory, each weight that the published checkpoint holds apart a weight apart.

    Raises: ValueError on a name that is not in RANDOM_SHAPES.
    """
    if shape not in RANDOM_SHAPES:
        raise ValueError(f'no LLM shape "{shape}" is known, expected one of {", ".join(RANDOM_SHAPES)}')
    config = RANDOM_SHAPES[shape].__class__.from_dict(RANDOM_SHAPES[shape].to_dict())
    with torch.device("meta"):
        if isinstance(config, OPTConfig):
            return OPTForCausalLM(config)
        # transformers 5 ties T5's output map to the embedding whatever the config says, and unties it again when a
        # checkpoint holds both, as T5 v1.1 and FLAN do: they drop the scaling of the decoder's output with it.
        config.scale_decoder_outputs = False
        llm = T5ForConditionalGeneration(config)
        llm.lm_head.weight = nn.Parameter(torch.empty_like(llm.lm_head.weight))
        del llm.all_tied_weights_keys["lm_head.weight"]
        return llm


def random_llm(
    shape: str, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> PreTrainedModel:
    """Build `shape` with random weights of a trained model's scale, each byte written once, in evaluation mode.

    Args:
        shape: "flan-t5-xl", "opt-2.7b", "tiny-t5" or "tiny-opt".
        dtype: of all weights. FLAN-T5-XL takes 5.7 GB in bfloat16.
        device: where the weights are made; no other copy exists on the way.
        seed: the same seed gives the same weights.
    """
    llm = llm_on_meta(shape).to(dtype).to_empty(device=device)
    llm.tie_weights(recompute_mapping=False)  # to_empty gave each name a memory of its own
    llm.config.dtype = dtype
    if next(llm.buffers(), None) is not None:
        raise RuntimeError(f"{type(llm).__name__} has buffers, which stay uninitialised here")

    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)).to(device)
    filled: set[int] = set()
    with torch.no_grad():
        for name, module in llm.named_modules():
            std = _weight_std(name, module, llm.config)
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in filled:
                    continue
                if parameter_name == "bias":
                    parameter.zero_()
                elif std is None:
                    parameter.fill_(1.0)  # a norm's scale
                else:
                    _tile(parameter, (block * std).to(dtype), offset=7919 * len(filled) % _BLOCK)
                filled.add(id(parameter))
    return llm.eval()


def _weight_std(name: str, module: nn.Module, config: T5Config | OPTConfig) -> float | None:
    """Standard deviation that the family starts a module's weight with; None for a norm's scale, which is 1."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return None
    if isinstance(config, OPTConfig):
        return config.init_std
    if isinstance(module, nn.Embedding):
        return config.d_model**-0.5 if name.endswith("relative_attention_bias") else 1.0
    std = module.in_features**-0.5
    return std * config.d_kv**-0.5 if name.endswith(".q") else std  # T5 does not scale q k^T


def _tile(parameter: Tensor, block: Tensor, offset: int) -> None:
    """Write `block`, from `offset` on, over and over until `parameter` is full."""
    flat = parameter.view(-1)
    start = 0
    while start < flat.numel():
        count = min(flat.numel() - start, block.numel() - offset)
        flat[start : start + count] = block[offset : offset + count]
        start, offset = start + count, 0
