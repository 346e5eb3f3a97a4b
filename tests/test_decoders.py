"""The decoders of Table 2: teacher forcing, generation, gradients, LoRA, files and errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from evc_fast.model.decoders import (
    LLMDecoder,
    LoraOptions,
    LSTMDecoder,
    LSTMDecoderConfig,
    TransformerDecoder,
    TransformerDecoderConfig,
    Vocabulary,
    build_decoder,
    load_decoder,
)
from evc_fast.model.decoders.llm_random import llm_on_meta, random_llm

NAMES = ["lstm", "transformer", "tiny-t5", "tiny-opt"]
LLM_NAMES = NAMES[2:]
SMALL_NAMES = NAMES[:2]
# Added to EOS's logit, so that the captions of random weights end, at different lengths.
END_BIAS = {"lstm": 1.2, "transformer": 8.0, "tiny-t5": 2.5, "tiny-opt": 2.5}
WORDS = [f"w{index}" for index in range(26)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make(name: str, seed: int = 0, **options):
    """A small decoder in float32 whose captions end at different lengths."""
    if name in LLM_NAMES:
        decoder = build_decoder(name, dtype=torch.float32, seed=seed, **options)
        head = decoder.base.get_output_embeddings()
        if name == "tiny-opt":  # OPT's first weights are too small for tokens to count at this width
            with torch.no_grad():
                for parameter in decoder.base.parameters():
                    parameter *= 8.0 if parameter.ndim == 2 and not parameter.requires_grad else 1.0
        towards_end = END_BIAS[name] * torch.eye(head.out_features)[decoder.eos_id]
        head.register_forward_hook(lambda module, args, logits: logits + towards_end)
        return decoder
    if name == "lstm":
        options = {"input_dim": 32, "embedding_dim": 24, "hidden_dim": 40, "attention_dim": 28, **options}
    else:
        options = {"input_dim": 32, "ffn_dim": 64, "num_layers": 2, **options}
    decoder = build_decoder(name, vocabulary=Vocabulary(WORDS), seed=seed, **options)
    with torch.no_grad():
        decoder.output.weight *= 6.0
        decoder.output.bias[decoder.eos_id] += END_BIAS[name]
    return decoder


def tokens_for(decoder, batch: int = 3, num: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, num, decoder.input_dim, generator=torch.Generator().manual_seed(seed))


def log_probs_of(decoder, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each caption from teacher-forced logits, and its length with EOS."""
    with torch.no_grad():
        log_probs = torch.log_softmax(decoder(tokens, ids).float(), dim=-1)
    is_eos = ids == decoder.eos_id
    kept = is_eos.cumsum(1) - is_eos.long() == 0
    return (log_probs.gather(2, ids[:, :, None])[:, :, 0] * kept).sum(1), kept.sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_follows_the_teacher_forced_logits(name):
    decoder = make(name)
    tokens = tokens_for(decoder)
    ids = torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(7):
        with torch.no_grad():
            logits = decoder(tokens, torch.cat((ids, ids.new_zeros(3, 1)), dim=1))
        if name in SMALL_NAMES:
            logits[..., [0, 1, 3]] = float("-inf")  # <pad>, <bos> and <unk> are never generated
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    generated = decoder.generate(tokens, num_beams=1, max_new_tokens=7)
    for row, expected in zip(generated.tolist(), ids.tolist(), strict=True):
        stop = expected.index(decoder.eos_id) + 1 if decoder.eos_id in expected else 7
        assert row[:stop] == expected[:stop]
        assert all(index == decoder.pad_id for index in row[stop:])


@pytest.mark.parametrize("name", NAMES)
def test_beams_score_at_least_as_well_as_greedy_search_and_pad_after_eos(name):
    lengths = set()
    for seed in range(2):
        decoder = make(name, seed)
        tokens = tokens_for(decoder, batch=8, seed=seed)
        found = {}
        for beams in (1, 8):
            ids = decoder.generate(tokens, num_beams=beams, max_new_tokens=6, length_penalty=1.0)
            assert ids.dtype == torch.int64 and ids.shape[0] == 8 and ids.shape[1] <= 6
            total, length = log_probs_of(decoder, tokens, ids)
            found[beams] = total / length
            for row, end in zip(ids.tolist(), length.tolist(), strict=True):
                assert all(index == decoder.pad_id for index in row[end:])
            lengths.update(length.tolist())
        assert (found[8] >= found[1] - 1e-5).all()
    assert len(lengths) > 1, "the case must hold captions of different lengths"


