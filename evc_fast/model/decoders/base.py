"""What every decoder shares: the checks of its inputs, and all of a small decoder but its network."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from evc_fast.decoding import beam_search, check_search_options
from evc_fast.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, assign_strictly, read_folder, read_json, write_folder
from evc_fast.model.decoders.vocabulary import MAX_CAPTION_WORDS, Vocabulary

__all__ = ["SmallDecoder", "SmallDecoderConfig", "check_targets", "check_tokens", "evaluation_mode", "read_config"]

_VOCABULARY_FILE = "vocabulary.json"


def check_tokens(tokens: Tensor, input_dim: int, device: torch.device) -> None:
    """Raise ValueError unless tokens is a floating tensor [B, N_q >= 1, input_dim] on `device`."""
    expected = f"a floating-point tensor [B, N_q, {input_dim}] with N_q >= 1"
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be {expected}, got {type(tokens).__name__}")
    shape = tuple(tokens.shape)
    if tokens.ndim != 3 or shape[2] != input_dim or shape[1] < 1 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be {expected}, got {tokens.dtype} of shape {shape}")
    if tokens.device != device:
        raise ValueError(f"tokens must be on the decoder's device {device}, got {tokens.device}")


def check_targets(target_ids: Tensor, tokens: Tensor, num_words: int) -> None:
    """Raise ValueError unless target_ids is int64 [B, T >= 1] in 0..num_words - 1, with the B and device of tokens."""
    expected = f"an int64 tensor [{tokens.shape[0]}, T] with T >= 1"
    if not isinstance(target_ids, Tensor):
        raise ValueError(f"target_ids must be {expected}, got {type(target_ids).__name__}")
    shape = tuple(target_ids.shape)
    if target_ids.ndim != 2 or shape[0] != tokens.shape[0] or shape[1] < 1 or target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids must be {expected}, got {target_ids.dtype} of shape {shape}")
    if target_ids.device != tokens.device:
        raise ValueError(f"target_ids must be on the device of tokens, {tokens.device}, got {target_ids.device}")
    # Values are read only where there are any; while a graph is traced they would break it.
    if target_ids.numel() and target_ids.device.type != "meta" and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in target_ids.aminmax())
        if least < 0 or most >= num_words:
            raise ValueError(f"target_ids must lie in 0..{num_words - 1}, got ids from {least} to {most}")


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the training flag it had, whether or not its parent's."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved decoder, which names its kind under "decoder".

    Raises: FileNotFoundError where there is none, ValueError where it is something else.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a saved decoder: it has no {CONFIG_NAME}")
    content = read_json(path)
    if not isinstance(content, dict) or "decoder" not in content:
        raise ValueError(f'{path} is not the config of a saved decoder: it has no "decoder"')
    return content


@dataclasses.dataclass(frozen=True)
class SmallDecoderConfig:
    """Sizes that the LSTM and the Transformer decoder share; the number of words comes from the vocabulary."""

    input_dim: int = 300  # d_out: width of the tokens that are read
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "dropout":
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                    raise ValueError(f"dropout must be a number in [0, 1), got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; an unknown key is refused."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        return cls(**values)


class SmallDecoder(nn.Module):
    """A decoder over words that is trained from scratch and searched by our own beam search.

    A subclass names its `kind` and `config_class`, registers `output`, the linear map to the vocabulary, and implements
    `forward`, `_start`, `_step` and `_reorder`.
    `random_weights` is True until a trainer or a checkpoint says otherwise; it is saved with the decoder.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[SmallDecoderConfig]]
    output: nn.Linear

    def __init__(self, config: SmallDecoderConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(f"config must be a {self.config_class.__name__}, got {type(config).__name__}")
        if not isinstance(vocabulary, Vocabulary):
            raise ValueError(f"vocabulary must be a Vocabulary, got {type(vocabulary).__name__}")
        self.config = config
        self.vocabulary = vocabulary
        self.random_weights = True

    @property
    def input_dim(self) -> int:
        """d_out, the width of the tokens that are read."""
        return self.config.input_dim

    @property
    def has_tokenizer(self) -> bool:
        """False where the vocabulary is a placeholder: captions are then printed as word ids, "<17> <3>"."""
        return not self.vocabulary.random

    @property
    def pad_id(self) -> int:
        return self.vocabulary.pad_id

    @property
    def eos_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def device(self) -> torch.device:
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.output.weight.dtype

    @abstractmethod
    def _start(self, tokens: Tensor, max_new_tokens: int) -> Any:
        """State before the first token, for B rows."""

    @abstractmethod
    def _step(self, last_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Hidden vectors [rows, width of the output map] after reading `last_ids` [rows], and the next state."""

    @abstractmethod
    def _reorder(self, state: Any, rows: Tensor) -> Any:
        """The state with row r taken from rows[r]."""

    def _shift_right(self, target_ids: Tensor) -> Tensor:
        """Inputs of teacher forcing: <bos>, then all targets but the last, [B, T]."""
        start = target_ids.new_full((target_ids.shape[0], 1), self.vocabulary.bos_id)
        return torch.cat((start, target_ids[:, :-1]), dim=1)

    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Caption ids [B, T] int64; arguments and errors as of `search`."""
        return self.search(tokens, **options)[0]

    @torch.no_grad()
    def search(
        self,
        tokens: Tensor,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 32,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Caption ids [B, T] int64 by beam search, without the start token, padded after EOS, and the search's margins.

        Margins are float32 [B]: how near another outcome was, see `BeamSearchOutput`. Dropout is off.

        <pad>, <bos> and <unk> are never generated.

        Args:
            tokens: [B, N_q, input_dim], any floating type (cast to the decoder's own).
            num_beams, max_new_tokens, min_new_tokens, length_penalty: see `evc_fast.decoding.beam_search`;
                min_new_tokens = max_new_tokens = 15 forces exactly 15 tokens, for timing.

        Raises: ValueError on tokens of the wrong shape, type or device and on options out of range.
        """
        check_tokens(tokens, self.input_dim, self.device)
        check_search_options(num_beams, max_new_tokens, min_new_tokens, length_penalty)
        with evaluation_mode(self):
            found = beam_search(
                self._step_log_probs,
                self._start(tokens.to(self.dtype), max_new_tokens),
                self._reorder,
                batch_size=tokens.shape[0],
                bos_id=self.vocabulary.bos_id,
                eos_id=self.vocabulary.eos_id,
                pad_id=self.vocabulary.pad_id,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                length_penalty=length_penalty,
                device=tokens.device,
            )
        return found.sequences, found.margins

    def _step_log_probs(self, last_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        hidden, state = self._step(last_ids, state)
        log_probs = torch.log_softmax(self.output(hidden).float(), dim=-1)
        for banned in (self.vocabulary.pad_id, self.vocabulary.bos_id, self.vocabulary.unk_id):
            log_probs[:, banned] = float("-inf")  # no words of a caption
        return log_probs, state

    def encode(self, captions: list[str]) -> Tensor:
        """Target ids [B, T] int64 on the decoder's device: the caption's words, <eos>, then <pad>."""
        return self.vocabulary.encode_batch(captions).to(self.device)

    def decode(self, ids: Tensor, *, max_words: int | None = MAX_CAPTION_WORDS) -> list[str]:
        """Captions of ids [B, T], up to <eos>, cut to `max_words` words (None: not cut)."""
        if ids.ndim != 2:
            raise ValueError(f"ids must have shape [B, T], got {tuple(ids.shape)}")
        return [self.vocabulary.decode(row, max_words) for row in ids.tolist()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and vocabulary.json. NotADirectoryError where `folder` is a file."""
        content = {"decoder": self.kind, "random_weights": self.random_weights, **self.config.to_dict()}
        write_folder(folder, content, self.state_dict())
        self.vocabulary.save(Path(folder) / _VOCABULARY_FILE)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Read what `save_pretrained` wrote, in evaluation mode; `dtype=None` keeps the stored type.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, holds another kind of decoder or an unknown option, or does not fit the rest.
        """
        content, weights = read_folder(folder)
        kind, random_weights = content.pop("decoder", None), content.pop("random_weights", None)
        if kind != cls.kind:
            raise ValueError(f'{folder} holds a decoder of kind "{kind}", expected "{cls.kind}"')
        if not isinstance(random_weights, bool):
            raise ValueError(f"random_weights in {Path(folder) / CONFIG_NAME} must be true or false")
        with torch.device("meta"):
            decoder = cls(cls.config_class.from_dict(content), Vocabulary.load(Path(folder) / _VOCABULARY_FILE))
        assign_strictly(decoder, weights, Path(folder) / WEIGHTS_NAME)
        decoder.random_weights = random_weights
        return decoder.to(device=device, dtype=dtype).eval()
