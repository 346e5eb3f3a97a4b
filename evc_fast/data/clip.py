"""The frozen CLIP towers: frames to image features and sentences to text features, equations (1), (3), (4) and (8)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from evc_fast.data.image_tower import ImageTower, obstacle
from evc_fast.data.preprocessing import Preprocessing
from evc_fast.data.torchvision_ops import make_torchvision_importable

# Shapes of the towers that `ClipTowers.random` builds: (vision, text, projection width).
_SHAPES: dict[str, tuple[dict[str, int], dict[str, int], int]] = {
    "ViT-B/32": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 32},
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
        512,
    ),
    "ViT-L/14": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 224, "patch_size": 14},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        768,
    ),
    "tiny": (
        {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 32, "patch_size": 8},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999},
        32,
    ),
}

# The token ids of each sentence, start and end token included; rows that are shorter than others are filled up with
# their last token.
Tokenize = Callable[[Sequence[str]], list[list[int]]]

# What computes the image features: `ImageTower`, or the modules of transformers or open_clip as they are.
Engine = Literal["own", "library"]


class ClipTowers:
    """Two frozen towers of one CLIP, in evaluation mode and without gradients; features come out as float32.

    Made by `from_pretrained`, `from_open_clip` or `random`, which share these arguments:
    dtype: of all weights. None: float32, and for the own image tower what its machine multiplies fastest at CLIP's
        accuracy (`image_tower.fastest_dtype`).
    engine: "own" computes image features by `ImageTower`, which runs on a CPU and is made of transformers' CLIP; the
        library's image tower then keeps its parameters' shapes alone, on the meta device. "library" leaves all to
        transformers or open_clip. None: "own" where it can run.

    Attributes:
    model: nn.Module, both towers with their projections: encode_image and encode_text
    image_tower: `ImageTower`, or None where `engine` is "library"; engine: "own" or "library"
    preprocess: `Preprocessing`, frames uint8 [..., H, W, 3] -> pixel_values [..., 3, image_size, image_size]
    image_dim, text_dim: D_v, D_t, equal in CLIP; image_size: pixels; device, dtype: of the text tower's weights
    fingerprint: identifies architecture, weights and preprocessing; a caption repository stores it
    random_weights: True where the weights are noise; name: what the towers were made from
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        width: int,
        preprocess: Preprocessing,
        tokenize: Tokenize | None,
        architecture: Mapping[str, Any],
        random_weights: bool,
        device: str | torch.device,
        dtype: torch.dtype | None,
        engine: Engine | None,
    ) -> None:
        own = _choose_engine(engine, model, torch.device(device), dtype) == "own"
        # Taken of the weights as they are stored, so that it does not depend on what is made of them here.
        self.fingerprint = _fingerprint(model, {**architecture, "preprocessing": repr(preprocess)})
        self.model = model.to(device=device, dtype=dtype or torch.float32).eval().requires_grad_(False)
        if own:
            model.take_image_tower(mean=preprocess.mean, std=preprocess.std, dtype=dtype)
        self.image_tower: ImageTower | None = model.image_tower if own else None
        self.name = name
        self.image_dim = self.text_dim = width
        self.image_size = preprocess.crop
        self.preprocess = preprocess
        self.random_weights = random_weights
        self.device = torch.device(device)
        self.dtype = dtype or torch.float32
        self._tokenize = tokenize

    @property
    def engine(self) -> Engine:
        """What computes the image features."""
        return "library" if self.image_tower is None else "own"

    @property
    def _pixel_dtype(self) -> torch.dtype:
        """The own tower rounds its input by itself."""
        return self.dtype if self.image_tower is None else torch.promote_types(self.dtype, torch.float32)

    @property
    def has_tokenizer(self) -> bool:
        """False where the folder came without tokenizer files: frames can be encoded, sentences cannot."""
        return self._tokenize is not None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        engine: Engine | None = None,
    ) -> ClipTowers:
        """transformers' CLIP, by the name it has on the Hugging Face hub or by a local folder.

        Mean, std and sizes come from its `preprocessor_config.json`; without that file they are CLIP's own.
        Raises FileNotFoundError for a folder that is not there, ValueError for a model that is not CLIP or whose
        checkpoint lacks weights, OSError where the hub cannot be reached.
        """
        make_torchvision_importable()
        from transformers import CLIPConfig, CLIPModel

        name = os.fspath(name)
        if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
            raise FileNotFoundError(f"there is no CLIP folder {name}")
        kind = CLIPConfig.get_config_dict(name)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"{name} holds a model of type {kind!r}, not 'clip'")
        # "auto": as stored, see fingerprint
        model, report = CLIPModel.from_pretrained(name, dtype="auto", output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(
                f"the checkpoint {name} lacks weights of CLIP: {', '.join(sorted(report['missing_keys']))}"
            )
        config = model.config
        return cls(
            _TransformersTowers(model),
            name=name,
            width=config.projection_dim,
            preprocess=_read_preprocessing(name, config.vision_config.image_size),
            tokenize=_load_tokenizer(name, config.text_config),
            architecture=_architecture(config),
            random_weights=False,
            device=device,
            dtype=dtype,
            engine=engine,
        )

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        engine: Engine | None = None,
    ) -> ClipTowers:
        """open_clip's model `name` with the weights `pretrained` (a tag of open_clip's or a file); the `clip` extra.

        `pretrained=None` leaves open_clip's random initial weights, and `random_weights` says so. Raises ImportError
        where open_clip is not installed, ValueError for names and preprocessing that are not CLIP's.
        """
        open_clip = _import_open_clip()
        if name not in open_clip.list_models():
            raise ValueError(f"open_clip has no model {name!r}; open_clip.list_models() names those it has")
        model = open_clip.create_model(name, pretrained=pretrained)
        settings = open_clip.get_model_preprocess_cfg(model)
        if (
            settings.get("resize_mode", "shortest") != "shortest"
            or settings.get("interpolation", "bicubic") != "bicubic"
        ):
            raise ValueError(f"open_clip's {name} has a preprocessing that is not CLIP's: {settings}")
        size = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
        tokenizer = open_clip.get_tokenizer(name)
        return cls(
            model,  # it has the two calls by itself
            name=f"open_clip {name} ({pretrained})",
            width=open_clip.get_model_config(name)["embed_dim"],
            preprocess=Preprocessing(size, size, tuple(settings["mean"]), tuple(settings["std"])),
            tokenize=lambda sentences: tokenizer(list(sentences)).tolist(),  # rows of full length, padded its own way
            architecture={"open_clip": open_clip.get_model_config(name)},
            random_weights=pretrained is None,
            device=device,
            dtype=dtype,
            engine=engine,
        )

    @classmethod
    def random(
        cls,
        shape: str = "ViT-B/32",
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        engine: Engine | None = None,
    ) -> ClipTowers:
        """Towers in the true shape of "ViT-B/32" or "ViT-L/14", or "tiny" ones, with seeded noise for weights.

        Their time and memory are the real model's; their features mean nothing. Sentences are turned into token ids
        by hashing their words, since CLIP's vocabulary is not at hand: see `_hash_words`.
        """
        if shape not in _SHAPES:
            raise ValueError(f"shape must be one of {', '.join(map(repr, _SHAPES))}, not {shape!r}")
        make_torchvision_importable()
        from transformers import CLIPConfig, CLIPModel

        vision, text, width = _SHAPES[shape]
        config = CLIPConfig(
            vision_config=vision | {"projection_dim": width},
            text_config=text | {"projection_dim": width},
            projection_dim=width,
        )
        with torch.device("meta"):
            model = CLIPModel(config)
        model.to_empty(device="cpu")
        _fill_with_noise(model, seed)
        return cls(
            _TransformersTowers(model),
            name=f"{shape} (random weights)",
            width=width,
            preprocess=Preprocessing(vision["image_size"], vision["image_size"]),
            tokenize=lambda sentences: _hash_words(sentences, config.text_config),
            architecture=_architecture(config),
            random_weights=True,
            device=device,
            dtype=dtype,
            engine=engine,
        )

    def encode_frames(self, frames: torch.Tensor, *, temporal_kernel: int = 1, batch_size: int = 64) -> torch.Tensor:
        """Image features of frames: uint8 [N, H, W, 3] -> float32 [N, D_v], or [B, N, H, W, 3] -> [B, N, D_v].

        `image_embeds` with their projection, not L2-normalised. `temporal_kernel`: see `encode_pixels`.
        """
        _check_counts(temporal_kernel=temporal_kernel, batch_size=batch_size)
        if isinstance(frames, torch.Tensor):
            frames = frames.to(self.device)  # resized there; 8-bit frames are the cheapest to move
        if self.image_tower is None or temporal_kernel != 1:
            pixel_values = self.preprocess(frames, self._pixel_dtype)
            return self.encode_pixels(pixel_values, temporal_kernel=temporal_kernel, batch_size=batch_size)
        return self.encode_levels(self.preprocess.levels(frames), batch_size=batch_size)

    def encode_levels(self, levels: torch.Tensor, *, batch_size: int = 64) -> torch.Tensor:
        """Image features of what `preprocess.levels` made of frames: [..., N, 3, S, S] -> float32 [..., N, D_v].

        The same as `encode_frames` of the frames; for frames that another process has resized.
        """
        _check_counts(batch_size=batch_size)
        size = self.image_size
        if levels.dim() < 4 or tuple(levels.shape[-3:]) != (3, size, size) or 0 in levels.shape:
            raise ValueError(f"levels must be [..., N, 3, {size}, {size}], not {list(levels.shape)}")
        if self.image_tower is None:
            pixel_values = self.preprocess.normalise(levels.to(self.device), self._pixel_dtype)
            return self.encode_pixels(pixel_values, batch_size=batch_size)
        return self._encode_images(levels, self.image_tower.encode_levels, batch_size)

    def encode_pixels(
        self, pixel_values: torch.Tensor, *, temporal_kernel: int = 1, batch_size: int = 64
    ) -> torch.Tensor:
        """Image features of preprocessed frames: [..., N, 3, S, S] -> float32 [..., N, D_v], `batch_size` at once.

        `temporal_kernel` t is equation (1)'s 3D patch projection: kernel [t, h, w], temporal stride 1, edge frames
        replicated, the 2D kernel divided by t along time. t = 1, which retrieval always uses, is CLIP itself.
        """
        size = self.image_size
        if pixel_values.dim() < 4 or tuple(pixel_values.shape[-3:]) != (3, size, size) or 0 in pixel_values.shape:
            raise ValueError(f"pixel_values must be [..., N, 3, {size}, {size}], not {list(pixel_values.shape)}")
        _check_counts(temporal_kernel=temporal_kernel, batch_size=batch_size)
        pixel_values = _mean_over_time(pixel_values.to(self.device), temporal_kernel).to(self._pixel_dtype)  # (1)
        return self._encode_images(pixel_values, self.model.encode_image, batch_size)

    def _encode_images(
        self, images: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor], batch_size: int
    ) -> torch.Tensor:
        """[..., N, 3, S, S] -> float32 [..., N, D_v]."""
        with torch.inference_mode():
            parts = images.flatten(0, -4).split(batch_size)
            features = torch.cat([encode(part).float() for part in parts])
        # The copy leaves inference mode behind: what is trained on features must be able to save them for backward.
        return features.clone().view(*images.shape[:-3], self.image_dim)

    def encode_text(
        self,
        sentences: Sequence[str],
        *,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Text features of n sentences -> float32 [n, D_t]: `text_embeds` with their projection, not L2-normalised.

        Sentences beyond the tower's length (77 tokens) are cut, as CLIP cuts them. `progress(done, n)` is called after
        each batch. Raises ValueError where the towers came without tokenizer, TypeError for anything but strings.
        """
        if isinstance(sentences, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise TypeError("sentences must be a sequence of strings")
        if self._tokenize is None:
            raise ValueError(f"{self.name} came without tokenizer files (tokenizer.json, or vocab.json and merges.txt)")
        features = torch.empty(len(sentences), self.text_dim, device=self.device)
        if not sentences:
            return features
        # Sentences of like length share a batch. Attention is causal and the feature is read at the first end token,
        # so that what fills a row up behind it does not count, and no mask is needed.
        tokens = self._tokenize(sentences)
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            length = len(tokens[rows[-1]])
            part = torch.tensor([tokens[row] + tokens[row][-1:] * (length - len(tokens[row])) for row in rows])
            with torch.inference_mode():
                encoded = self.model.encode_text(part.to(self.device)).float()
            features[torch.tensor(rows, device=self.device)] = encoded.clone()
            if progress is not None:
                progress(start + len(rows), len(order))
        return features


class _TransformersTowers(nn.Module):
    """transformers' CLIPModel behind the two calls that `ClipTowers` makes: both with their projection."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip
        self.image_tower: ImageTower | None = None

    def take_image_tower(self, **options: Any) -> None:
        """From here on `ImageTower(clip, **options)` encodes images; the weights become its own."""
        self.image_tower = ImageTower(self.clip, release=True, **options)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.image_tower is not None:
            return self.image_tower(pixel_values)
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=pixel_values).pooler_output)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)


