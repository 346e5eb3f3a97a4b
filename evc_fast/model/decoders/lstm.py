"""LSTM decoder with additive attention over the tokens (Table 2 of the paper, sizes ours)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evc_fast.model.decoders.base import SmallDecoder, SmallDecoderConfig, check_targets, check_tokens
from evc_fast.model.decoders.vocabulary import Vocabulary

__all__ = ["LSTMDecoder", "LSTMDecoderConfig"]


@dataclasses.dataclass(frozen=True)
class LSTMDecoderConfig(SmallDecoderConfig):
    """Sizes of the LSTM decoder."""

    embedding_dim: int = 300
    hidden_dim: int = 512
    attention_dim: int = 512


class _State(NamedTuple):
    tokens: Tensor  # [B, N_q, d], what attention reads: shared by an item's beams, never reordered
    keys: Tensor  # [B, N_q, attention_dim], their projection
    hidden: Tensor  # [rows, hidden_dim]
    cell: Tensor  # [rows, hidden_dim]


class LSTMDecoder(SmallDecoder):
    """One LSTM layer that reads [word embedding ; attended tokens] and starts from the tokens' mean.

    Args:
        config: sizes.
        vocabulary: words; a placeholder vocabulary gives word ids instead of text.
    """

    kind = "lstm"
    config_class = LSTMDecoderConfig

    def __init__(self, config: LSTMDecoderConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        d, hidden = config.input_dim, config.hidden_dim
        self.embedding = nn.Embedding(len(vocabulary), config.embedding_dim, padding_idx=vocabulary.pad_id)
        self.initial = nn.Linear(d, 2 * hidden)
        self.attention_key = nn.Linear(d, config.attention_dim)
        self.attention_query = nn.Linear(hidden, config.attention_dim, bias=False)
        self.attention_score = nn.Linear(config.attention_dim, 1, bias=False)
        self.cell = nn.LSTMCell(config.embedding_dim + d, hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(hidden, len(vocabulary))

    def forward(self, tokens: Tensor, target_ids: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of target_ids [B, T], each given tokens [B, N_q, input_dim] and the words before.

        Raises: ValueError on wrong shapes, types, devices or ids.
        """
        check_tokens(tokens, self.input_dim, self.device)
        check_targets(target_ids, tokens, len(self.vocabulary))
        state = self._start(tokens.to(self.dtype), target_ids.shape[1])
        hidden = []
        for last_ids in self._shift_right(target_ids).unbind(dim=1):
            output, state = self._step(last_ids, state)
            hidden.append(output)
        return self.output(torch.stack(hidden, dim=1))

    def _start(self, tokens: Tensor, max_new_tokens: int) -> _State:
        hidden, cell = torch.tanh(self.initial(tokens.mean(dim=1))).chunk(2, dim=-1)
        return _State(tokens, self.attention_key(tokens), hidden, cell)

    def _step(self, last_ids: Tensor, state: _State) -> tuple[Tensor, _State]:
        # Beams of an item share its tokens: [B, beams, 1, A] meets [B, 1, N_q, A].
        batch = state.tokens.shape[0]
        query = self.attention_query(state.hidden).unflatten(0, (batch, len(last_ids) // max(batch, 1)))
        energy = self.attention_score(torch.tanh(query[:, :, None] + state.keys[:, None])).squeeze(-1)
        context = (energy.softmax(dim=-1) @ state.tokens).flatten(0, 1)
        word = self.dropout(self.embedding(last_ids))
        hidden, cell = self.cell(torch.cat((word, context), dim=-1), (state.hidden, state.cell))
        return self.dropout(hidden), state._replace(hidden=hidden, cell=cell)

    def _reorder(self, state: _State, rows: Tensor) -> _State:
        return state._replace(hidden=state.hidden.index_select(0, rows), cell=state.cell.index_select(0, rows))
