"""What a training run is made of, strictly validated; read from YAML, and saved with the run as it was resolved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_type_hints

from evc_fast.model import decoders
from evc_fast.model.config import FaceNetConfig
from evc_fast.model.decoders.base import SmallDecoderConfig
from evc_fast.training.config_files import ConfigError, Origin, apply_override, plain_yaml, preset_path, read_layers

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"training needs {error.name}: pip install 'evc-fast[train]'", name=error.name) from error

__all__ = [
    "CaptionFile",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OptimiserConfig",
    "RunConfig",
    "TrainerConfig",
    "differing_keys",
    "load_config",
]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_FROM_THE_DATA = ("video_dim", "text_dim", "emotion_dim", "num_emotions", "output_dim")
"""Fields of FaceNetConfig that no file may set: they follow from features, dictionary and decoder."""
_MAY_CHANGE = ("output", "data", "trainer")
"""Sections in which a resumed run may differ; data are held against their fingerprint instead."""
_MUST_STAY = ("batch_size", "micro_batch_size", "clip_norm", "precision", "gradient_checkpointing")
"""Keys of ``trainer`` on which a step's numbers depend."""


class Section(BaseModel):
    """Keys of one section; unknown ones and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class CaptionFile(Section):
    path: str
    id_prefix: str = ""
    """Put before every video id, where two files number their videos alike."""


class DataConfig(Section):
    """Where the data stands. Relative paths count from where the command runs."""

    captions: list[CaptionFile] = []
    """Training captions."""
    validation_captions: list[CaptionFile] = []
    """Empty: ``validation_share`` of the training videos, with all their captions, is set apart."""
    validation_share: Share = 0.1
    """0 trains without validation: no early stopping, and the last model is the best one."""
    split_seed: Seed = 0
    features: str | None = None
    """Folder of frame features (`evc-fast features`)."""
    repository: str | None = None
    """Folder of the caption repository (`evc-fast index`); none where model.encoder.retrieval is false."""
    emotions: str | None = None
    """Folder of the emotion dictionary, one text file a category; none takes the package's own."""
    word_vectors: str | None = None
    """GloVe text or .npy of the emotion words, E_0; none takes CLIP's text features of them."""
    word_vector_dim: Positive | None = None
    """Width that ``word_vectors`` must have; none takes the file's."""
    clip: str | None = None
    """Name or folder of the CLIP towers; needed where ``word_vectors`` is not given."""
    quarantine: str | None = None
    """List of videos that `evc-fast data check` refused; training skips them."""
    max_skipped: Share = 0.1
    """Training stops before it begins where a larger share of its videos is quarantined or has no features."""


EncoderConfig = create_model(
    "EncoderConfig",
    __base__=Section,
    **{
        name: (kind, FaceNetConfig.__dataclass_fields__[name].default)
        for name, kind in get_type_hints(FaceNetConfig).items()
        if name not in _FROM_THE_DATA
    },
)
EncoderConfig.__doc__ = "Fields of FaceNetConfig that do not follow from the data."


class LoraConfig(Section):
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.05


class DecoderConfig(Section):
    """``name``: lstm or transformer (of the encoder's width, on words), t5 or opt (an LLM with LoRA)."""

    name: Literal["lstm", "transformer", "t5", "opt"] = "transformer"
    dropout: Share = 0.1
    """Of a small decoder."""
    options: dict[str, int] = {}
    """Sizes of a small decoder: num_layers, num_heads, ffn_dim (transformer), hidden_dim (lstm)."""
    min_count: Positive = 1
    """How often a word must occur to be in a small decoder's vocabulary."""
    checkpoint: str | None = None
    """Of an LLM: name, or folder with weights and tokenizer."""
    prompt: str | None = None
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of an LLM's frozen weights."""

    @model_validator(mode="after")
    def _check(self) -> DecoderConfig:
        llm = self.name in ("t5", "opt")
        if llm and self.checkpoint is None:
            raise ValueError(f"checkpoint must be given for the decoder {self.name}")
        if llm and self.options:
            raise ValueError(f"options must be left out for the decoder {self.name}: its checkpoint has its sizes")
        if not llm and (self.checkpoint is not None or self.prompt is not None):
            raise ValueError(f"checkpoint and prompt must be left out for the decoder {self.name}")
        if not llm:
            small_decoder_config(self.name).from_dict({"dropout": self.dropout, **self.options})
        return self


def small_decoder_config(name: str) -> type[SmallDecoderConfig]:
    """The class of a small decoder's own configuration."""
    return decoders.LSTMDecoderConfig if name == "lstm" else decoders.TransformerDecoderConfig


class ModelConfig(Section):
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        try:
            FaceNetConfig(**self.encoder.model_dump())
        except TypeError as error:
            raise ValueError(str(error)) from error
        return self


class LossConfig(Section):
    delta: Weight = 0.1
    """A target that is (a piece of) an emotion word counts 1 + delta, (30)."""
    lambda_e: Weight = 1.0
    lambda_cls: Weight = 0.1
    """Of (32)."""


