"""What surrounds the decoders' networks: damaged folders, checkpoints of others, arguments, generators and modes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from evc_fast.model import FaceNetConfig, FaceNetEncoder
from evc_fast.model.captioner import FaceNet
from evc_fast.model.decoders import LLMDecoder, LoraOptions, Vocabulary, build_decoder, load_decoder
from evc_fast.model.decoders.llm_random import random_llm

SMALL = {
    "lstm": {"input_dim": 32, "embedding_dim": 24, "hidden_dim": 40, "attention_dim": 28},
    "transformer": {"input_dim": 32, "ffn_dim": 64, "num_layers": 2},
}
LLM_NAMES = ["tiny-t5", "tiny-opt"]
NAMES = [*SMALL, *LLM_NAMES]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make(name: str, seed: int = 0):
    if name in SMALL:
        vocabulary = Vocabulary(f"w{index}" for index in range(26))
        return build_decoder(name, vocabulary=vocabulary, seed=seed, **SMALL[name])
    return build_decoder(name, dtype=torch.float32, seed=seed)


def tokens_of(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 6, 32, generator=torch.Generator().manual_seed(1))


def edit_json(path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_tensors(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def narrow(tensors) -> None:
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name] = tensors[name][:, :-1].contiguous()


# --- Damaged folders -------------------------------------------------------------------------------

DAMAGES = {
    "no_folder": (shutil.rmtree, FileNotFoundError, "is not a saved decoder: it has no config.json"),
    "no_config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "it has no config.json"),
    "broken_json": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
}
SMALL_DAMAGES = DAMAGES | {
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
    "no_words": (lambda f: (f / "vocabulary.json").unlink(), FileNotFoundError, "vocabulary.json"),
    "half": (lambda f: halve(f / "model.safetensors"), ValueError, "model.safetensors is not a complete safetensors"),
    "sizes": (lambda f: edit_tensors(f / "model.safetensors", narrow), ValueError, "does not fit .*expected"),
    "names": (
        lambda f: edit_tensors(f / "model.safetensors", lambda t: t.pop("output.bias")),
        ValueError,
        r"missing tensors \['output.bias'\]",
    ),
    "flag": (
        lambda f: edit_json(f / "config.json", random_weights=1),
        ValueError,
        "random_weights in .* true or false",
    ),
}
ADAPTER = "adapter/adapter_model.safetensors"
LLM_DAMAGES = DAMAGES | {
    "no_adapter": (lambda f: shutil.rmtree(f / "adapter"), FileNotFoundError, "has no adapter_config.json"),
    "no_weights": (lambda f: (f / ADAPTER).unlink(), FileNotFoundError, "has no adapter_model.safetensors"),
    "half": (lambda f: halve(f / ADAPTER), ValueError, "adapter_model.safetensors is not a complete safetensors"),
    "sizes": (lambda f: edit_tensors(f / ADAPTER, narrow), ValueError, "does not fit its LLM"),
    "names": (lambda f: edit_tensors(f / ADAPTER, lambda t: t.pop(min(t))), ValueError, r"unexpected tensors \['base"),
    "adapter_json": (
        lambda f: (f / "adapter" / "adapter_config.json").write_text("{"),
        ValueError,
        "adapter_config.json is not JSON",
    ),
    "no_base": (
        lambda f: (f / "config.json").write_text(
            '{"decoder": "llm", "dtype": "float32", "prompt": null, "lora": null}'
        ),
        ValueError,
        "lacks keys: base",
    ),
    "base_gone": (
        lambda f: (f / "config.json").write_text(
            '{"decoder": "llm", "base": "/gone/llm", "dtype": "float32", "prompt": null, "lora": null}'
        ),
        FileNotFoundError,
        "the saved decoder's base LLM /gone/llm is not there",
    ),
}
CASES = [("lstm", key) for key in SMALL_DAMAGES] + [("tiny-t5", key) for key in LLM_DAMAGES]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_decoder_half_is_named(name, damage, tmp_path):
    encoder = FaceNetEncoder(
        FaceNetConfig(video_dim=8, text_dim=8, dim=8, emotion_dim=8, num_emotions=5, num_queries=2, output_dim=32)
    )
    FaceNet(encoder, make(name)).save_pretrained(tmp_path)
    spoil, error, message = (SMALL_DAMAGES if name in SMALL else LLM_DAMAGES)[damage]
    spoil(tmp_path / "decoder")
    with pytest.raises(error, match=message):
        FaceNet.from_pretrained(tmp_path)


def test_loaded_weights_do_not_lie_in_the_mapped_file(tmp_path):
    decoder = make("lstm")
    decoder.save_pretrained(tmp_path)
    loaded = load_decoder(tmp_path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())
    assert torch.equal(loaded(tokens_of(), torch.full((3, 4), 5)), decoder(tokens_of(), torch.full((3, 4), 5)))


# --- Checkpoints of an LLM -------------------------------------------------------------------------


def save_llm(name: str, folder, **ids) -> None:
    random_llm(name, dtype=torch.float32).save_pretrained(folder)
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, **ids)


def test_t5_without_a_start_token_starts_from_pad(tmp_path):
    llm = random_llm("tiny-t5", dtype=torch.float32)
    llm.generation_config.decoder_start_token_id = None
    decoder = LLMDecoder(llm, None, source={})
    assert decoder.base.generation_config.decoder_start_token_id == decoder.pad_id
    assert decoder(tokens_of(), torch.full((3, 4), 5)).isfinite().all()
    assert decoder.generate(tokens_of(), max_new_tokens=3, min_new_tokens=3).shape == (3, 3)


def test_opt_without_bos_and_tokenizer_is_refused():
    llm = random_llm("tiny-opt", dtype=torch.float32)
    llm.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="must name bos_token_id, since there is no tokenizer"):
        LLMDecoder(llm, None, source={})


@pytest.mark.parametrize("path", ["/gone/flan-t5", "./flan-t5", "../flan-t5", "a/b/flan-t5", "~/flan-t5"])
def test_a_missing_llm_folder_is_called_missing(path):
    with pytest.raises(FileNotFoundError, match="there is no LLM folder"):
        LLMDecoder.from_pretrained(path)


def test_a_file_or_broken_json_in_place_of_an_llm(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        LLMDecoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no LLM folder"):
        LLMDecoder.from_pretrained(tmp_path / "config.json")


def test_a_checkpoint_of_the_other_family_is_refused(tmp_path):
    save_llm("tiny-opt", tmp_path / "opt")
    assert build_decoder("opt-2.7b", checkpoint=tmp_path / "opt", lora=None).family == "opt"
    with pytest.raises(ValueError, match='must be of the "t5" family, it is of the "opt" family'):
        build_decoder("flan-t5-xl", checkpoint=tmp_path / "opt")
    make("tiny-t5").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match='must be of the "opt" family, it is of the "t5" family'):
        build_decoder("opt-2.7b", checkpoint=tmp_path / "saved")


# --- Arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", None, True, 1.0, float("nan")])
def test_lora_dropout_is_a_number_below_one(value):
    with pytest.raises(ValueError, match=r"dropout of LoraOptions must be a number in \[0, 1\)"):
        LoraOptions(dropout=value)


def test_captions_are_a_list_of_strings():
    decoder = make("lstm")
    llm = make("tiny-t5")
    llm.tokenizer = lambda text, **_: pytest.fail("tokenized before the captions were checked")
    for one in (decoder, llm):
        for bad, found in (("abc", "got a str"), ([1], "holds a int"), (None, "got NoneType")):
            with pytest.raises(ValueError, match=f"captions must be a list of strings, .*{found}"):
                one.encode(bad)


@pytest.mark.parametrize("name", NAMES)
def test_target_ids_lie_in_the_vocabulary(name):
    decoder = make(name)
    size = 30 if name in SMALL else 96
    decoder.register_forward_hook(lambda *_: pytest.fail("computed"))
    for bad in (-1, -100, size):
        targets = torch.full((3, 4), 5)
        targets[1, 3] = bad
        with pytest.raises(ValueError, match=rf"target_ids must lie in 0\.\.{size - 1}, got ids from"):
            decoder(tokens_of(), targets)


@pytest.mark.parametrize("name", SMALL)
def test_an_empty_batch_has_empty_logits(name):
    logits = make(name)(tokens_of(0), torch.zeros(0, 4, dtype=torch.int64))
    assert logits.shape == (0, 4, 30)


# --- Generators, modes and words -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_leaves_the_global_generator_alone_and_decides_the_weights(name):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = make(name, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for (key, a), b in zip(first.named_parameters(), make(name, seed=5).parameters(), strict=True):
        assert torch.equal(a, b), key
    others = make(name, seed=6).parameters()
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), others, strict=True) if a.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_generation_gives_every_submodule_its_training_flag_back(name):
    decoder = make(name).train()
    next(module for module in decoder.modules() if isinstance(module, torch.nn.Dropout)).eval()
    flags = [module.training for module in decoder.modules()]
    decoder.generate(tokens_of(), max_new_tokens=3)
    assert [module.training for module in decoder.modules()] == flags
    assert True in flags and False in flags


def test_the_models_generation_gives_every_submodule_its_training_flag_back():
    config = FaceNetConfig(
        video_dim=8, text_dim=8, dim=8, emotion_dim=8, num_emotions=5, num_queries=2, output_dim=32, retrieval=False
    )
    model = FaceNet(FaceNetEncoder(config), make("lstm")).train()
    model.encoder.ffn.eval()
    flags = [module.training for module in model.modules()]
    model.generate(torch.randn(2, 4, 8), max_new_tokens=3)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("beams", [1, 5, 40])
def test_only_words_and_the_end_are_generated(name, beams):
    decoder = make(name)
    with torch.no_grad():
        decoder.output.bias[[0, 1, 3]] += 50.0
    ids = decoder.generate(tokens_of(), num_beams=beams, max_new_tokens=5, min_new_tokens=5)
    assert ids.shape == (3, 5) and (ids >= 4).all()
