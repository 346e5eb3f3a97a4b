"""The FFN's hidden layer of (18) with H in factors, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from evc_fast.reference._dtypes import accumulate_dtype


def factored_hidden(weights: Tensor, values: Tensor, visual: Tensor) -> Tensor:
    """Reference of :func:`evc_fast.ops.factored_hidden`, which states the contract."""
    dtype = accumulate_dtype(weights)
    hidden = weights.to(dtype) @ values.to(dtype) + visual.to(dtype).unsqueeze(1)
    return F.gelu(hidden).to(weights.dtype)  # (18)
