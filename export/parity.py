"""How far an artefact is from the model it was made from: straight, eager PyTorch in float32.

At least 200 random inputs (videos or frames) over all batch sizes and, where it varies, numbers of frames; features of
several magnitudes, similarities below 0 as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from evc_fast.export.graph import random_tensor
from evc_fast.export.requirements import ExportError
from evc_fast.export.runner import Runner
from evc_fast.export.signature import Signature, dtype_name

INPUTS = 200
MAX_ABS = 1e-4  # of an output in float32
MIN_COSINE = 0.999  # of an output in any type: a video's tokens, or its logits, as one vector
BATCHES = (1, 2, 3, 1, 5, 1, 8, 17)
SCALES = (0.5, 1.0, 0.05)  # CLIP's features spread by about 0.45


class Reference:
    """The model in float32 on random inputs; each is computed once, whatever is held against it.

    Args:
        module: takes what ``signature`` says as a tuple, and gives its outputs as one.
        typical: the sizes that vary, at their usual values.
    """

    def __init__(self, module: nn.Module, signature: Signature, typical: Mapping[str, int], name: str) -> None:
        self.name = name
        self._module = module
        self._signature = signature
        self._typical = typical
        self._batch = signature.inputs[0].shape[0]
        self._outputs: dict[tuple, tuple[Tensor, ...]] = {}

    def cases(self, signature: Signature) -> Iterator[tuple[dict[str, int], list[Tensor], tuple[Tensor, ...]]]:
        """Sizes, float32 inputs and outputs, as an artefact with ``signature`` takes them."""
        done = 0
        for index in count():
            if done >= INPUTS:
                return
            sizes = self._sizes(index, signature)
            inputs = self._inputs(index, sizes)
            key = (index, *sorted(sizes.items()))
            if key not in self._outputs:
                with torch.no_grad():
                    self._outputs[key] = self._module(*inputs)
            yield sizes, inputs, self._outputs[key]
            done += sizes[self._batch]

    def _sizes(self, index: int, signature: Signature) -> dict[str, int]:
        sizes = {}
        for name, usual in self._typical.items():
            if name == self._batch:
                wanted = BATCHES[index % len(BATCHES)]
            else:
                choices = (usual, 1, 2 * usual, 2, usual + 3)
                wanted = choices[index % len(choices)] if name in signature.dimensions else usual
            low, high = signature.dimensions.get(name, (1, None))
            sizes[name] = max(low, wanted if high is None else min(wanted, high))
        return sizes

    def _inputs(self, index: int, sizes: Mapping[str, int]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(index)
        tensors = []
        for spec in self._signature.inputs:
            tensor = random_tensor(spec, self._signature.shape(spec, sizes), generator)
            if spec.name == "similarity":
                tensor = -tensor if index % 5 == 4 else tensor
            elif spec.name != "groups":
                tensor = tensor * SCALES[index % len(SCALES)]
            tensors.append(tensor)
        return tensors


def check_parity(reference: Reference, runner: Runner, *, rounded: bool = False) -> dict[str, Any]:
    """Hold ``runner`` against ``reference``; what was tried and found, for the manifest.

    ``rounded``: its weights are, whatever the type of its outputs.

    Raises:
        ExportError: a float32 output is off by more than ``MAX_ABS``, or the cosine of an output is below
            ``MIN_COSINE``. Engines, and what is computed in 16 bits, are held to the cosine alone.
    """
    signature = runner.signature
    in_float32 = all(spec.dtype == torch.float32 for spec in signature.outputs)
    exact = in_float32 and not rounded and runner.kind != "tensorrt"
    worst = {spec.name: {"max_abs": 0.0, "min_cosine": 1.0} for spec in signature.outputs}
    tried: dict[str, set[int]] = {}
    inputs = 0
    for sizes, tensors, expected in reference.cases(signature):
        cast = [tensor.to(spec.dtype) for tensor, spec in zip(tensors, signature.inputs, strict=True)]
        for found, want, (name, figures) in zip(runner.run(*cast)[: len(worst)], expected, worst.items(), strict=True):
            got = found.to("cpu", torch.float32)
            error = (got - want).abs().max().item()
            cosine = torch.cosine_similarity(got.flatten(1).double(), want.flatten(1).double()).min().item()
            # Written so that NaN fails.
            if not ((not exact or error <= MAX_ABS) and cosine >= MIN_COSINE):
                where = ", ".join(f"{size} = {value}" for size, value in sizes.items())
                raise ExportError(
                    f"{runner.name} is not {reference.name}: at {where} its {name} are off by {error:.3g} with cosine "
                    f"{cosine:.6f}, allowed are {f'{MAX_ABS:g} and ' if exact else ''}a cosine of {MIN_COSINE}"
                )
            figures["max_abs"] = max(figures["max_abs"], error)
            figures["min_cosine"] = min(figures["min_cosine"], cosine)
        for size, value in sizes.items():
            tried.setdefault(size, set()).add(value)
        inputs += sizes[signature.inputs[0].shape[0]]
    return {
        "against": reference.name,
        "inputs": inputs,
        "sizes": {size: sorted(values) for size, values in tried.items()},
        "allowed": ({"max_abs": MAX_ABS} if exact else {}) | {"min_cosine": MIN_COSINE},
        "outputs": worst,
        "run_by": runner.backend,
        "dtype": dtype_name(signature.outputs[0].dtype),
    }
