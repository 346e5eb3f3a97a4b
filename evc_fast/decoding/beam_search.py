"""Batched beam search over any autoregressive model, with the semantics of transformers' `generate`.

The model is one function, `step(last_ids, state) -> (log_probs, state)`, and its memory is an opaque `state` that
`reorder(state, rows)` gathers when beams change parents. Rows are laid out item by item: row `b * beams + j` is beam j
of batch item b. The first step runs on one row an item, since all beams of an item are equal there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["BeamSearchOutput", "Reorder", "Step", "beam_search", "check_search_options"]

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
Reorder = Callable[[Any, Tensor], Any]
_DEAD = float("-inf")


class BeamSearchOutput(NamedTuple):
    """The best hypothesis of each batch item."""

    sequences: Tensor  # [B, T] int64, without the start token; EOS included, then `pad_id`
    scores: Tensor  # [B] float32, sum of log-probabilities / length ** length_penalty
    lengths: Tensor  # [B] int64, generated tokens, EOS included
    margins: Tensor  # [B] float32: scores (sums of log-probabilities) that are off by less than half do not change it


def check_search_options(
    num_beams: int, max_new_tokens: int, min_new_tokens: int = 0, length_penalty: float = 1.0
) -> None:
    """Raise ValueError naming the first search option that cannot be served."""
    for name, value, least in (
        ("num_beams", num_beams, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("min_new_tokens", min_new_tokens, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if max_new_tokens < min_new_tokens:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must not be below min_new_tokens ({min_new_tokens})")
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, int | float):
        raise ValueError(f"length_penalty must be a number, got {length_penalty!r}")
    if not abs(length_penalty) < float("inf"):
        raise ValueError(f"length_penalty must be finite, got {length_penalty!r}")


def beam_search(
    step: Step,
    state: Any,
    reorder: Reorder,
    *,
    batch_size: int,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    num_beams: int = 5,
    max_new_tokens: int = 32,
    min_new_tokens: int = 0,
    length_penalty: float = 1.0,
    stopping: Literal["heuristic", "exact"] = "heuristic",
    device: torch.device | str | None = None,
) -> BeamSearchOutput:
    """Search the best sequence of each batch item; a hypothesis scores sum(log p) / length ** length_penalty.

    Args:
        step: maps the last token of every row, int64 [rows], and the state to log-probabilities [rows, vocabulary]
            (float32 is what is summed) and the next state. rows = B at the first step, B * num_beams afterwards.
        state: whatever `step` needs of the past, for B rows at the start.
        reorder: `reorder(state, rows)` returns the state with row r taken from `rows[r]`, int64 [B * num_beams].
        batch_size: B. An empty batch gives empty sequences and calls nothing.
        bos_id, eos_id, pad_id: start token (not part of the result), end token, filler after the end.
        num_beams: beams an item; 1 is greedy search.
        max_new_tokens: most tokens generated, EOS included; a beam cut there counts as a hypothesis.
        min_new_tokens: EOS is not allowed among the first `min_new_tokens` tokens.
        length_penalty: exponent of the length; 0 ranks by the plain sum.
        stopping: an item is finished when no running beam can improve it. "heuristic" takes a beam's score at its
            present length as the best it can reach and waits for `num_beams` hypotheses (transformers'
            `early_stopping=False`); "exact" takes an upper bound over all lengths to come (log-probabilities never
            exceed 0) and compares it with the best hypothesis: the result of transformers' `early_stopping="never"`.

    Returns: BeamSearchOutput. Hypotheses of one item never depend on the other items.

    Raises:
        ValueError: an option out of range, or log-probabilities of the wrong shape.
        RuntimeError: an item ended without any hypothesis of finite score (NaN or all -inf log-probabilities).
    """
    check_search_options(num_beams, max_new_tokens, min_new_tokens, length_penalty)
    if stopping not in ("heuristic", "exact"):
        raise ValueError(f'stopping must be "heuristic" or "exact", got {stopping!r}')
    if batch_size < 0:
        raise ValueError(f"batch_size must not be negative, got {batch_size}")
    device = torch.device("cpu" if device is None else device)
    if batch_size == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        nothing = torch.zeros(0, device=device)
        return BeamSearchOutput(empty.new_zeros(0, 0), nothing, empty, nothing)

    b, beams = batch_size, num_beams
    # Running beams: running [B, beams, T], running_scores [B, beams]; `rows_per_item` is 1 until the first selection.
    running = torch.full((b, 1, max_new_tokens), pad_id, dtype=torch.int64, device=device)
    running_scores = torch.zeros(b, 1, device=device)
    # Hypotheses: the scores of the best `beams` (the heuristic needs the worst of them), the tokens of the best alone.
    finished_scores = torch.full((b, beams), _DEAD, device=device)
    best = running[:, 0].clone()
    best_score = finished_scores[:, 0].clone()
    best_length = torch.zeros(b, dtype=torch.int64, device=device)
    margins = torch.full((b,), float("inf"), device=device)
    unit = min(1.0, max_new_tokens**length_penalty)  # a hypothesis' score is off by at most its sum's error / unit
    done = torch.zeros(b, dtype=torch.bool, device=device)
    item_offset = torch.arange(b, device=device)[:, None]
    last_ids = torch.full((b,), bos_id, dtype=torch.int64, device=device)

    for t in range(max_new_tokens):
        last_step = t + 1 == max_new_tokens
        log_probs, state = step(last_ids, state)
        rows_per_item = running.shape[1]
        if log_probs.ndim != 2 or log_probs.shape[0] != b * rows_per_item:
            raise ValueError(
                f"step must return log-probabilities of shape [{b * rows_per_item}, vocabulary], "
                f"got {tuple(log_probs.shape)}"
            )
        vocabulary = log_probs.shape[1]
        candidates = log_probs.float().view(b, rows_per_item, vocabulary) + running_scores[:, :, None]
        if t < min_new_tokens:
            candidates[:, :, eos_id] = _DEAD

        # At most `beams` candidates end in EOS, so that `beams` can always go on; and one that is left behind.
        scores, tokens, parents = _best_candidates(candidates, 2 * beams + 1)

        # Hypotheses: only what ranks among the first `beams` may end (a beam cut at the last step ends too).
        ends = tokens == eos_id
        length = t + 1
        margin = _margin(scores, ends, beams, last_step)
        margins = torch.where(done, margins, torch.minimum(margins, margin))
        ending = torch.full_like(scores, _DEAD)
        ending[:, :beams] = scores[:, :beams] / length**length_penalty
        if not last_step:
            ending = ending.masked_fill(~ends, _DEAD)
        ending = ending.masked_fill(done[:, None], _DEAD)
        score, slot = ending.max(dim=1)
        better = score > best_score
        sequence = running.gather(1, parents.gather(1, slot[:, None])[:, :, None].expand(b, 1, max_new_tokens))[:, 0]
        sequence[:, t] = tokens.gather(1, slot[:, None])[:, 0]
        best = torch.where(better[:, None], sequence, best)
        best_score = torch.where(better, score, best_score)
        best_length = torch.where(better, length, best_length)
        finished_scores = torch.cat((finished_scores, ending), dim=1).topk(beams, dim=1).values
        if last_step:
            break

        # Running beams: the best `beams` candidates that do not end; they stay sorted, best first.
        running_scores, order = scores.masked_fill(ends, _DEAD).topk(beams, dim=1)
        parents, tokens = parents.gather(1, order), tokens.gather(1, order)
        running = running.gather(1, parents[:, :, None].expand(b, beams, max_new_tokens))
        running[:, :, t] = tokens

        # Nothing has ended before min_new_tokens, so there is no flag to fetch from the device until then.
        if length > min_new_tokens:
            if stopping == "heuristic" and beams > 1:
                slack = unit * (running_scores[:, 0] / length**length_penalty - finished_scores[:, -1]).abs()
                margins = torch.where(done | slack.isnan(), margins, torch.minimum(margins, slack))
            done |= _finished(running_scores[:, 0], best_score, finished_scores, length, max_new_tokens,
                              length_penalty, stopping)  # fmt: skip
            if bool(done.all()):
                break
        last_ids = tokens.reshape(-1)
        rows = (item_offset * rows_per_item + parents).reshape(-1)
        if not _is_identity(rows, b * rows_per_item):
            state = reorder(state, rows)

    if beams > 1:
        margins = torch.minimum(margins, unit * (finished_scores[:, 0] - finished_scores[:, 1]))
    if not bool(best_score.isfinite().all()):
        bad = (~best_score.isfinite()).nonzero()[:, 0].tolist()
        raise RuntimeError(
            f"no hypothesis of finite score for batch items {bad}: log-probabilities are NaN or all -inf"
        )
    return BeamSearchOutput(best[:, : int(best_length.max())], best_score, best_length, margins)


def _best_candidates(candidates: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of candidates [B, rows, V], best first: scores, token ids and parent rows, each [B, k].

    Where there are fewer than k (first step, small vocabulary) the rest are dead: score -inf, token 0 of row 0.
    """
    b, _, vocabulary = candidates.shape
    flat = candidates.view(b, -1)
    scores, index = flat.topk(min(k, flat.shape[1]), dim=1)
    missing = k - scores.shape[1]
    if missing > 0:
        scores = torch.cat((scores, scores.new_full((b, missing), _DEAD)), dim=1)
        index = torch.cat((index, index.new_zeros(b, missing)), dim=1)
    return scores, index % vocabulary, index // vocabulary


