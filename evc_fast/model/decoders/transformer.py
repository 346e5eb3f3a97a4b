"""Transformer decoder (Table 2 of the paper, sizes ours): pre-norm, sinusoidal positions, cached keys and values."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evc_fast.model.decoders.base import SmallDecoder, SmallDecoderConfig, check_targets, check_tokens
from evc_fast.model.decoders.vocabulary import Vocabulary

__all__ = ["TransformerDecoder", "TransformerDecoderConfig"]


@dataclasses.dataclass(frozen=True)
class TransformerDecoderConfig(SmallDecoderConfig):
    """Sizes of the Transformer decoder; its width is `input_dim`."""

    num_layers: int = 3
    num_heads: int = 4
    ffn_dim: int = 1200  # 4 d

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_dim % self.num_heads:
            raise ValueError(f"input_dim ({self.input_dim}) must be divisible by num_heads ({self.num_heads})")


class _State(NamedTuple):
    cross: list[tuple[Tensor, Tensor]]  # a layer's keys and values of the tokens, each [B, H, N_q, d/H], computed once
    past: list[Tensor | None]  # a layer's keys and values of the words so far, [2, rows, H, t, d/H]; None before any
    positions: Tensor  # [max_new_tokens, d]


class TransformerDecoder(SmallDecoder):
    """Causal self-attention, cross-attention to the tokens and an FFN (GELU) a layer, each after its LayerNorm.

    Args:
        config: sizes.
        vocabulary: words; a placeholder vocabulary gives word ids instead of text.
    """

    kind = "transformer"
    config_class = TransformerDecoderConfig

    def __init__(self, config: TransformerDecoderConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        d = config.input_dim
        self.embedding = nn.Embedding(len(vocabulary), d, padding_idx=vocabulary.pad_id)
        nn.init.normal_(self.embedding.weight, std=d**-0.5)  # of unit variance once scaled by sqrt(d)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(d)
        self.output = nn.Linear(d, len(vocabulary))

    def forward(self, tokens: Tensor, target_ids: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of target_ids [B, T], each given tokens [B, N_q, input_dim] and the words before.

        Raises: ValueError on wrong shapes, types, devices or ids.
        """
        check_tokens(tokens, self.input_dim, self.device)
        check_targets(target_ids, tokens, len(self.vocabulary))
        tokens = tokens.to(self.dtype)
        x = self._embed(self._shift_right(target_ids), _sinusoids(target_ids.shape[1], tokens))
        for layer in self.layers:
            x = x + layer.self_attention(x)
            x = x + layer.cross_attention(x, *layer.cross_keys_values(tokens))
            x = x + layer.ffn(x)
        return self.output(self.norm(x))

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) * math.sqrt(self.input_dim) + positions)

    def _start(self, tokens: Tensor, max_new_tokens: int) -> _State:
        cross = [layer.cross_keys_values(tokens) for layer in self.layers]
        return _State(cross, [None] * len(cross), _sinusoids(max_new_tokens, tokens))

    def _step(self, last_ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        batch = state.cross[0][0].shape[0]
        t = 0 if state.past[0] is None else state.past[0].shape[3]
        # [B, beams, d]: cross-attention takes an item's beams for a sequence of queries, so its keys are not copied.
        x = self._embed(last_ids, state.positions[t]).unflatten(0, (batch, -1))
        past = []
        for layer, layer_past, cross in zip(self.layers, state.past, state.cross, strict=True):
            attended, keys_values = layer.self_attention_step(x, layer_past)
            past.append(keys_values)
            x = x + attended
            x = x + layer.cross_attention(x, *cross)
            x = x + layer.ffn(x)
        return self.norm(x).flatten(0, 1), state._replace(past=past)

    def _reorder(self, state: _State, rows: Tensor) -> _State:
        return state._replace(past=[layer_past.index_select(1, rows) for layer_past in state.past])


class _Layer(nn.Module):
    """One decoder layer; every method takes its residual input and returns what is added to it."""

    def __init__(self, config: TransformerDecoderConfig) -> None:
        super().__init__()
        d = config.input_dim
        self.num_heads = config.num_heads
        self.self_norm, self.cross_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_qkv, self.self_output = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.cross_query, self.cross_kv, self.cross_output = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.ffn_in, self.ffn_out = nn.Linear(d, config.ffn_dim), nn.Linear(config.ffn_dim, d)
        self.dropout = nn.Dropout(config.dropout)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, H, L, d/H]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def self_attention(self, x: Tensor) -> Tensor:
        """x [B, T, d], causal."""
        query, key, value = map(self._heads, self.self_qkv(self.self_norm(x)).chunk(3, dim=-1))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dropout(self.self_output(context.transpose(1, 2).flatten(2)))

    def self_attention_step(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """One new word a row: x [B, beams, d], past [2, rows, H, t, d/H] -> [B, beams, d], [2, rows, H, t + 1, d/H]."""
        rows = x.shape[0] * x.shape[1]
        # [B, beams, 3 d] -> [3, rows, H, 1, d/H]
        qkv = self.self_qkv(self.self_norm(x)).reshape(rows, 3, self.num_heads, 1, -1).transpose(0, 1)
        keys_values = qkv[1:] if past is None else torch.cat((past, qkv[1:]), dim=3)
        context = F.scaled_dot_product_attention(qkv[0], keys_values[0], keys_values[1])
        return self.self_output(context.reshape(x.shape)), keys_values

    def cross_keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [B, N_q, d], each [B, H, N_q, d/H]."""
        key, value = self.cross_kv(tokens).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def cross_attention(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """x [B, T, d] or [B, beams, d]."""
        context = F.scaled_dot_product_attention(self._heads(self.cross_query(self.cross_norm(x))), key, value)
        return self.dropout(self.cross_output(context.transpose(1, 2).flatten(2)))

    def ffn(self, x: Tensor) -> Tensor:
        return self.dropout(self.ffn_out(self.dropout(F.gelu(self.ffn_in(self.ffn_norm(x))))))


def _sinusoids(length: int, like: Tensor) -> Tensor:
    """Positions [length, d]: sine at even and cosine at odd features, wavelengths 2 pi .. 10000 * 2 pi."""
    d = like.shape[-1]
    position = torch.arange(length, dtype=torch.float32, device=like.device)[:, None]
    frequency = torch.exp(torch.arange(0, d, 2, dtype=torch.float32, device=like.device) * (-math.log(10_000.0) / d))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d].to(like.dtype)