@pytest.mark.parametrize("name", NAMES)
def test_exactly_fifteen_tokens_can_be_forced(name):
    decoder = make(name)
    ids = decoder.generate(tokens_for(decoder), num_beams=5, max_new_tokens=15, min_new_tokens=15)
    assert ids.shape == (3, 15)
    assert (ids != decoder.eos_id).all()


@pytest.mark.parametrize("name", NAMES)
def test_generation_neither_depends_on_the_training_flag_nor_changes_it(name):
    decoder = make(name).train()
    tokens = tokens_for(decoder)
    first = decoder.generate(tokens, max_new_tokens=6)
    assert decoder.training
    assert torch.equal(first, decoder.eval().generate(tokens, max_new_tokens=6))
    assert not decoder.training
    assert decoder.generate(tokens[:0]).shape == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_word_do_not_see_it_or_what_follows(name):
    decoder = make(name)
    tokens = tokens_for(decoder)
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 3:] = 4
    with torch.no_grad():
        a, b = decoder(tokens, ids), decoder(tokens, other)
    assert a.shape[:2] == (3, 6)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_steps_with_beams_equal_the_teacher_forced_logits(name):
    """Incremental decoding through caches, rows [B * beams] and a reordering, against `forward` of each row."""
    decoder = make(name)
    tokens = tokens_for(decoder, batch=2)
    generator = torch.Generator().manual_seed(5)
    prefix = torch.full((2, 1), decoder.vocabulary.bos_id)
    state = decoder._start(tokens, 6)
    with torch.no_grad():
        for _ in range(6):
            hidden, state = decoder._step(prefix[:, -1], state)
            beams = len(prefix) // 2
            rows = tokens.repeat_interleave(beams, 0)
            targets = torch.cat((prefix[:, 1:], prefix.new_zeros(len(prefix), 1)), dim=1)
            torch.testing.assert_close(decoder.output(hidden), decoder(rows, targets)[:, -1], rtol=1e-4, atol=1e-4)
            order = torch.randint(0, beams, (2, 3), generator=generator) + torch.tensor([[0], [beams]])
            words = torch.randint(4, 30, (6, 1), generator=generator)
            state, prefix = decoder._reorder(state, order.view(-1)), torch.cat((prefix[order.view(-1)], words), dim=1)


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_small_decoders_learn_a_caption_of_each_video(name):
    captions = ["w1 w2 w3 w4", "w5 w2 w9", "w7"]
    decoder = make(name, dropout=0.0).train()
    tokens = tokens_for(decoder).requires_grad_()
    targets = decoder.encode(captions)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            decoder(tokens, targets).flatten(0, 1), targets.flatten(), ignore_index=decoder.pad_id
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert tokens.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert decoder.decode(decoder.generate(tokens)) == captions