class OptimiserConfig(Section):
    """Adam."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 7e-4
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), strict=False)
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    weight_decay: Weight = 0.0
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at the last step of the last epoch."""


class TrainerConfig(Section):
    epochs: Positive = 30
    batch_size: Positive = 32
    """Captions of one optimiser step, whatever the number of processes."""
    micro_batch_size: Positive | None = None
    """How many of them a process computes at once, accumulating gradients; none: its whole share."""
    clip_norm: Weight = 5.0
    """Largest norm of all gradients together; 0 does not clip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The two others compute in 16 bits under autocast; weights and sums stay float32."""
    gradient_checkpointing: bool = False
    """Activations are computed again in the backward pass instead of being kept."""
    device: Literal["auto", "cpu"] = "auto"
    patience: Positive | None = 5
    """Validations without a better CFS after which training stops; none never stops early."""
    evaluate_every: Positive = 1
    """Epochs between validations."""
    num_beams: Positive = 5
    max_new_tokens: Positive = 32
    """Of the captions of the validation."""
    save_every: Positive | None = 500
    """Steps between checkpoints; one is saved after each epoch as well."""
    keep: Positive = 2
    """Checkpoints that are kept."""
    log_every: Positive = 10
    """Steps between the lines that are printed and shown in TensorBoard; log.jsonl has every step."""
    tensorboard: bool = True


class RunConfig(Section):
    """All of a run."""

    seed: Seed = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    trainer: TrainerConfig = TrainerConfig()
    output: str | None = None
    """Folder of the run: configuration, logs, checkpoints, the best model."""

    def encoder_config(self, **from_the_data: int) -> FaceNetConfig:
        """The encoder's configuration, with the widths and counts that the data and the decoder bring."""
        return FaceNetConfig(**self.model.encoder.model_dump(), **from_the_data)

    def to_yaml(self) -> str:
        """The whole configuration, fit for :func:`load_config`."""
        return plain_yaml(self.model_dump(mode="json"))


def load_config(source: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's configuration from a file or preset, then changed by ``overrides``.

    Args:
        source: a YAML file, or the name of a preset (`evc-msvd`, `evc-ve`, `evc-combine`, `toy`); None: all defaults.
            A file that says ``preset: NAME`` changes that preset.
        overrides: "section.key=value", the value as YAML; a list's elements by their number: "data.captions.0.path=x".

    Raises:
        FileNotFoundError: no such file, and no preset of this name.
        ConfigError: what is wrong, with its file and line or its override: not YAML, an unknown key (and the nearest
            valid one), a key given twice, or a value that does not fit.
    """
    tree, origin = ({}, Origin()) if source is None else read_layers(preset_path(source))
    for override in overrides:
        apply_override(tree, override, origin)
    _refuse_unknown(tree, RunConfig, (), origin)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        keys = tuple(part for part in first["loc"] if isinstance(part, str | int))
        if first["type"] == "value_error":  # of our own validators, which say what was given
            raise ConfigError(f"{origin.of(keys)}: {first['ctx']['error']}") from None
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
        raise ConfigError(f"{origin.of(keys)}: {message}") from None


def _refuse_unknown(value: Any, kind: Any, keys: tuple[str | int, ...], origin: Origin) -> None:
    """Raise ConfigError on the first key in the tree that no section has."""
    section = _section_of(kind)
    if section is None:
        return
    if isinstance(value, list):
        for number, element in enumerate(value):
            _refuse_unknown(element, kind, (*keys, number), origin)
        return
    if not isinstance(value, dict):
        if keys and section is kind:
            raise ConfigError(f"{origin.of(keys)}: must be a section with keys of its own, got {value!r}")
        return
    for key, below in value.items():
        path = (*keys, key)
        if key not in section.model_fields:
            raise ConfigError(origin.unknown(path, list(section.model_fields), _all_paths(RunConfig)))
        _refuse_unknown(below, section.model_fields[key].annotation, path, origin)


def _section_of(kind: Any) -> type[Section] | None:
    """The section that an annotation is, or that its list holds."""
    candidates = (kind, *getattr(kind, "__args__", ()))
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)


def _all_paths(section: type[Section], before: str = "") -> list[str]:
    """Every key of the configuration, "trainer.batch_size"."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(before + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            paths += _all_paths(field.annotation, f"{before}{name}.")
    return paths


def differing_keys(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What of two configurations differs though a step's numbers depend on it: "optimiser.lr was 0.1, is 0.2"."""
    saved, given = _flat(saved), _flat(given)
    return [
        f"{key} was {saved.get(key)!r}, is {given.get(key)!r}"
        for key in sorted(saved | given)
        if saved.get(key) != given.get(key) and _must_stay(key, saved)
    ]


def _must_stay(key: str, saved: dict[str, Any]) -> bool:
    section, _, name = key.partition(".")
    if key == "trainer.epochs":  # the cosine ends with them
        return saved.get("optimiser.schedule") == "cosine"
    return section not in _MAY_CHANGE or (section == "trainer" and name in _MUST_STAY)


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat
