"""CLIP's image tower for inference on a CPU: the same function with fewer operations and weights packed once.

What differs from the straight tower, all of it exact algebra:
- The last layer is computed for the class token alone, the only one that is read after it. Its keys and values are not
  made at all: q_h (y W_k)^T = (q_h W_k^T) y^T and p_h (y W_v) = (p_h y) W_v for tokens y and weights p_h that sum to 1;
  the keys' bias adds the same to all scores of a query, which the softmax does not see.
- The patch embedding is one product of the frames' 8-bit levels: CLIP's normalisation is in its weights and its bias.
- q, k and v are one product. Quick GELU, x sigmoid(1.702 x), is the SiLU of a product whose weights are scaled by
  1.702, and the inverse scales the weights behind it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from evc_fast.ops._library import EXTENSION_MISSING
from evc_fast.ops.dispatch import CPP_DTYPES
from evc_fast.ops.packed_linear import PackedLinear

ProductKind = Literal["own", "onednn", "torch"]
PRODUCTS = ("own", "onednn", "torch")
# The first that runs is taken. Measured on AVX2, one thread, the whole of ViT-B/32 in float32: own 1.05 times oneDNN's
# speed, 1.08 times torch's. In bfloat16 oneDNN has the matrix units (AMX) too, and own multiplies without any bfloat16
# instruction at float32's speed, where torch's product takes several times as long.
_PREFERENCE = {
    torch.float32: ("own", "onednn", "torch"),
    torch.bfloat16: ("onednn", "own", "torch"),
    torch.float64: ("own", "torch"),
}

_QUICK_GELU = 1.702
_ACTIVATIONS = ("quick_gelu", "gelu")
# Rows (tokens of all frames) of one pass through the layers: enough for products at full speed, few enough to keep what
# passes between them in the last-level cache.
_ROWS = 1024


def fastest_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware (AVX512-BF16 or AMX), else float32.

    Elsewhere bfloat16 buys no time, half the memory at most.
    """
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if in_hardware and choose_product(None, torch.bfloat16) != "torch" else torch.float32


def product_obstacle(product: ProductKind, dtype: torch.dtype) -> str:
    """Why this product cannot multiply by weights of `dtype` here, or ""."""
    if product == "own":
        return EXTENSION_MISSING or ("" if dtype in CPP_DTYPES else f"the compiled library has no {dtype}")
    if product == "torch":
        return ""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return "this build of torch has no oneDNN for x86-64"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return ""
    return f"oneDNN does not multiply {dtype} by packed weights on this processor"


def obstacle(clip: nn.Module) -> str:
    """Why no `ImageTower` can be made of this module, or "": it must be transformers' CLIPModel as it is published."""
    config = getattr(getattr(clip, "config", None), "vision_config", None)
    if config is None or not hasattr(clip, "vision_model") or not hasattr(clip, "visual_projection"):
        return f"{type(clip).__name__} is not transformers' CLIPModel"
    if config.hidden_act not in _ACTIVATIONS:
        return f"its activation is {config.hidden_act!r}, not {' or '.join(map(repr, _ACTIVATIONS))}"
    if config.num_channels != 3:
        return f"its images have {config.num_channels} channels, not 3"
    for part in (clip.vision_model, clip.visual_projection):
        for name, module in part.named_modules():
            # An adapter wraps a linear map; transformers' own and torch's modules are what is folded here.
            if type(module).__module__.partition(".")[0] not in ("transformers", "torch"):
                return f"its {name} is a {type(module).__name__}, which is not CLIP's"
    return ""


