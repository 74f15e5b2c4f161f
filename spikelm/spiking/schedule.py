"""Fewer time steps in stages while a model trains: iterative timestep reduction for spike codes.

    largest count 16 -> 8 -> 4 -> 2 -> 1

(IIR-SNN, Chowdhury, Rathi & Roy 2021: each stage starts from the weights and learned thresholds of the one before.)
A count stands for a train of spikes. Trains of the unary codes `binary` and `ternary` have as many time steps as the
largest count, those of `bitwise` its binary digits. So a stage reduces `spike_max_count`; thresholds stay, larger
activations are clipped, and training adapts. Sites with a membrane (`lif`, `plif`, `astrocyte`) take one step for
every token already, and are left alone.

    trainer = Trainer(model, ..., callbacks=[CountReduction((16, 8, 4, 2, 1))])
"""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from spikelm.spiking.site import SpikeSite

HALVING = (16, 8, 4, 2, 1)


def count_at(step: int, steps: int, stages: Sequence[int] = HALVING) -> int:
    """The largest count in training step `step` of `steps`, stages of equal length; the last one holds afterwards.

    Raises:
        ValueError: stages that are not positive and falling, more stages than steps, or a negative step.
    """
    if not stages or min(stages) < 1 or any(later >= earlier for earlier, later in itertools.pairwise(stages)):
        raise ValueError(f"stages must be positive counts, each below the one before, e.g. {HALVING}; got {stages}.")
    if step < 0 or steps < len(stages):
        raise ValueError(f"{len(stages)} stages need as many steps, and step >= 0; got step {step} of {steps}.")
    return stages[min(step * len(stages) // steps, len(stages) - 1)]


def limit_counts(model: nn.Module, count: int) -> None:
    """Clip the counts of every spike site of a spikelm model to `count`, in its configuration too: saved, it stays so.

    Raises:
        ValueError: no site of the model counts, or `count` is below 1.
    """
    sites = [module for module in model.modules() if isinstance(module, SpikeSite)]
    if not sites:
        raise ValueError("The model has no sites that count spikes; set spike_sites, and spike_neuron to none or dsn.")
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}.")
    for site in sites:
        site.max_count = count
    model.config.spike_max_count = count  # type: ignore[union-attr, assignment]


class CountReduction(TrainerCallback):
    """Takes a model that trains through the stages of `count_at`, over all steps of the training."""

    def __init__(self, stages: Sequence[int] = HALVING):
        self.stages = tuple(stages)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set the stage of the step to come."""
        count = count_at(state.global_step, state.max_steps, self.stages)
        if model.config.spike_max_count != count:
            limit_counts(model, count)
