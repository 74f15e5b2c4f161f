"""Graded events: a state speaks only above its threshold, and then with its value.

    y = c where c > threshold, else 0

(EGRU, Subramoney et al. 2022, arXiv 2206.06178, without its reset.) The gradient through the comparison is a triangle
around the threshold, of height 1 and half width 1.
"""

import torch
from torch import Tensor, nn

from spikelm.initial import fill
from spikelm.kernels.lif import lif
from spikelm.precision import KeepsDtype


class Events(KeepsDtype):
    """`[B, T, width]` states -> events of the same shape; one learned threshold per channel, float32."""

    def __init__(self, width: int, threshold: float):
        super().__init__()
        self.thresholds = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.initial = {"thresholds": float(threshold)}
        fill(self)

    def forward(self, state: Tensor) -> Tensor:
        """Each state where it exceeds its threshold; a state at the threshold 0 is itself 0."""
        # A unit that forgets at once is the comparison alone, with its surrogate gradient.
        speaks = lif(
            state,
            0.0,
            self.thresholds,
            gain="additive",
            reset="none",
            surrogate="triangle",
            temporal_grad="none",
        )[0]
        return state * speaks