def _choose_engine(engine: str | None, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Engine:
    """The engine that serves, or an error that says why the one asked for does not."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, not {dtype}")
    if engine not in ("own", "library", None):
        raise ValueError(f"engine must be 'own', 'library' or None, not {engine!r}")
    reason = "" if device.type == "cpu" else f"it runs on a CPU, not on {device}"
    reason = reason or obstacle(getattr(model, "clip", model))
    if engine == "own" and reason:
        raise ValueError(f"engine 'own' cannot serve: {reason}")
    return engine or ("library" if reason else "own")


def _check_counts(**counts: int) -> None:
    for argument, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be an integer of at least 1, not {value!r}")


def _mean_over_time(pixel_values: torch.Tensor, kernel: int) -> torch.Tensor:
    """What a 2D kernel inflated to `kernel` frames sees: [..., N, 3, S, S] -> the same shape.

    Its weights are equal along time, and the projection is linear: sum_t (W / t) x_t = W (mean_t x_t). So the window's
    mean goes through CLIP's own 2D projection, which costs 1 / t of the 3D one and serves every tower alike.
    An even window reaches one frame further ahead than back.
    """
    if kernel == 1:
        return pixel_values
    *leading, frames, channels, height, width = pixel_values.shape
    flat = pixel_values.reshape(-1, frames, channels * height * width).transpose(1, 2).float()
    padded = F.pad(flat, ((kernel - 1) // 2, kernel // 2), mode="replicate")
    mean = F.avg_pool1d(padded, kernel, stride=1).transpose(1, 2)
    return mean.reshape(*leading, frames, channels, height, width).to(pixel_values.dtype)


def _hash_words(sentences: Sequence[str], config: Any) -> list[list[int]]:
    """The stand-in tokenizer of random towers: start, one id a word or punctuation mark, end.

    A word's id is its CRC-32 modulo the vocabulary without the two specials, so equal words have equal ids everywhere.
    Real BPE gives captions about as many tokens, since their words are common ones.
    """
    start, end, longest = config.bos_token_id, config.eos_token_id, config.max_position_embeddings
    rows = []
    for sentence in sentences:
        words = re.findall(r"\w+|[^\w\s]", sentence.lower())[: longest - 2]
        rows.append([start, *(zlib.crc32(word.encode()) % (config.vocab_size - 2) for word in words), end])
    return rows


def _load_tokenizer(name: str, config: Any) -> Tokenize | None:
    """The folder's own tokenizer; None where it has none: transformers would make an empty one up."""
    from transformers import CLIPTokenizerFast

    if not _find_file(name, "tokenizer.json") and not (
        _find_file(name, "vocab.json") and _find_file(name, "merges.txt")
    ):
        return None
    tokenizer = CLIPTokenizerFast.from_pretrained(name)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, its text tower embeds only {config.vocab_size}"
        )
    longest = config.max_position_embeddings

    def tokenize(sentences: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(sentences), truncation=True, max_length=longest)["input_ids"]

    return tokenize


