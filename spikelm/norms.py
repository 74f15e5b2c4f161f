"""The norms a block can name: RMSNorm, RMSNorm with weight 1 + w (Gemma), LayerNorm, identity."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`w x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang & Sennrich 2019), in float32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` -> the same shape and dtype."""
        return self.weight * _normalised(x, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class OnePlusNorm(RMSNorm):
    """RMSNorm with weight 1 + w, w = 0 at the start (Gemma)."""

    initial = {"weight": 0.0}

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` -> the same shape and dtype."""
        normalised = _normalised(x, self.eps)
        return (normalised * (1.0 + self.weight.to(normalised.dtype))).to(x.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """The norm named `kind` (see `configuration.NORMS`) over `width` channels."""
    if kind == "identity":
        return nn.Identity()
    return {"rmsnorm": RMSNorm, "rmsnorm_1p": OnePlusNorm, "layernorm": nn.LayerNorm}[kind](width, eps=eps)
