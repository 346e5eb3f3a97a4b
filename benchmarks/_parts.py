"""The captioner that a row measures: every part in its true shape with random weights.

A part that is not installed is replaced by fixed random data of the right shape, so that the rest can be measured: its
stage then reads "not measured".
"""

from __future__ import annotations

import dataclasses
import hashlib
from types import SimpleNamespace

import torch
from _machine import available_memory, missing_package
from _stages import ENCODER, STEP, TOWER, ProbedPipeline

from evc_fast.data.repository import Retrieved
from evc_fast.pipeline import REPOSITORY_SIZE, random_model, random_repository

DECODERS = ("flan-t5-xl", "opt-2.7b", "lstm", "transformer")
LLMS = ("flan-t5-xl", "opt-2.7b")
NUM_BEAMS = 5
NEW_TOKENS = 15
PROCESS_BYTES = 850_000_000  # the libraries, the repository, and what one caption holds on its way
QUICK_PROCESS_BYTES = 700_000_000

TINY = {"flan-t5-xl": "tiny-t5", "opt-2.7b": "tiny-opt", "lstm": "lstm", "transformer": "transformer"}
TINY_CONFIG = {"dim": 32, "num_frames": 4, "num_queries": 8, "num_emotions": 20, "emotion_dim": 16}
TINY_REPOSITORY = 500


class NotMeasured(Exception):
    """Why a row cannot be measured here; the row says so and is skipped."""


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """One measured row: all that its process is told."""

    method: str
    decoder: str
    impl: str | None
    device: str
    dtype: str
    threads: int
    batch: int | None
    quick: bool
    video: str | None
    repeats: int | None
    budget: float
    """Seconds for the timed captions; three are timed even if that takes up to three times as long."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def engine(self) -> str | None:
        """Of the image tower: transformers' own path beside the reference ops, else what is fastest here."""
        return "library" if self.impl == "reference" else None


@dataclasses.dataclass
class Captioner:
    """What is measured, and what was counted before an adapter was merged into its LLM."""

    pipeline: ProbedPipeline
    parameters: dict[str, int]
    not_measured: dict[str, str]
    """Stages whose part is not installed, and what they need."""
    tower_dtype: torch.dtype
    trained: tuple[str, ...]
    """Stages of the paper's accounting: modules that are trained, without CLIP and LLM."""


def parameter_counts(decoder: str, quick: bool) -> dict[str, int]:
    """Parameters of the decoder and of CLIP in the shape that a row has, without memory."""
    clip = 151_277_313
    if decoder not in LLMS:
        return {"decoder": 20_000_000, "clip": 0 if quick else clip}
    from evc_fast.model.decoders.llm_random import llm_on_meta

    llm = llm_on_meta(TINY[decoder] if quick else decoder)
    return {"decoder": sum(weight.numel() for weight in llm.parameters()), "clip": 0 if quick else clip}


def bytes_needed(spec: RowSpec) -> int:
    """Estimate of what the row's process takes at its peak: weights in their types, and what is around them."""
    counts = parameter_counts(spec.decoder, spec.quick)
    item = spec.torch_dtype.itemsize if spec.decoder in LLMS else 4
    around = QUICK_PROCESS_BYTES if spec.quick else PROCESS_BYTES
    return counts["decoder"] * item + counts["clip"] * 4 + around


def check_row(spec: RowSpec) -> None:
    """Raise :class:`NotMeasured` where the row cannot run: a package, the device or the memory is missing."""
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise NotMeasured(f"no device {spec.device}: this PyTorch sees no GPU")
    if spec.decoder in LLMS:
        missing = missing_package("transformers", "peft")
        if missing is not None:
            raise NotMeasured(f"needs {missing}")
    needed, available = bytes_needed(spec), available_memory(spec.device)
    if available is not None and needed > available:
        kind = "GPU memory" if spec.device.startswith("cuda") else "memory"
        raise NotMeasured(f"needs about {needed / 1e9:.1f} GB of {kind}, {available / 1e9:.1f} GB is free")


