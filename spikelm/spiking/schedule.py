"""Spikes that come gradually while a model trains: from real values to codes, and from many time steps to few.

Annealing. A site hands on a mixture of its input and its code, and in the end the code alone:

    out = (1 - a) x + a code(x)                                                  a: 0 -> 1

In training only: in evaluation, and in every saved model, sites code whole.

Timestep reduction (IIR-SNN, Chowdhury, Rathi & Roy 2021: each stage starts from the weights and learned thresholds of
the one before):

    largest count 16 -> 8 -> 4 -> 2 -> 1

A count stands for a train of spikes. Trains of the unary codes `binary` and `ternary` have as many time steps as the
largest count, those of `bitwise` its binary digits. So a stage reduces `spike_max_count`; thresholds stay, larger
activations are clipped, and training adapts. Sites with a membrane (`lif`, `plif`, `astrocyte`) take one step for
every token already, and are left alone.

Schedules of dead zones stand in `spikelm.spiking.zones`. All are callbacks, and what they set depends on the number of
steps made and nothing else, so a run that is resumed goes on as if it had never stopped:

    trainer = Trainer(model, ..., callbacks=[CodeAnnealing(0.5), CountReduction((16, 8, 4, 2, 1))])
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from spikelm.spiking.site import Site, SpikeSite

HALVING = (16, 8, 4, 2, 1)


def ramp(step: int, steps: int, over: float) -> float:
    """0 after no step, growing evenly to 1 after the share `over` of all `steps`, and 1 from then on.

    Raises:
        ValueError: `over` outside (0, 1].
    """
    if not 0 < over <= 1:
        raise ValueError(f"over must be a share of the training in (0, 1]; got {over}.")
    return min(1.0, step / (over * steps))


@dataclass(eq=False)
class CodeAnnealing(TrainerCallback):
    """Takes all spike sites of a model that trains from real values (a = 0) to their codes (a = 1).

    Args:
        over: the share of the steps after which sites code whole.

    Raises:
        ValueError: `over` outside (0, 1]; when training begins: a model without spike sites.
    """

    over: float = 0.5

    def __post_init__(self) -> None:
        ramp(0, 1, self.over)
        self._coded = 1.0
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Watch the sites."""
        self._remove()  # of a training that an error ended
        sites = [module for module in model.modules() if isinstance(module, Site)]
        if not sites:
            raise ValueError("The model has no spike sites to anneal; convert it with sites, or leave annealing out.")
        self._hooks = [site.register_forward_hook(self._mix) for site in sites]
        self._set(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set a for the step to come."""
        self._set(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the sites as they were."""
        self._remove()

    def _set(self, state: Any) -> None:
        self._coded = ramp(state.global_step, state.max_steps, self.over)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _mix(self, site: Site, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.lerp(inputs[0], output, self._coded) if site.training and self._coded < 1 else output


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


@dataclass(eq=False)
class CountReduction(TrainerCallback):
    """Takes a model that trains through the stages of `count_at`, over all steps of the training.

    Raises:
        ValueError: stages that are not positive and falling; when training begins: more of them than steps.
    """

    stages: tuple[int, ...] = HALVING

    def __post_init__(self) -> None:
        count_at(0, len(self.stages), self.stages)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set the stage of the step to come."""
        count = count_at(state.global_step, state.max_steps, self.stages)
        if model.config.spike_max_count != count:
            limit_counts(model, count)
