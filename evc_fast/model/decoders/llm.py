"""LLM decoders: a frozen T5- or OPT-family model that reads [tokens ; prompt], adapted by LoRA."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from evc_fast.data.hub import cached_folder
from evc_fast.data.torchvision_ops import make_torchvision_importable
from evc_fast.decoding import check_search_options
from evc_fast.model.checkpoint import CONFIG_NAME, read_json
from evc_fast.model.decoders.base import check_targets, check_tokens, evaluation_mode, read_config
from evc_fast.model.decoders.vocabulary import MAX_CAPTION_WORDS, check_captions, cut_words, pad_sequences

make_torchvision_importable()  # before transformers, which imports it where it is installed
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from evc_fast.model.decoders.llm_random import RANDOM_SHAPES, random_llm  # noqa: E402

__all__ = ["DEFAULT_PROMPT", "LLMDecoder", "LoraOptions"]

DEFAULT_PROMPT = "Describe what happens in the video and how it feels:"
# Stands in for DEFAULT_PROMPT where there is no tokenizer: its length is that of eleven pieces (one a word, and ":")
# and the family's special token, behind them for T5 and before them for OPT.
_PLACEHOLDER_PIECES = tuple(range(4, 15))

_ADAPTER_FOLDER = "adapter"
_LORA_TARGETS = {"t5": ("q", "v"), "opt": ("q_proj", "v_proj")}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """LoRA as the paper trains it. `target_modules=None`: every attention's q and v (T5: q, v; OPT: q_proj, v_proj)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of LoraOptions must be a positive integer, got {value!r}")
        dropout = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout of LoraOptions must be a number in [0, 1), got {dropout!r}")