def _margin(scores: Tensor, ends: Tensor, beams: int, last_step: bool) -> Tensor:
    """Gap [B] between the nearest of the sorted candidates [B, 2 beams + 1] of which one is taken and the other not.

    `ends` tells which of them end. Between hypotheses that have ended the search chooses later.
    """
    ranked = _gap(scores, beams)
    if last_step:
        return ranked if beams == 1 else torch.full_like(ranked, float("inf"))
    ranked = ranked.masked_fill(~ends[:, beams - 1 : beams + 1].any(dim=1), float("inf"))  # may it end, or not?
    going_on = scores.masked_fill(ends, _DEAD).topk(beams + 1, dim=1).values
    return torch.minimum(ranked, _gap(going_on, beams))


def _gap(scores: Tensor, place: int) -> Tensor:
    """Between scores [B, n] at `place` - 1 and `place`, best first; infinite where there are not so many."""
    gap = scores[:, place - 1] - scores[:, place]
    return gap.masked_fill(scores[:, place] == _DEAD, float("inf"))


def _is_identity(rows: Tensor, num_rows: int) -> bool:
    """Whether gathering `rows` changes nothing. Only asked where the answer needs no wait for a device."""
    return rows.device.type == "cpu" and torch.equal(rows, torch.arange(num_rows))


def _finished(
    running_score: Tensor,
    best_score: Tensor,
    finished_scores: Tensor,
    length: int,
    max_new_tokens: int,
    length_penalty: float,
    stopping: str,
) -> Tensor:
    """Whether the best running beam [B] can no longer improve an item: bool [B]. See `stopping` of `beam_search`."""
    if finished_scores.shape[1] == 1:
        return finished_scores[:, 0] > _DEAD  # greedy search ends at its first EOS
    if stopping == "heuristic":
        return running_score / length**length_penalty <= finished_scores[:, -1]
    # A sum of log-probabilities only falls, and it is not above 0: dividing by the largest ** counts as the bound.
    reachable = max_new_tokens if length_penalty > 0 else length
    return running_score / reachable**length_penalty <= best_score