def _find_file(name: str, file: str) -> str | None:
    """The path of a model's file, from its folder or from the hub; None where the model has none of that name."""
    from transformers.utils import cached_file

    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def _read_preprocessing(name: str, image_size: int) -> Preprocessing:
    path, key = _find_file(name, "preprocessor_config.json"), None
    if path is None:
        path, key = _find_file(name, "processor_config.json"), "image_processor"
    if path is None:
        return Preprocessing(image_size, image_size)
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    return Preprocessing.from_config(config if key is None else config.get(key, {}), image_size)


def _architecture(config: Any) -> dict[str, Any]:
    """What the weights' shapes leave open."""
    keys = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    return {
        part: {key: getattr(getattr(config, part), key) for key in keys} for part in ("vision_config", "text_config")
    }


@torch.no_grad()
def _fill_with_noise(model: nn.Module, seed: int) -> None:
    """Seeded normal weights of standard deviation fan_in ** -1/2, neutral norms, no biases.

    Drawing 150 M normal numbers takes seconds. So every tensor reads on, round and round, in one table of noise, whose
    odd length keeps the rows of a matrix from starting twice at the same place.
    """
    table = torch.randn((1 << 22) - 3, generator=torch.Generator().manual_seed(seed))
    position = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif parameter.dim() == 0:
            parameter.fill_(2.6592)  # ln(1 / 0.07), CLIP's initial temperature
        else:
            flat, start = parameter.view(-1), 0
            while start < flat.numel():
                step = min(flat.numel() - start, table.numel() - position)
                flat[start : start + step] = table[position : position + step]
                start, position = start + step, (position + step) % table.numel()
            parameter.mul_(parameter[0].numel() ** -0.5 if parameter.dim() > 1 else parameter.numel() ** -0.5)
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise RuntimeError(f"CLIP has a buffer that random weights do not know: {name}")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))


def _fingerprint(model: nn.Module, architecture: Mapping[str, Any]) -> str:
    """SHA-256 of the architecture and of every weight tensor's name, shape and 256 evenly spaced values as float32."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        picked = flat[torch.linspace(0, flat.numel() - 1, min(256, flat.numel()), dtype=torch.float64).long()]
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _import_open_clip() -> Any:
    """The one place where open_clip is imported."""
    make_torchvision_importable()
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"ClipTowers.from_open_clip needs open_clip ({error}): pip install 'evc-fast[clip]', "
            "or use ClipTowers.from_pretrained, which needs nothing more"
        ) from error
    return open_clip