@pytest.mark.parametrize("name", LLM_NAMES)
def test_gradients_reach_tokens_and_lora_and_the_llm_stays_frozen(name):
    decoder = make(name).train()
    trainable = {key for key, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in key for key in trainable)
    before = {key: value.clone() for key, value in decoder.named_parameters() if key not in trainable}
    tokens = tokens_for(decoder).requires_grad_()
    targets = torch.randint(5, 90, (3, 5), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(decoder(tokens, targets).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert tokens.grad.abs().sum() > 0
    for key, parameter in decoder.named_parameters():
        if key in trainable:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
        else:
            assert parameter.grad is None and torch.equal(parameter, before[key]), key


def perturb_lora(decoder: LLMDecoder) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", LLM_NAMES)
def test_merged_lora_computes_the_same(name):
    decoder = make(name)
    tokens, targets = tokens_for(decoder), torch.randint(5, 90, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = decoder(tokens, targets)
        perturb_lora(decoder)
        adapted = decoder(tokens, targets)
        tied = decoder.base.get_output_embeddings().weight is decoder.base.get_input_embeddings().weight
        assert decoder.merge_lora() is decoder
        merged = decoder(tokens, targets)
    assert not torch.allclose(plain, adapted, atol=1e-3)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in key for key, _ in decoder.named_parameters())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert tied == (name == "tiny-opt")
    assert tied == (decoder.base.get_output_embeddings().weight is decoder.base.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        decoder.merge_lora()
    with pytest.raises(ValueError, match="before merge_lora"):
        decoder.save_pretrained("unused")


@pytest.mark.parametrize("name", LLM_NAMES)
def test_a_bfloat16_llm_takes_float32_tokens(name):
    decoder = build_decoder(name)
    tokens = tokens_for(decoder).requires_grad_()
    logits = decoder(tokens, torch.randint(5, 90, (3, 4)))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    logits.float().sum().backward()
    assert tokens.grad.dtype == torch.float32 and tokens.grad.abs().sum() > 0
    assert {p.dtype for p in decoder.parameters() if p.requires_grad} == {torch.float32}
    assert decoder.generate(tokens, max_new_tokens=3, min_new_tokens=3).shape == (3, 3)


@pytest.mark.parametrize(
    ("shape", "millions", "lora"), [("flan-t5-xl", 2849.8, 9_437_184), ("opt-2.7b", 2651.6, 5_242_880)]
)
def test_true_shapes_have_the_published_parameters_and_lora_its_own(shape, millions, lora):
    llm = llm_on_meta(shape)
    assert sum(parameter.numel() for parameter in llm.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    decoder = LLMDecoder(llm, None, lora=LoraOptions(), source={})
    # T5: 24 + 2 * 24 attentions, q and v, rank 16 * (2048 + 2048); OPT: 32 attentions, 16 * (2560 + 2560).
    assert sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad) == lora
    assert decoder.input_dim == {"flan-t5-xl": 2048, "opt-2.7b": 2560}[shape]
    assert len(decoder.prompt_ids) == 12


@pytest.mark.parametrize("shape", LLM_NAMES)
def test_random_weights_are_seeded_distinct_and_of_a_trained_models_scale(shape):
    a, b, c = (random_llm(shape, dtype=torch.float32, seed=seed) for seed in (0, 0, 1))
    for (key, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), key
        assert x.isfinite().all()
        if x.ndim == 2:
            assert not torch.equal(x, z), key
            assert len(torch.unique(x, dim=0)) == len(x), f"{key} has equal rows"
    decoder = build_decoder(shape)
    assert decoder.random_weights and not decoder.has_tokenizer and not decoder.training
    assert decoder.decode(torch.tensor([[17, 3, decoder.eos_id, decoder.pad_id]])) == ["<17> <3>"]
    with pytest.raises(ValueError, match="no tokenizer"):
        decoder.encode(["a man"])
    with pytest.raises(ValueError, match="no tokenizer"):
        decoder.set_prompt("a prompt")


@pytest.mark.parametrize("name", LLM_NAMES)
def test_the_prompt_counts_and_can_be_replaced(name):
    decoder = make(name)
    tokens, targets = tokens_for(decoder), torch.randint(5, 90, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        default = decoder(tokens, targets)
        decoder.set_prompt([7, 8, 9])
        assert not torch.allclose(default, decoder(tokens, targets))
        # A prompt and its embeddings behind the tokens are the same input.
        embedded = decoder.base.get_input_embeddings()(torch.tensor([7, 8, 9])).expand(3, -1, -1)
        expected = decoder(tokens, targets)
        decoder.set_prompt([])
        torch.testing.assert_close(decoder(torch.cat((tokens, embedded), dim=1), targets), expected)
    with pytest.raises(ValueError, match=r"prompt must be text or token ids in 0\.\.95"):
        decoder.set_prompt([96])


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_decoder_comes_back(name, tmp_path):
    decoder = make(name) if name in SMALL_NAMES else build_decoder(name, dtype=torch.float32, prompt=[5, 6])
    if name in LLM_NAMES:
        perturb_lora(decoder)
    decoder.save_pretrained(tmp_path)
    loaded = load_decoder(tmp_path)
    tokens, targets = tokens_for(decoder), torch.randint(5, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens, targets), decoder(tokens, targets), rtol=1e-5, atol=1e-5)
    for (key, ours), theirs in zip(decoder.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert loaded.random_weights and not loaded.training
    assert {key for key, p in loaded.named_parameters() if p.requires_grad} == {
        key for key, p in decoder.named_parameters() if p.requires_grad
    }
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    expected = {"config.json", "model.safetensors", "vocabulary.json"} if name in SMALL_NAMES else {"config.json"}
    assert expected <= files and not any(file.endswith((".bin", ".pt", ".pkl")) for file in files)
    if name in LLM_NAMES:
        assert "adapter_model.safetensors" in files and loaded.prompt == (5, 6)
        assert load_decoder(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**content, "decoder": "rnn"}))
    with pytest.raises(ValueError, match='unknown kind "rnn"'):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match='no "decoder"'):
        load_decoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a saved decoder"):
        load_decoder(tmp_path / "nowhere")


def write_tokenizer(folder, special: dict[str, str], pieces: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.mark.parametrize("name", LLM_NAMES)
def test_a_checkpoint_folder_with_a_tokenizer_speaks_words(name, tmp_path):
    llm = random_llm(name, dtype=torch.float32)
    llm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if name == "tiny-t5":
        # FLAN's own config.json says so; transformers 5 ties all the same unless the checkpoint holds both matrices.
        config["tie_word_embeddings"] = False
        config.pop("scale_decoder_outputs", None)
        specials, ids = ["<pad>", "</s>"], {"pad_token": "<pad>", "eos_token": "</s>"}
    else:
        specials, ids = ["<s>", "<pad>", "</s>"], {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # What a checkpoint asks of generation beyond its ids must not change our search.
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    generation.update(no_repeat_ngram_size=1, max_length=3, num_beams=2)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))

    blind = LLMDecoder.from_pretrained(tmp_path, dtype=torch.float32, lora=None)
    assert not blind.has_tokenizer and not blind.random_weights
    write_tokenizer(tmp_path, ids, [*specials, "<unk>", *WORDS, "Describe", "what", "happens", ":"])
    decoder = LLMDecoder.from_pretrained(tmp_path, dtype=torch.float32, prompt="Describe what happens :")
    assert decoder.has_tokenizer and decoder.prompt_ids.tolist()[:4] == decoder.tokenizer(decoder.prompt).input_ids[:4]

    targets = decoder.encode(["w1 w2 w3", "w4"])
    assert targets[1].tolist()[1:] == [decoder.eos_id, decoder.pad_id, decoder.pad_id]
    assert decoder.decode(targets) == ["w1 w2 w3", "w4"]
    assert decoder.decode(decoder.encode(["w1 " * 20])) == [" ".join(["w1"] * 15)]
    assert decoder.decode(decoder.encode(["w1 " * 20]), max_words=None) == [" ".join(["w1"] * 20)]

    made = LLMDecoder(llm, None, prompt=decoder.prompt_ids.tolist(), source={})
    tokens = tokens_for(decoder, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens, targets), made(tokens, targets), rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3}
    assert torch.equal(decoder.generate(tokens, **options), made.generate(tokens, **options))
    decoder.save_pretrained(tmp_path / "saved")
    again = load_decoder(tmp_path / "saved")
    assert again.prompt == "Describe what happens :" and not again.random_weights and again.dtype == torch.float32
    assert torch.equal(again.generate(tokens, **options), decoder.generate(tokens, **options))


