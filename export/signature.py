"""What an artefact takes and gives: names, types and shapes, as its manifest entry holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evc_fast.export.requirements import ExportError

# The name on the command line and in a file's name, to the type.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Inputs of each model, in the order of a call; an artefact takes those that its configuration reads.
MODELS = {"encoder": ("video", "triplets", "similarity", "groups"), "image_tower": ("pixel_values",)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A name in ``shape`` stands for a size that varies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}] {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in the order of the call; ``dimensions``: the range of each size that varies, None is open."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: Mapping[str, tuple[int, int | None]]

    def shape(self, spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of ``spec`` at given ``sizes``."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)

    def sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The sizes that vary, from input tensors in order.

        Raises TypeError or ValueError, which names the input, where one does not fit.
        """
        sizes: dict[str, int] = {}
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            if tensor.dtype != spec.dtype:
                raise TypeError(f"{spec.name} must be {spec}, got {dtype_name(tensor.dtype)}")
            if tensor.dim() != len(spec.shape):
                raise ValueError(f"{spec.name} must be {spec}, got shape {list(tensor.shape)}")
            for want, have in zip(spec.shape, tensor.shape, strict=True):
                expected = sizes.setdefault(want, have) if isinstance(want, str) else want
                if have != expected:
                    where = f" with {want} = {expected}" if isinstance(want, str) else ""
                    raise ValueError(f"{spec.name} must be {spec}{where}, got shape {list(tensor.shape)}")
        for name, (least, most) in self.dimensions.items():
            if sizes[name] < least or (most is not None and sizes[name] > most):
                bounds = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ValueError(f"{name} must be {bounds} for this artefact, got {sizes[name]}")
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """JSON types, inverse of :meth:`from_dict`."""
        sides = {
            side: [{"name": s.name, "dtype": dtype_name(s.dtype), "shape": list(s.shape)} for s in specs]
            for side, specs in (("inputs", self.inputs), ("outputs", self.outputs))
        }
        return sides | {"dimensions": {name: list(bounds) for name, bounds in self.dimensions.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signature:
        """Raises ExportError where ``values`` is not what :meth:`to_dict` makes."""
        try:
            sides = [
                tuple(TensorSpec(s["name"], getattr(torch, s["dtype"]), tuple(s["shape"])) for s in values[side])
                for side in ("inputs", "outputs")
            ]
            return cls(*sides, {name: (low, high) for name, (low, high) in values["dimensions"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(f"the manifest describes an artefact's inputs or outputs wrongly: {error!r}") from error
