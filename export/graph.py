"""What is exported: modules with flat inputs and outputs, what they are held against, and their shapes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError

from evc_fast.data.clip import ClipTowers
from evc_fast.export.requirements import ExportError
from evc_fast.export.signature import Signature, TensorSpec
from evc_fast.model.encoder import FaceNetEncoder

GRAPHS = ("straight", "folded")


@dataclass(frozen=True)
class Graph:
    """A module that takes and gives plain tuples of tensors, with everything that an exporter needs to know of it.

    ``name``: beginning of its artefacts' file names. ``typical``: the sizes that the shapes were meant for.
    """

    name: str
    model: str
    variant: str
    module: nn.Module
    dtype: torch.dtype
    signature: Signature
    typical: Mapping[str, int]

    def example(self, device: str = "cpu") -> tuple[Tensor, ...]:
        """Inputs to trace with; sizes that vary are at least 2, since 1 would be taken for a constant."""
        sizes = {name: max(2, self.typical[name]) for name in self.signature.dimensions}
        generator = torch.Generator().manual_seed(0)
        return tuple(
            random_tensor(spec, self.signature.shape(spec, sizes), generator).to(device, spec.dtype)
            for spec in self.signature.inputs
        )

    def program(self, device: str = "cpu") -> torch.export.ExportedProgram:
        """The module traced on ``device``, where it is left. Raises ExportError where a size would not vary."""
        module = self.module.to(device)
        try:
            with torch.no_grad():
                return torch.export.export(module, self.example(device), dynamic_shapes=self.dynamic_shapes())
        except UserError as error:
            raise ExportError(f"{self.name} cannot be traced: {str(error).splitlines()[0]}") from error

    def dynamic_shapes(self) -> tuple[tuple[dict[int, Any], ...]]:
        """For torch.export, of the module's one variadic argument."""
        ranges = self.signature.dimensions
        dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in ranges.items()}
        return (
            tuple(
                {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
                for spec in self.signature.inputs
            ),
        )


def random_tensor(spec: TensorSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A float32 (or int64) tensor fit for the input ``spec``: cosines below 0 too, ids that repeat, else normal."""
    if spec.name == "groups":
        return torch.randint(0, 3, shape, generator=generator)
    if spec.name == "similarity":
        return torch.rand(shape, generator=generator) * 1.4 - 0.4
    return torch.randn(shape, generator=generator)


class _FlatEncoder(nn.Module):
    """The encoder, straight or folded, in plain PyTorch: features in order in, tokens and emotion logits out."""

    def __init__(self, encoder: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = names

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(**dict(zip(self.names, features, strict=True)), impl="reference")
        return (output.tokens,) if output.emotion_logits is None else (output.tokens, output.emotion_logits)


class _PatchProduct(nn.Module):
    """The patch embedding, a convolution whose stride is its kernel, as one product of patches.

    ONNX's convolution takes bfloat16 from opset 22 on only, and no runtime is the worse for a product.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.patch = convolution.kernel_size[0]
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1).clone())  # [width, 3 patch patch]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[F, 3, S, S] -> [F, width, S / patch, S / patch]; what is beyond whole patches is not read."""
        patch, grid = self.patch, pixel_values.shape[-1] // self.patch
        whole = pixel_values[..., : grid * patch, : grid * patch]
        patches = whole.unflatten(3, (grid, patch)).unflatten(2, (grid, patch)).permute(0, 2, 4, 1, 3, 5)
        return (patches.flatten(3) @ self.weight.T).permute(0, 3, 1, 2)


class _FlatTower(nn.Module):
    """CLIP's image tower with its projection, and not its text tower."""

    def __init__(self, vision: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.vision.embeddings.patch_embedding = _PatchProduct(vision.embeddings.patch_embedding)
        self.projection = projection

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        (pixel_values,) = features
        return (self.projection(self.vision(pixel_values=pixel_values).pooler_output),)


def encoder_graph(encoder: FaceNetEncoder, variant: str, dtype: torch.dtype) -> Graph:
    """The encoder with weights in ``dtype``; ``variant`` "straight", or "folded" for N = ``num_frames`` frames only.

    The encoder itself stays as it is.
    """
    config = encoder.config
    straight = copy.deepcopy(encoder).float().eval().requires_grad_(False)
    folded = variant == "folded"
    # A copy of a fold no longer watches the encoder that it was made from, which no graph could hold.
    module = copy.deepcopy(straight.fold(num_frames=config.num_frames)) if folded else straight
    frames: int | str = config.num_frames if folded else "frames"
    inputs = [TensorSpec("video", dtype, ("batch", frames, config.video_dim))]
    if config.retrieval:
        k = config.num_triplets
        inputs.append(TensorSpec("triplets", dtype, ("batch", k, 3, config.text_dim)))
        inputs.append(TensorSpec("similarity", torch.float32, ("batch", k)))
        if config.merge_identical_triplets:
            inputs.append(TensorSpec("groups", torch.int64, ("batch", k)))
    outputs = [TensorSpec("tokens", dtype, ("batch", config.num_queries, config.output_dim))]
    if config.emotion_augmentation:
        outputs.append(TensorSpec("emotion_logits", dtype, ("batch", config.num_emotions)))
    typical = {"batch": 3} | ({} if folded else {"frames": config.num_frames})
    return Graph(
        name=f"encoder.{variant}",
        model="encoder",
        variant=variant,
        module=_FlatEncoder(module.to(dtype), tuple(spec.name for spec in inputs)).eval(),
        dtype=dtype,
        signature=Signature(tuple(inputs), tuple(outputs), dict.fromkeys(typical, (1, None))),
        typical=typical,
    )


def tower_graph(towers: ClipTowers, dtype: torch.dtype) -> Graph:
    """The image tower of ``towers``, made by transformers with ``engine="library"``, with weights in ``dtype``."""
    clip = towers.model.clip
    module = _FlatTower(copy.deepcopy(clip.vision_model), copy.deepcopy(clip.visual_projection)).to(dtype).eval()
    size = towers.image_size
    return Graph(
        name="image_tower",
        model="image_tower",
        variant="straight",
        module=module.requires_grad_(False),
        dtype=dtype,
        signature=Signature(
            (TensorSpec("pixel_values", dtype, ("frames", 3, size, size)),),
            (TensorSpec("image_embeds", dtype, ("frames", towers.image_dim)),),
            {"frames": (1, None)},
        ),
        typical={"frames": 4},
    )
