"""Graded events: a state speaks only from its threshold on, and then with its value.

    y = c where c >= threshold, else 0

(EGRU, Subramoney et al. 2022, arXiv 2206.06178, without its reset.) The gradient through the comparison is a triangle
around the threshold, of height 1 and half width 1. Events are counted like the spikes of any site.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spikelm.initial import Initial, fill
from spikelm.kernels.lif import lif
from spikelm.spiking.site import Site

if TYPE_CHECKING:
    from spikelm.context import ForwardContext


class EventSite(Site):
    """Graded events `[B, T, width]`, counted and handed on; their thresholds, learned, per channel, float32.

    Args:
        threshold: initial value, a number or a function (see `spikelm.initial`).
        recurrent_reads: weights of a recurrent matrix that one event is multiplied with.
    """

    graded = True

    def __init__(self, layer_idx: int, width: int, threshold: Initial, recurrent_reads: int = 0):
        super().__init__(layer_idx, "events", width)
        self.recurrent_reads = recurrent_reads
        self.thresholds = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.initial = {"thresholds": threshold}

    def forward(self, events: Tensor, context: "ForwardContext | None" = None) -> Tensor:
        """Show observers which are not zero."""
        if self.observers:
            counts = (events != 0).float()
            self._show(counts, torch.ones_like(counts[..., :1]), context)
        return events


class Events(EventSite):
    """`[B, T, width]` states -> events of the same shape."""

    def __init__(self, layer_idx: int, width: int, threshold: float):
        super().__init__(layer_idx, width, float(threshold))
        fill(self)

    def forward(self, state: Tensor, context: "ForwardContext | None" = None) -> Tensor:
        """Each state where it reaches its threshold; a state at the threshold 0 is itself 0."""
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
        return super().forward(state * speaks, context)