def test_other_families_and_names_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r'T5 or OPT family .* got "gpt2"'):
        LLMDecoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='no LLM shape "llama"'):
        LLMDecoder.random("llama")
    with pytest.raises(ValueError, match='got "rnn"'):
        build_decoder("rnn")
    with pytest.raises(ValueError, match="vocabulary must be None"):
        build_decoder("tiny-t5", vocabulary=Vocabulary(WORDS))
    with pytest.raises(ValueError, match="no field colour"):
        build_decoder("lstm", colour=1)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_tokens_targets_and_options_are_named(name):
    decoder = make(name)
    tokens, targets = tokens_for(decoder), torch.full((3, 4), 5)
    wrong_tokens = [
        (tokens[0], r"tokens must be .*\[B, N_q, 32\].*shape \(6, 32\)"),
        (tokens[..., :31], r"tokens must be .*shape \(3, 6, 31\)"),
        (tokens[:, :0], r"tokens must be .*shape \(3, 0, 32\)"),
        (tokens.long(), r"tokens must be a floating-point .*torch\.int64"),
        (tokens.tolist(), r"tokens must be .*got list"),
        (tokens.to("meta"), r"tokens must be on the decoder's device cpu, got meta"),
    ]
    for bad, message in wrong_tokens:
        with pytest.raises(ValueError, match=message):
            decoder(bad, targets)
        with pytest.raises(ValueError, match=message):
            decoder.generate(bad)
    for bad, message in [
        (targets[0], r"target_ids must be .*\[3, T\].*shape \(4,\)"),
        (targets[:2], r"target_ids must be .*shape \(2, 4\)"),
        (targets[:, :0], r"target_ids must be .*shape \(3, 0\)"),
        (targets.int(), r"target_ids must be an int64 .*torch\.int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder(tokens, bad)
    for options, message in [
        ({"num_beams": 0}, "num_beams must be"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, r"max_new_tokens \(4\) must not be below min_new_tokens \(5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder.generate(tokens, **options)
    with pytest.raises(ValueError, match=r"ids must have shape \[B, T\]"):
        decoder.decode(targets[0])


def test_opt_refuses_more_than_its_positions():
    decoder = make("tiny-opt")
    with pytest.raises(ValueError, match="exceed the LLM's 128 positions"):
        decoder.generate(tokens_for(decoder, num=90), max_new_tokens=32)


def test_small_configs_are_strict():
    with pytest.raises(ValueError, match="divisible by num_heads"):
        TransformerDecoderConfig(input_dim=30)
    with pytest.raises(ValueError, match="hidden_dim"):
        LSTMDecoderConfig(hidden_dim=0)
    with pytest.raises(ValueError, match="dropout"):
        LSTMDecoderConfig(dropout=1.0)
    with pytest.raises(ValueError, match="config must be a LSTMDecoderConfig"):
        LSTMDecoder(TransformerDecoderConfig(), Vocabulary(WORDS))
    with pytest.raises(ValueError, match="rank"):
        LoraOptions(rank=0)
    assert TransformerDecoderConfig.from_dict(TransformerDecoderConfig().to_dict()) == TransformerDecoderConfig()


def test_default_sizes_are_the_papers():
    lstm, transformer = build_decoder("lstm"), build_decoder("transformer")
    assert isinstance(lstm, LSTMDecoder) and isinstance(transformer, TransformerDecoder)
    for decoder in (lstm, transformer):
        assert decoder.input_dim == 300 and len(decoder.vocabulary) == 14_034
        assert decoder.random_weights and not decoder.has_tokenizer
        ids = decoder.generate(tokens_for(decoder, 1), max_new_tokens=3, min_new_tokens=3)
        assert decoder.decode(ids) == [" ".join(f"<{index}>" for index in ids[0].tolist())]
    assert lstm.cell.hidden_size == 512 and lstm.embedding.embedding_dim == 300
    layers = transformer.layers
    assert len(layers) == 3 and layers[0].num_heads == 4 and layers[0].ffn_in.out_features == 1200


def test_torchvision_is_made_importable_before_transformers_meets_it():
    """Beside a CPU torch, what `[clip]` installs breaks the import of transformers unless it is mended first."""
    code = (
        "import sys\n"
        "from evc_fast.data import torchvision_ops\n"
        "early = []\n"
        "torchvision_ops.make_torchvision_importable = lambda: early.append('transformers' not in sys.modules)\n"
        "import evc_fast.model.decoders.llm\n"
        "assert early == [True] and 'transformers' in sys.modules, early\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
