"""Learned feature maps of linear attention: x [..., H, D] -> features [..., H, F] >= 0, one map W [H, D, M] per head.

    hedgehog   concat(softmax(x W), softmax(-x W)), at least 1e-12     F = 2 M     (Zhang et al. 2024, arXiv 2402.04347)
    relu       relu(x W)                                               F = M       (Kasai et al. 2021, arXiv 2103.13076)

Keys with fewer heads than the queries have as many maps as heads. The parameters belong to the layer; with those of
`identity_map` training starts from the softmax or relu of x itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.runtime import expect

# No feature is zero, so a query always has some weight on its past.
LEAST = 1e-12


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """Softmax of both signs over the channels of a map.

    Args:
        x: [..., H, D], any floating dtype; the softmax is computed in float32 or better.
        weight: [H, D, M].

    Returns:
        [..., H, 2 M] in the dtype of x, between 1e-12 (in float16, 0) and 1.

    Raises:
        ValueError: a weight that is not [H, D, M].
    """
    mapped = _apply("hedgehog", x, weight)
    mapped = mapped if mapped.dtype == torch.float64 else mapped.float()
    return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1).clamp_min(LEAST).to(x.dtype)


def relu(x: Tensor, weight: Tensor) -> Tensor:
    """max(x W, 0): x [..., H, D], weight [H, D, M] -> [..., H, M] in the dtype of x. Errors as in `hedgehog`."""
    return F.relu(_apply("relu", x, weight))


def identity_map(heads: int, width: int, mapped: int, **factory) -> Tensor:
    """Weight [heads, width, mapped] with ones on the diagonal: x W is x, cut or filled with zeros to `mapped` channels.

    `factory` may hold dtype and device.
    """
    return torch.eye(width, mapped, **factory).repeat(heads, 1, 1)


def _apply(op: str, x: Tensor, weight: Tensor) -> Tensor:
    fits = weight.ndim == 3 and x.ndim >= 2 and tuple(weight.shape[:2]) == tuple(x.shape[-2:])
    expected = f"[H, D, M] with [..., H, D] = {tuple(x.shape)} as x has it"
    expect(fits, op, "weight", expected, tuple(weight.shape), "Every head of x has a map of its own.")
    return torch.einsum("...hd,hdm->...hm", x, weight.to(x.dtype))