class ImageTower(nn.Module):
    """The image tower of transformers' CLIPModel `clip` with its projection, for inference on a CPU.

    mean, std: of CLIP's normalisation, 3 numbers each, of channels in 0..1.
    dtype: of the weights and the products' inputs, `fastest_dtype()` where None. Sums, residuals and norms have float32
    (float64 for float64). With `product="own"` a 16-bit type is that of the weights alone.
    product: what multiplies: "own" (`evc_fast.ops.packed_linear`), "onednn" (torch's oneDNN, weights packed) or "torch"
    (no packing). None takes the fastest that this build and machine have for `dtype`.
    release: leaves `clip`'s image tower and projection without their weights, on the meta device in `dtype`. Each layer
    is freed as soon as it is packed, so that two copies of the whole never exist.

    With the own product a frame's feature is the same to the bit beside any other frames and with any number of
    threads; oneDNN splits the rows of narrow towers by their number. Attributes: dtype, product, image_size (pixels).

    Raises ValueError where `obstacle(clip)` says why, where `clip` is not on a CPU, for a dtype that is not
    floating-point and for unknown products; RuntimeError for a `product` that this machine or build does not have.
    """

    def __init__(
        self,
        clip: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype | None = None,
        product: ProductKind | None = None,
        release: bool = False,
    ) -> None:
        super().__init__()
        reason = obstacle(clip)
        if reason:
            raise ValueError(f"no image tower can be made of clip: {reason}")
        vision, config = clip.vision_model, clip.config.vision_config
        device = vision.embeddings.class_embedding.device
        if device.type != "cpu":
            raise ValueError(f"clip must be on a CPU, not on {device}")
        self.dtype = fastest_dtype() if dtype is None else dtype
        self.product = choose_product(product, self.dtype)
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.grid = config.image_size // config.patch_size  # pixels beyond the last whole patch are not read
        self.tokens = self.grid**2 + 1
        with torch.no_grad():
            self._build_embedding(vision.embeddings, mean, std)
            self.pre_norm = _Norm(vision.pre_layrnorm, _accumulate(self.dtype))
            self.post_norm = _Norm(vision.post_layernorm, _rows_dtype(self.dtype, self.product))
            self.projection = Product(clip.visual_projection.weight, None, self.dtype, self.product)
            self.blocks = nn.ModuleList()
            for layer in vision.encoder.layers:
                block = _Block if layer is not vision.encoder.layers[-1] else _LastBlock
                self.blocks.append(block(layer, config, self.dtype, self.product))
                if release:
                    layer.to("meta", self.dtype)
        if release:
            vision.to("meta", self.dtype)
            clip.visual_projection.to("meta", self.dtype)
        self.eval()

    def _build_embedding(self, embeddings: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """W ((x / 255 - mean) / std) = W' x + b' for levels x in 0..255, which bfloat16 holds exactly."""
        between = _accumulate(self.dtype)
        offset, scale = (255 * torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        weight = embeddings.patch_embedding.weight.permute(0, 2, 3, 1)  # channels last, as decoded frames lie in memory
        weight = (weight / scale).to(self.dtype)
        # Of the weights as they are rounded: the mean colour is then embedded as 0, whatever the type.
        bias = -(weight.sum((1, 2), dtype=torch.float64) @ offset)
        self.patches = Product(weight.flatten(1), bias, self.dtype, self.product)
        positions = embeddings.position_embedding.weight.to(between, copy=True)
        positions[0] += embeddings.class_embedding
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("offset", offset.to(between), persistent=False)
        self.register_buffer("scale", scale.to(between), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised frames [n, 3, S, S] -> `image_embeds` [n, width], float32 (float64), not L2-normalised.

        No gradients. Raises ValueError for another shape.
        """
        self._check("pixel_values", pixel_values)
        return self._features(pixel_values.permute(0, 2, 3, 1) * self.scale + self.offset)

    def encode_levels(self, levels: Tensor) -> Tensor:
        """`forward` of levels 0..255 [n, 3, S, S] of any type, fastest as uint8 with channels last in memory."""
        self._check("levels", levels)
        return self._features(levels.permute(0, 2, 3, 1))

    def _check(self, name: str, images: Tensor) -> None:
        shape = (3, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(f"{name} must be [n, {', '.join(map(str, shape))}], not {list(images.shape)}")

    @torch.no_grad()
    def _features(self, levels: Tensor) -> Tensor:
        """[n, S, S, 3] -> [n, width]."""
        frames = max(1, _ROWS // self.tokens)
        return torch.cat([self._encode(part) for part in levels.split(frames)])

    def _encode(self, levels: Tensor) -> Tensor:
        count, grid, size = len(levels), self.grid, self.patch_size
        used = levels[:, : grid * size, : grid * size].unflatten(1, (grid, size)).unflatten(3, (grid, size))
        # The one pass from levels to the product's rows: [n, grid, grid, size, size, 3].
        rows = torch.empty(count, grid, grid, size, size, 3, dtype=_rows_dtype(self.dtype, self.product))
        rows.copy_(used.transpose(2, 3))
        embedded = self.patches(rows.view(count * grid * grid, 3 * size * size))
        hidden = self.positions.repeat(count, 1, 1)
        hidden[:, 1:] += embedded.view(count, *self.positions[1:].shape)
        hidden = self.pre_norm(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.projection(self.post_norm(hidden)).to(hidden.dtype)


class _Block(nn.Module):
    """One layer on all tokens, [n, tokens, width]; its input is its workspace."""

    def __init__(self, layer: nn.Module, config: Any, dtype: torch.dtype, product: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        rows = _rows_dtype(dtype, product)
        self.norm1, self.norm2 = _Norm(layer.layer_norm1, rows), _Norm(layer.layer_norm2, rows)
        self._build_attention(layer.self_attn, dtype, product)
        out, first, second = layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2
        self.out = Product(out.weight, out.bias, dtype, product)
        activation, slope = config.hidden_act, 1.0
        if activation == "quick_gelu" and product != "own":  # which has the activation in its epilogue
            activation, slope = "silu", _QUICK_GELU
        wide_weight, wide_bias, narrow_weight = (
            tensor if slope == 1 else tensor.to(_accumulate(dtype)) * factor
            for tensor, factor in ((first.weight, slope), (first.bias, slope), (second.weight, 1 / slope))
        )
        self.widen = Product(wide_weight, wide_bias, dtype, product, activation)
        self.narrow = Product(narrow_weight, second.bias, dtype, product)

    def _build_attention(self, attention: nn.Module, dtype: torch.dtype, product: str) -> None:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        self.qkv = Product(weight, bias, dtype, product)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.view(-1, hidden.shape[-1])
        rows = self.out(self._attend(self.norm1(hidden)), rows)
        rows = self.narrow(self.widen(self.norm2(rows)), rows)
        return rows.view(hidden.shape)

    def _attend(self, normed: Tensor) -> Tensor:
        """[n, tokens, width] -> [n tokens, width], before the output projection."""
        count, tokens, width = normed.shape
        qkv = self.qkv(normed.view(-1, width)).view(count, tokens, 3, self.heads, width // self.heads)
        context = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return context.transpose(1, 2).reshape(count * tokens, width)


class _LastBlock(_Block):
    """The last layer for the class token alone: [n, tokens, width] -> [n, width]."""

    def _build_attention(self, attention: nn.Module, dtype: torch.dtype, product: str) -> None:
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        scale = (q.weight.shape[0] // self.heads) ** -0.5
        weight, bias = (tensor.to(_accumulate(dtype)) * scale for tensor in (q.weight, q.bias))
        self.query = Product(weight, bias, dtype, product)
        keys = k.weight.unflatten(0, (self.heads, -1)).transpose(1, 2)  # [heads, width, head width]
        values, biases = v.weight.unflatten(0, (self.heads, -1)), v.bias.unflatten(0, (self.heads, -1))
        # One product a head, not one batched product: torch's depends on how many frames there are.
        self.keys = nn.ModuleList(Product(key, None, dtype, product) for key in keys)
        self.values = nn.ModuleList(
            Product(value, bias, dtype, product) for value, bias in zip(values, biases, strict=True)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden[:, 0].contiguous()
        rows = self.out(self._attend(self.norm1(hidden)), rows)
        return self.narrow(self.widen(self.norm2(rows)), rows)

    def _attend(self, normed: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, width]."""
        queries = self.query(normed[:, 0].contiguous()).chunk(self.heads, -1)
        # In the width of the tokens: [n, heads, width].
        queries = torch.stack([key(q.contiguous()) for key, q in zip(self.keys, queries, strict=True)], 1)
        weights = torch.bmm(queries, normed.transpose(1, 2)).softmax(-1)  # [n, heads, tokens]
        means = torch.bmm(weights, normed).unbind(1)
        return torch.cat([value(mean.contiguous()) for value, mean in zip(self.values, means, strict=True)], -1)


class _Norm(nn.Module):
    """LayerNorm of what passes between the layers, in the type of the rows that the next product takes."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.dtype = norm.eps, dtype
        for name in ("weight", "bias"):
            self.register_buffer(name, getattr(norm, name).detach().to(_accumulate(dtype)), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)


class Product(nn.Module):
    """activation(x weight^T + bias) + residual: [rows, in] -> [rows, out], which may be written into the residual.

    activation: "none", "gelu" or "silu", for the own product "none", "gelu" or "quick_gelu".
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, product: str, activation: str = "none"
    ) -> None:
        super().__init__()
        self.product, self.activation = product, activation
        weight = weight.detach().to(dtype).contiguous()
        # Plain attributes, not buffers: packed weights cannot be moved, cast or saved.
        if product == "own":
            self.linear = PackedLinear(weight, None if bias is None else bias.detach(), activation)
        else:
            self.bias = None if bias is None else bias.detach().to(dtype)
            self.weight = _pack(weight) if product == "onednn" else weight

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.product == "own":
            return self.linear(rows, residual)
        if self.product == "onednn":
            # Its own epilogues of SiLU and of sums were tried: slower than a pass over the product (AVX2).
            output = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        else:
            output = F.linear(rows, self.weight, self.bias)
        if self.activation == "silu":
            F.silu(output, inplace=True)
        elif self.activation == "gelu":
            torch.ops.aten.gelu_(output)
        return output if residual is None else residual.add_(output)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"weight": self.weight.to_dense()} if self.product == "onednn" else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.product == "onednn":
            self.weight = _pack(self.weight)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def choose_product(product: str | None, dtype: torch.dtype) -> str:
    """The product that serves, or an error that says why the one asked for does not."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, not {dtype}")
    if product not in (None, *PRODUCTS):
        raise ValueError(f"product must be one of {', '.join(map(repr, PRODUCTS))} or None, not {product!r}")
    if product is None:
        return next(kind for kind in _PREFERENCE.get(dtype, ("torch",)) if not product_obstacle(kind, dtype))
    reason = product_obstacle(product, dtype)
    if reason:
        raise RuntimeError(f"product {product!r} cannot run: {reason}")
    return product


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _rows_dtype(dtype: torch.dtype, product: str) -> torch.dtype:
    """The type of a product's rows beside weights of `dtype`."""
    return _accumulate(dtype) if product == "own" else dtype


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _linear_pointwise_flops(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows[0] * weight[0] * weight[1]
