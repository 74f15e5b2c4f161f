"""Noise on gradients, against minima in which only the training text is good (Neelakantan et al. 2015, 1511.06807).

    g <- g + N(0, sigma_t^2),    sigma_t^2 = scale^2 / (1 + t)^decay        t: steps made, after clipping

Drawn from a generator of its own, seeded by the run's seed and t: whoever resumes draws the same.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


@dataclass(eq=False)
class GradientNoise(TrainerCallback):
    """Adds noise to the gradients of every step.

    Args:
        scale: standard deviation in the first step. decay: of the variance with the steps.

    Raises:
        ValueError: `scale` not above 0 or `decay` below 0; in training: gradients in pieces (FSDP, DeepSpeed).
    """

    scale: float
    decay: float = 0.55

    def __post_init__(self) -> None:
        if self.scale <= 0 or self.decay < 0:
            raise ValueError(f"scale must be above 0 and decay at least 0; got {self.scale} and {self.decay}.")

    def sigma(self, step: int) -> float:
        """Standard deviation after `step` steps."""
        return self.scale / (1 + step) ** (self.decay / 2)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Add the noise of this step."""
        add_noise(model, self.sigma(state.global_step), (args.seed << 32) + state.global_step)


@torch.no_grad()
def add_noise(model: nn.Module, sigma: float, seed: int) -> None:
    """Add N(0, sigma^2) to every gradient, the same in every process."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients or any(isinstance(gradient, DTensor) for gradient in gradients):
        raise ValueError("gradient_noise needs whole gradients in every process: not with FSDP or DeepSpeed.")
    generators: dict[torch.device, torch.Generator] = {}
    for gradient in gradients:
        if gradient.device not in generators:
            generators[gradient.device] = torch.Generator(gradient.device).manual_seed(seed)
        generator = generators[gradient.device]
        noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
        gradient.add_(noise, alpha=sigma)
