"""Initial values that a module declares for its own tensors, applied where a checkpoint says nothing.

    declare(nn.Linear(8, 8), weight=partial(init.orthogonal_, gain=0.5), bias=1.0)

A value is a number, or a function of the tensor that fills it through `transformers.initialization` or returns the new
values. Functions are called when the tensor is real, so nothing is computed on the meta device. Each module speaks for
its own tensors only: transformers skips a module whose own tensors are all loaded, and so every module without any.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

Initial = float | Callable[[Tensor], Any]


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Give the tensors of `module.initial` their values, loaded ones excepted."""
    for name, value in getattr(module, "initial", {}).items():
        tensor = getattr(module, name)
        if tensor is None:
            continue
        if callable(value):
            result = value(tensor)
            if result is not tensor:
                init.copy_(tensor, result)
        else:
            init.constant_(tensor, value)


def declare(module: nn.Module, **initial: Initial) -> nn.Module:
    """A plain module (`nn.Linear`, `nn.Embedding`, a norm) with initial values of its own, by name."""
    module.initial = initial  # type: ignore[assignment]
    return module


def half_lives(shortest: float, longest: float, count: int) -> Tensor:
    """`[count]` half-lives in tokens from shortest to longest, evenly apart in the logarithm, float64."""
    return torch.logspace(math.log2(shortest), math.log2(longest), count, base=2.0, dtype=torch.float64)