def build(spec: RowSpec) -> Captioner:
    """All parts, with stand-ins for what is not installed; an LLM's adapter is counted, then merged."""
    not_measured = {}
    tower_dtype = torch.float32
    if missing_package("transformers") is None:
        from evc_fast.data.clip import ClipTowers

        towers = ClipTowers.random("tiny" if spec.quick else "ViT-B/32", device=spec.device, engine=spec.engine)
        tower_dtype = towers.dtype if towers.image_tower is None else towers.image_tower.dtype
    else:
        not_measured[TOWER] = "needs transformers"
        towers = StandInTowers(spec)
    if missing_package("faiss") is None:
        repository = random_repository(towers, TINY_REPOSITORY if spec.quick else REPOSITORY_SIZE)
    else:
        not_measured["retrieval"] = "needs faiss"
        repository = StandInRepository(towers)
    model = random_model(
        TINY[spec.decoder] if spec.quick else spec.decoder,
        video_dim=towers.image_dim,
        text_dim=towers.text_dim,
        dtype=spec.torch_dtype,
        device=spec.device,
        config=TINY_CONFIG if spec.quick else None,
    )
    parameters = {
        "trainable": model.trainable_parameters(),
        "encoder": sum(weight.numel() for weight in model.encoder.parameters()),
        "decoder": sum(weight.numel() for weight in model.decoder.parameters()),
        "clip": sum(weight.numel() for weight in towers.model.parameters()),
    }
    parameters["all"] = parameters["encoder"] + parameters["decoder"] + parameters["clip"]
    if spec.decoder in LLMS:
        model.decoder.merge_lora()
    model.requires_grad_(False)  # FlopCounterMode hangs hooks on what requires gradients, which inference mode refuses
    pipeline_class = ProbedPipeline
    if spec.video is None:
        not_measured["video decode"] = "needs av"
        pipeline_class = WithoutVideo
    return Captioner(
        pipeline=pipeline_class(towers, repository, model, impl=spec.impl),
        parameters=parameters,
        not_measured=not_measured,
        tower_dtype=tower_dtype,
        trained=(ENCODER,) if spec.decoder in LLMS else (ENCODER, STEP),
    )


class StandInTowers:
    """Fixed random features in the place of an image tower that is not installed."""

    random_weights = True

    def __init__(self, spec: RowSpec) -> None:
        self.image_dim = self.text_dim = 32 if spec.quick else 512
        self.fingerprint = hashlib.sha256(b"stand-in").hexdigest()
        self.model = torch.nn.Module()
        self.device = spec.device

    def encode_frames(self, frames: torch.Tensor, *, temporal_kernel: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*frames.shape[:-3], self.image_dim, generator=generator).to(self.device)


class StandInRepository:
    """Fixed random triplets in the place of a search that is not installed."""

    random_weights = True

    def __init__(self, towers: object) -> None:
        self.width = towers.text_dim

    def require_encoder(self, fingerprint: str) -> None:
        """Its features are of no encoder: any will do."""

    def __len__(self) -> int:
        return 0

    def search(self, features: torch.Tensor, k: int, exclude_video_ids: list | None = None) -> Retrieved:
        batch = features.shape[0]
        generator = torch.Generator().manual_seed(0)
        return Retrieved(
            indices=torch.arange(k).expand(batch, k),
            similarity=torch.rand(batch, k, generator=generator),
            triplets=torch.randn(batch, k, 3, self.width, generator=generator),
            groups=torch.arange(k).expand(batch, k),
            captions=[["caption"] * k for _ in range(batch)],
            triplet_texts=[[("subject", "verb", "object")] * k for _ in range(batch)],
        )


class WithoutVideo(ProbedPipeline):
    """Fixed random frames in the place of a video file, where no file can be decoded."""

    def read(self, source: object) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(0)
        frames = self.model.encoder.config.num_frames
        pixels = torch.randint(0, 256, (frames, 360, 640, 3), dtype=torch.uint8, generator=generator)
        return SimpleNamespace(frames=pixels, damaged=0)
