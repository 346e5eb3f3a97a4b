"""Beam search against exhaustive search, greedy search and transformers' own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from evc_fast.decoding import beam_search, check_search_options

PAD, BOS, EOS = 0, 1, 2


class TableModel:
    """Log-probabilities from a random table an item, looked up by the whole prefix: nothing may be mixed up."""

    def __init__(self, seed: int, batch: int, vocabulary: int, max_len: int, sharpness: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.batch, self.calls = vocabulary, batch, 0
        self.tables = [
            torch.log_softmax(sharpness * torch.randn(batch, vocabulary**t, vocabulary, generator=generator), dim=-1)
            for t in range(max_len)
        ]

    def start(self, items: list[int] | None = None) -> tuple[Tensor, Tensor]:
        items = list(range(self.batch)) if items is None else items
        return torch.tensor(items), torch.zeros(len(items), 0, dtype=torch.int64)

    def step(self, last_ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.calls += 1
        item, prefix = state
        if self.calls == 1:
            assert (last_ids == BOS).all()
        else:
            prefix = torch.cat((prefix, last_ids[:, None]), dim=1)
        index = torch.zeros_like(item)
        for column in prefix.unbind(1):
            index = index * self.vocabulary + column
        return self.tables[prefix.shape[1]][item, index], (item, prefix)

    @staticmethod
    def reorder(state: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        return state[0][rows], state[1][rows]

    def score(self, item: int, sequence: tuple[int, ...], length_penalty: float) -> float:
        total, index = torch.zeros(()), 0
        for t, token in enumerate(sequence):
            total = total + self.tables[t][item, index, token]
            index = index * self.vocabulary + token
        return float(total) / len(sequence) ** length_penalty

    def search(self, items: list[int] | None = None, **options):
        self.calls = 0
        size = self.batch if items is None else len(items)
        return beam_search(
            self.step, self.start(items), self.reorder, batch_size=size, bos_id=BOS, eos_id=EOS, pad_id=PAD, **options
        )


def all_sequences(vocabulary: int, max_len: int, min_new_tokens: int):
    others = [token for token in range(vocabulary) if token != EOS]
    for length in range(1, max_len + 1):
        for words in itertools.product(others, repeat=length - 1):
            if length > min_new_tokens:
                yield (*words, EOS)
            if length == max_len:
                yield from ((*words, word) for word in others)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 0.6, 2.0, -0.5])
@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_a_wide_beam_finds_what_exhaustive_search_finds(length_penalty, min_new_tokens):
    vocabulary, max_len = 4, 4
    for seed in range(4):
        model = TableModel(seed, 3, vocabulary, max_len)
        found = model.search(
            num_beams=vocabulary ** (max_len - 1),
            max_new_tokens=max_len,
            min_new_tokens=min_new_tokens,
            length_penalty=length_penalty,
            stopping="exact",
        )
        for item in range(3):
            best = max(
                all_sequences(vocabulary, max_len, min_new_tokens),
                key=lambda sequence: model.score(item, sequence, length_penalty),
            )
            assert tuple(found.sequences[item, : found.lengths[item]].tolist()) == best
            assert (found.sequences[item, found.lengths[item] :] == PAD).all()
            assert found.scores[item].item() == pytest.approx(model.score(item, best, length_penalty), rel=1e-5)


def test_one_beam_is_greedy_search():
    for seed, stopping in itertools.product(range(5), ("heuristic", "exact")):
        model = TableModel(seed, 4, 6, 5)
        found = model.search(num_beams=1, max_new_tokens=5, stopping=stopping)
        for item in range(4):
            index, greedy = 0, []
            for t in range(5):
                greedy.append(int(model.tables[t][item, index].argmax()))
                index = index * 6 + greedy[-1]
                if greedy[-1] == EOS:
                    break
            assert found.sequences[item, : found.lengths[item]].tolist() == greedy


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_scores_that_are_off_by_less_than_half_the_margin_change_nothing(num_beams, length_penalty):
    options = {"num_beams": num_beams, "max_new_tokens": 5, "length_penalty": length_penalty}
    model = TableModel(7, 40, 6, 5)
    found = model.search(**options)
    assert (found.margins > 0).all()
    assert found.margins.median() < 1
    tables, generator = model.tables, torch.Generator().manual_seed(0)
    for _ in range(5):
        model.tables = []
        for table in tables:
            # A sum of five is off by at most 0.49 of its item's margin.
            noise = (2 * torch.rand(table.shape, generator=generator) - 1) * 0.49 / 5
            model.tables.append(table + noise * found.margins.view(-1, *[1] * (table.dim() - 1)))
        assert torch.equal(model.search(**options).sequences, found.sequences)


def test_a_margin_of_nothing_is_a_tie():
    model = TableModel(7, 3, 6, 5)
    model.tables[0][1, 0] = model.tables[0][1, 0, 0]  # all first words of the second item are alike
    margins = model.search(num_beams=2, max_new_tokens=5).margins
    assert margins[1] == 0
    assert margins[0] > 0
    assert margins[2] > 0


@pytest.mark.parametrize("stopping", ["heuristic", "exact"])
def test_items_do_not_depend_on_their_batch_and_runs_repeat_bit_for_bit(stopping):
    model = TableModel(7, 5, 7, 5)
    options = {"num_beams": 3, "max_new_tokens": 5, "length_penalty": 1.3, "stopping": stopping}
    together, again = model.search(**options), model.search(**options)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    assert len(set(together.lengths.tolist())) > 1, "the case must hold items that end at different steps"
    for item in range(5):
        alone = model.search([item], **options)
        length = alone.lengths[0]
        assert length == together.lengths[item]
        assert torch.equal(alone.sequences[0], together.sequences[item, :length])
        assert torch.equal(alone.scores[0], together.scores[item])


def test_exact_stopping_loses_nothing_and_saves_steps():
    saved = 0
    for seed in range(10):
        model = TableModel(seed, 1, 5, 6, sharpness=6.0)
        found = model.search(num_beams=2, max_new_tokens=6, length_penalty=0.0, stopping="exact")
        saved += 6 - model.calls
        # The same search that may not stop: a second item that never ends keeps the loop running to its last step.
        endless = TableModel(seed, 2, 5, 6, sharpness=6.0)
        for t, table in enumerate(model.tables):
            endless.tables[t][0] = table[0]
            endless.tables[t][1, :, EOS] = -1e4
        whole = endless.search(num_beams=2, max_new_tokens=6, length_penalty=0.0, stopping="exact")
        assert endless.calls == 6
        assert torch.equal(whole.scores[0], found.scores[0])
    assert saved > 0


def test_min_equal_to_max_forces_the_length():
    model = TableModel(0, 2, 5, 6)
    for table in model.tables:
        table[:, :, EOS] = 0.0
    found = model.search(num_beams=3, max_new_tokens=6, min_new_tokens=6)
    assert found.sequences.shape == (2, 6)
    assert (found.sequences != EOS).all()
    assert found.lengths.tolist() == [6, 6]


def test_all_beams_ending_at_once_ends_the_search():
    model = TableModel(0, 2, 5, 6)
    for table in model.tables:
        table[:] = -30.0
        table[:, :, EOS] = 0.0
    found = model.search(num_beams=2, max_new_tokens=6)
    assert found.lengths.tolist() == [1, 1]
    assert model.calls <= 2


def test_more_beams_than_words():
    model = TableModel(1, 2, 3, 3)
    found = model.search(num_beams=30, max_new_tokens=3, stopping="exact")
    for item in range(2):
        best = max(all_sequences(3, 3, 0), key=lambda sequence: model.score(item, sequence, 1.0))
        assert tuple(found.sequences[item, : found.lengths[item]].tolist()) == best


def test_an_empty_batch_calls_nothing():
    model = TableModel(0, 1, 4, 3)
    found = model.search([], num_beams=2, max_new_tokens=3)
    assert found.sequences.shape == (0, 0) and found.scores.shape == (0,) and model.calls == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": True}, "num_beams"),
        ({"num_beams": 2.0}, "num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "must not be below"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": "1"}, "length_penalty"),
        ({"stopping": "never"}, "stopping"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(options, message):
    model = TableModel(0, 1, 4, 3)
    with pytest.raises(ValueError, match=message):
        model.search(**{"num_beams": 2, "max_new_tokens": 3, **options})
    assert model.calls == 0


def test_the_options_check_accepts_what_serves():
    assert check_search_options(5, 15, 15, 1.0) is None


def test_a_step_of_the_wrong_shape_and_nan_are_refused():
    with pytest.raises(ValueError, match=r"step must return .*\[2, vocabulary\]"):
        beam_search(
            lambda ids, state: (torch.zeros(3, 5), state), None, lambda state, rows: state,
            batch_size=2, bos_id=BOS, eos_id=EOS, pad_id=PAD,
        )  # fmt: skip
    model = TableModel(0, 2, 4, 3)
    for table in model.tables:
        table[1] = float("nan")
    with pytest.raises(RuntimeError, match=r"batch items \[1\]"):
        model.search(num_beams=2, max_new_tokens=3)


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("end_bias", [0.0, 2.5], ids=["late-eos", "early-eos"])
def test_it_is_transformers_beam_search(early_stopping, end_bias):
    """Sequences and scores of `generate` on a tiny T5, for several weights, widths and penalties."""
    from evc_fast.model.decoders.llm_random import random_llm

    lengths = set()
    for seed, (beams, penalty, least) in enumerate([(5, 1.0, 0), (4, 0.5, 2), (3, 2.0, 0), (5, 1.0, 8), (1, 1.0, 0)]):
        llm = random_llm("tiny-t5", dtype=torch.float32, seed=seed)
        llm.lm_head.weight.data *= 2.0
        inputs = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            encoded = llm.encoder(inputs_embeds=inputs).last_hidden_state

        def step(last_ids, state, llm=llm):
            hidden, prefix = state
            prefix = torch.cat((prefix, last_ids[:, None]), dim=1)
            output = llm.decoder(input_ids=prefix, encoder_hidden_states=hidden, use_cache=False).last_hidden_state
            logits = llm.lm_head(output[:, -1])
            logits[:, 1] += end_bias
            return torch.log_softmax(logits, dim=-1), (hidden, prefix)

        with torch.no_grad():
            ours = beam_search(
                step, (encoded, torch.zeros(3, 0, dtype=torch.int64)), TableModel.reorder,
                batch_size=3, bos_id=0, eos_id=1, pad_id=0, num_beams=beams, max_new_tokens=8, min_new_tokens=least,
                length_penalty=penalty, stopping="exact" if early_stopping == "never" else "heuristic",
            )  # fmt: skip
        head = llm.lm_head
        head.register_forward_hook(lambda module, args, out: out + end_bias * torch.eye(out.shape[-1])[1])
        theirs = llm.generate(
            inputs_embeds=inputs, num_beams=beams, max_new_tokens=8, min_new_tokens=least, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
            **({"length_penalty": penalty, "early_stopping": early_stopping} if beams > 1 else {}),
        )  # fmt: skip
        sequences = theirs.sequences[:, 1:]
        assert sequences.shape == ours.sequences.shape
        for item in range(3):
            length = ours.lengths[item]
            assert sequences[item, :length].tolist() == ours.sequences[item, :length].tolist()
            assert (ours.sequences[item, length:] == 0).all()
        if beams > 1:
            torch.testing.assert_close(ours.scores, theirs.sequences_scores, rtol=1e-5, atol=1e-6)
        lengths.update(ours.lengths.tolist())
    if end_bias:
        assert min(lengths) < 6, "the case must hold captions that end early"