class LLMDecoder(nn.Module):
    """A frozen LLM with LoRA. T5: [tokens ; prompt] enters the encoder; OPT: it is the prefix of the caption.

    Build one with `from_pretrained` or `random`.

    Args:
        llm: a T5 or OPT model with its language-modelling head; its weights are frozen.
        tokenizer: None where there is none: `decode` then prints token ids, "<17> <3>".
        prompt: text (needs a tokenizer) or token ids; None takes DEFAULT_PROMPT, without a tokenizer a fixed list of
            12 ids, as many as its tokenization is expected to have.
        lora: None leaves the LLM as it is.
        source: what `save_pretrained` writes down to find the LLM again.
        random_weights: the LLM's weights are random.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        prompt: str | Sequence[int] | None = None,
        lora: LoraOptions | None = None,
        source: dict[str, Any],
        random_weights: bool = False,
    ) -> None:
        super().__init__()
        self.family = _check_family(llm.config)
        self.llm: PreTrainedModel | PeftModel = llm.requires_grad_(False)
        self.tokenizer = tokenizer
        self.random_weights = random_weights
        self.lora = lora
        self._source = source
        # Only ids come from the checkpoint's generation config: no repetition penalty, length or sampling of its own.
        ids = {
            name: getattr(llm.generation_config, name)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        }
        eos = ids["eos_token_id"]
        self.eos_ids: tuple[int, ...] = (eos,) if isinstance(eos, int) else tuple(eos or ())
        if not self.eos_ids or ids["pad_token_id"] is None:
            raise ValueError("the LLM's generation config must name eos_token_id and pad_token_id")
        if self.family == "t5" and ids["decoder_start_token_id"] is None:
            ids["decoder_start_token_id"] = ids["pad_token_id"]  # T5's convention
        llm.generation_config = GenerationConfig(**ids)
        # transformers 5 writes True into every T5 config; whoever ties again by it would lose FLAN's output map.
        llm.config.tie_word_embeddings = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
        self.set_prompt(prompt)
        if lora is not None:
            targets = list(lora.target_modules or _LORA_TARGETS[self.family])
            self.llm = get_peft_model(
                llm,
                LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets),
            )
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        lora: LoraOptions | Literal["default"] | None = "default",
        prompt: str | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        family: Literal["t5", "opt"] | None = None,
    ) -> Self:
        """Load a T5- or OPT-family checkpoint by name or folder, or what `save_pretrained` wrote.

        Args:
            name_or_path: of the hub, or a local folder.
            dtype: of the LLM; None means bfloat16, or what was saved. LoRA weights are float32.
            lora: "default" means a fresh LoraOptions() for a checkpoint and the saved adapter for a saved decoder;
                None means no adapter.
            prompt: None means the default, or what was saved.
            device: where it runs.
            family: refuse a checkpoint of the other one; None takes either.

        Raises:
            FileNotFoundError: a folder, or a part of a saved decoder, is not there.
            ValueError: another family of models, a saved decoder of another kind, or a damaged file.
            OSError: the hub cannot be reached.
        """
        folder = Path(name_or_path)
        if _is_missing_folder(name_or_path):
            raise FileNotFoundError(f"there is no LLM folder {name_or_path}")
        saved = folder.is_dir() and (folder / CONFIG_NAME).is_file() and _is_saved_decoder(folder)
        if saved:
            return cls._from_saved(folder, dtype=dtype, lora=lora, prompt=prompt, device=device, family=family)
        dtype = dtype or torch.bfloat16
        config = AutoConfig.from_pretrained(name_or_path)
        auto_model = AutoModelForSeq2SeqLM if _check_family(config, family) == "t5" else AutoModelForCausalLM
        llm = auto_model.from_pretrained(name_or_path, dtype=dtype).to(device)
        tokenizer = None
        if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
            _log.warning("%s has no tokenizer: captions will be token ids", folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        return cls(
            llm,
            tokenizer,
            prompt=prompt,
            lora=LoraOptions() if lora == "default" else lora,
            source={"base": str(folder.resolve()) if folder.is_dir() else str(name_or_path)},
        )

    @classmethod
    def random(
        cls,
        shape: str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        lora: LoraOptions | None = LoraOptions(),
        prompt: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Self:
        """The true shape of "flan-t5-xl" or "opt-2.7b" (or "tiny-t5", "tiny-opt"), random weights and no tokenizer."""
        llm = random_llm(shape, dtype=dtype, device=device, seed=seed)
        source = {"random": {"shape": shape, "seed": seed}}
        with torch.random.fork_rng(devices=[]):  # LoRA's first weights are drawn from the global generator
            torch.default_generator.manual_seed(seed)
            return cls(llm, None, prompt=prompt, lora=lora, source=source, random_weights=True)

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model itself, with LoRA layers in it until they are merged."""
        return self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm

    @property
    def input_dim(self) -> int:
        """d_out: the width of the LLM's word embeddings."""
        return self.base.get_input_embeddings().embedding_dim

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer is not None

    @property
    def pad_id(self) -> int:
        return self.base.generation_config.pad_token_id

    @property
    def eos_id(self) -> int:
        return self.eos_ids[0]

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the LLM's weights; tokens are cast to it."""
        return self.base.get_input_embeddings().weight.dtype

    def set_prompt(self, prompt: str | Sequence[int] | None) -> None:
        """Replace the prompt: text, token ids, or None for the default. ValueError on text without a tokenizer."""
        if isinstance(prompt, str) or (prompt is None and self.tokenizer is not None):
            if self.tokenizer is None:
                raise ValueError("prompt must be token ids, since this LLM has no tokenizer, got a str")
            prompt = DEFAULT_PROMPT if prompt is None else prompt
            ids = self.tokenizer(prompt).input_ids
        elif prompt is None:
            ids, bos = _PLACEHOLDER_PIECES, self.base.generation_config.bos_token_id
            if self.family == "opt" and bos is None:
                raise ValueError("the LLM's generation config must name bos_token_id, since there is no tokenizer")
            ids = (*ids, self.eos_id) if self.family == "t5" else (bos, *ids)
        else:
            ids = prompt
        size = self.base.get_input_embeddings().num_embeddings
        if not all(isinstance(index, int) and 0 <= index < size for index in ids):
            raise ValueError(f"prompt must be text or token ids in 0..{size - 1}, got {list(ids)}")
        self.prompt = prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)
        ids = torch.tensor(ids, dtype=torch.int64, device=self.device)
        self.register_buffer("prompt_ids", ids, persistent=False)

    def _prefix(self, tokens: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
        """[tokens ; prompt embeddings] [B, N_q + P, input_dim] in the LLM's type, and its attention mask, all ones."""
        check_tokens(tokens, self.input_dim, self.device)
        length = tokens.shape[1] + len(self.prompt_ids)
        positions = getattr(self.base.config, "max_position_embeddings", None)
        if positions is not None and length + num_new > positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens, {len(self.prompt_ids)} of the prompt and {num_new} of the caption exceed "
                f"the LLM's {positions} positions"
            )
        prompt = self.base.get_input_embeddings()(self.prompt_ids).expand(tokens.shape[0], -1, -1)
        embeddings = torch.cat((tokens.to(self.dtype), prompt), dim=1)
        return embeddings, embeddings.new_ones(embeddings.shape[:2], dtype=torch.int64)

    def forward(self, tokens: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher forcing: logits [B, T, vocabulary] of each target given tokens, prompt and the targets before it.

        Args:
            tokens: [B, N_q, input_dim], any floating type; gradients reach it.
            target_ids: [B, T] int64, ending in EOS, then pad (what `encode` returns).

        Raises: ValueError on wrong shapes, types, devices or ids and where OPT's positions do not suffice.
        """
        check_tokens(tokens, self.input_dim, self.device)
        check_targets(target_ids, tokens, self.base.get_input_embeddings().num_embeddings)
        embeddings, mask = self._prefix(tokens, target_ids.shape[1])
        if self.family == "t5":
            start = target_ids.new_full((target_ids.shape[0], 1), self.base.generation_config.decoder_start_token_id)
            inputs = torch.cat((start, target_ids[:, :-1]), dim=1)
            return self.base(
                inputs_embeds=embeddings, attention_mask=mask, decoder_input_ids=inputs, use_cache=False
            ).logits
        # The last prefix position predicts the first target. The head runs on the T positions that predict, no others.
        words = self.base.get_input_embeddings()(target_ids[:, :-1])
        mask = torch.cat((mask, mask.new_ones(words.shape[:2])), dim=1)
        return self.base(
            inputs_embeds=torch.cat((embeddings, words), dim=1),
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=target_ids.shape[1],
        ).logits

    @torch.no_grad()
    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Caption ids [B, T] int64 by transformers' `generate`, without the start token, padded after EOS; no dropout.

        Args:
            tokens: [B, N_q, input_dim], any floating type.
            num_beams: default 5; 1 is greedy search.
            max_new_tokens, min_new_tokens: 32, 0; EOS counts as a token; both 15 forces exactly 15 tokens, for timing.
            length_penalty: default 1; a hypothesis scores sum(log p) / length ** length_penalty.

        Raises: ValueError on tokens of the wrong shape, type or device and on options out of range.
        """
        return self._tidy(self._generate(tokens, {}, **options))

    @torch.no_grad()
    def search(self, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """What `generate` gives, and how near another outcome was, float32 [B].

        With beams that is the gap between the best two captions' scores: transformers does not tell which beams it
        dropped on the way. It keeps all steps' scores for it, B * num_beams * T * vocabulary * 4 bytes.
        """
        num_beams = options.get("num_beams", 5)
        wanted = {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": min(2, num_beams)}
        found = self._generate(tokens, wanted, **options)
        if tokens.shape[0] == 0:
            return found, torch.zeros(0, device=tokens.device)
        ids = self._tidy(found.sequences[:: wanted["num_return_sequences"]])
        if num_beams > 1:
            best, second = found.sequences_scores.float().view(-1, 2).unbind(1)
            return ids[:, : int((ids != self.pad_id).sum(1).max())], best - second  # the second may be longer
        best, second = torch.stack(found.scores, 1).float().topk(2).values.unbind(2)  # [B, T]
        return ids, (best - second).masked_fill(ids == self.pad_id, float("inf")).min(1).values

    def _generate(
        self,
        tokens: Tensor,
        wanted: dict[str, Any],
        *,
        num_beams: int = 5,
        max_new_tokens: int = 32,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
    ) -> Any:
        """transformers' `generate`, which returns ids or what is `wanted`; no ids where there are no videos."""
        check_search_options(num_beams, max_new_tokens, min_new_tokens, length_penalty)
        embeddings, mask = self._prefix(tokens, max_new_tokens)
        if tokens.shape[0] == 0:
            return torch.zeros(0, 0, dtype=torch.int64, device=tokens.device)
        config = self.generation_config(num_beams, max_new_tokens, min_new_tokens, length_penalty)
        config.update(**wanted)
        with evaluation_mode(self):
            return self.base.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config)

    def _tidy(self, ids: Tensor) -> Tensor:
        """What transformers generated, without the start token, padded after EOS."""
        if self.family == "t5":
            ids = ids[:, 1:]  # the decoder's start token
        # transformers fills up with EOS where pad is id 0, as T5's is: what follows the first EOS is made pad here.
        is_eos = torch.isin(ids, torch.tensor(self.eos_ids, device=ids.device))
        return ids.masked_fill(is_eos.cumsum(dim=1) - is_eos.long() > 0, self.pad_id)

    def generation_config(
        self, num_beams: int, max_new_tokens: int, min_new_tokens: int = 0, length_penalty: float = 1.0
    ) -> GenerationConfig:
        """All that decides transformers' search, spelled out; only the special ids come from the checkpoint."""
        beam = {"length_penalty": length_penalty, "early_stopping": False} if num_beams > 1 else {}
        ids = self.base.generation_config
        return GenerationConfig(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=ids.pad_token_id,
            bos_token_id=ids.bos_token_id,
            eos_token_id=ids.eos_token_id,
            decoder_start_token_id=ids.decoder_start_token_id,
            **beam,
        )

    def encode(self, captions: list[str]) -> Tensor:
        """Target ids [B, T] int64 on the LLM's device: the caption's pieces, EOS, then pad. Needs a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("captions cannot be encoded, since this LLM has no tokenizer")
        # OPT's pieces know a word's start by the space before it; T5's tokenizer adds its own.
        lead = "" if self.family == "t5" else " "
        rows = [self.tokenizer(lead + text, add_special_tokens=False).input_ids for text in check_captions(captions)]
        return pad_sequences([[*row, self.eos_id] for row in rows], self.pad_id).to(self.device)

    def decode(self, ids: Tensor, *, max_words: int | None = MAX_CAPTION_WORDS) -> list[str]:
        """Captions of ids [B, T], cut to `max_words` words (None: not cut); without a tokenizer all ids up to EOS."""
        if ids.ndim != 2:
            raise ValueError(f"ids must have shape [B, T], got {tuple(ids.shape)}")
        if self.tokenizer is not None:
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            return [cut_words(text, max_words) for text in texts]
        return [" ".join(f"<{index}>" for index in _until(row, self.eos_ids)) for row in ids.tolist()]

    def merge_lora(self) -> Self:
        """Add the LoRA products into the LLM's weights, for inference: nothing is left to train or to save apart."""
        if not isinstance(self.llm, PeftModel):
            raise ValueError("there is no LoRA adapter to merge")
        self.llm = self.llm.merge_and_unload()
        self._source = {"merged": True}
        self.lora = None
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, which names the LLM, and the LoRA adapter (safetensors) in adapter/; never the LLM itself.

        Raises: ValueError once the adapter is merged, since it is no longer apart.
        """
        if "merged" in self._source:
            raise ValueError("the decoder must be saved before merge_lora: its adapter is no longer apart")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "decoder": "llm",
            **self._source,
            "dtype": str(self.dtype).removeprefix("torch."),
            "prompt": self.prompt,
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
        }
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if isinstance(self.llm, PeftModel):
            # The embeddings are never trained here; False keeps peft from asking the hub about them.
            self.llm.save_pretrained(folder / _ADAPTER_FOLDER, save_embedding_layers=False)

    @classmethod
    def _from_saved(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None,
        lora: LoraOptions | Literal["default"] | None,
        prompt: str | Sequence[int] | None,
        device: torch.device | str,
        family: Literal["t5", "opt"] | None,
    ) -> Self:
        content = read_config(folder)
        if content["decoder"] != "llm":
            raise ValueError(f'{folder} holds a decoder of kind "{content["decoder"]}", expected "llm"')
        unknown = sorted(set(content) - {"decoder", "base", "random", "dtype", "prompt", "lora"})
        if unknown:
            raise ValueError(f"{folder / CONFIG_NAME} has unknown keys: {', '.join(unknown)}")
        missing = sorted({"dtype", "prompt", "lora"} - set(content)) + ["base"] * (
            not {"base", "random"} & set(content)
        )
        if missing:
            raise ValueError(f"{folder / CONFIG_NAME} lacks keys: {', '.join(missing)}")
        if lora not in ("default", None):
            raise ValueError('lora must be "default" (the saved adapter) or None for a saved decoder')
        common = {
            "dtype": dtype or getattr(torch, content["dtype"]),
            "lora": None,
            "prompt": content["prompt"] if prompt is None else prompt,
            "device": device,
        }
        if "random" in content:
            if family is not None:
                _check_family(RANDOM_SHAPES[content["random"]["shape"]], family)
            decoder = cls.random(content["random"]["shape"], seed=content["random"]["seed"], **common)
        else:
            if _is_missing_folder(content["base"]):
                raise FileNotFoundError(f"the saved decoder's base LLM {content['base']} is not there ({folder})")
            # What is on this machine is read from there; a connection is opened for nothing but what lacks.
            decoder = cls.from_pretrained(cached_folder(content["base"]) or content["base"], family=family, **common)
            decoder._source = {"base": content["base"]}
        if content["lora"] is not None and lora == "default":
            options = dict(content["lora"])
            options["target_modules"] = options["target_modules"] and tuple(options["target_modules"])
            decoder.lora = LoraOptions(**options)
            decoder.llm = _read_adapter(decoder.llm, folder / _ADAPTER_FOLDER)
        return decoder.eval()


def _read_adapter(llm: PreTrainedModel, folder: Path) -> PeftModel:
    """`llm` with the LoRA adapter of `folder`, trainable; strict, where peft asks the hub or leaves weights fresh."""
    weights = folder / "adapter_model.safetensors"
    for path in (folder / "adapter_config.json", weights):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}: expected what save_pretrained writes")
    read_json(folder / "adapter_config.json")
    try:
        with safe_open(weights, framework="pt") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a complete safetensors file: {error}") from error
    try:
        adapted = PeftModel.from_pretrained(llm, folder, is_trainable=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit its LLM: {error}") from error
    differing = sorted(found ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    if differing:
        raise ValueError(f"{weights} does not fit its LLM: missing or unexpected tensors {differing}")
    return adapted


def _is_missing_folder(name_or_path: str | Path) -> bool:
    """Whether this can only be a folder, since no name of the hub looks like it, and there is none."""
    name = str(name_or_path)
    like_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()
    return like_path and not Path(name).is_dir()


def _check_family(config: Any, expected: str | None = None) -> str:
    """ "t5" or "opt". Raises ValueError on any other, or where `expected` is not None and not that."""
    family = config.model_type
    if family not in _LORA_TARGETS:
        raise ValueError(f'the LLM must be of the T5 or OPT family (model_type "t5" or "opt"), got "{family}"')
    if expected not in (None, family):
        raise ValueError(f'the checkpoint must be of the "{expected}" family, it is of the "{family}" family')
    return family


def _is_saved_decoder(folder: Path) -> bool:
    content = read_json(folder / CONFIG_NAME)
    return isinstance(content, dict) and "decoder" in content


def _until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first of `ends`."""
    stop = next((position for position, index in enumerate(ids) if index in ends), len(ids))
    return list(ids[:stop])
