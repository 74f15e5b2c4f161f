"""Dead zones that move while a model trains, by one factor for all sites: on a schedule, or towards a silent share.

    zone = factor * (zone that the model came with)

A factor keeps how calibration shared out the silence among sites and channels. `DeadZoneSchedule` moves it from a
start to 1. `SilentShareControl` measures the share of reads that training makes unnecessary and corrects the factor
after every step,

    log factor += gain * (share asked - share measured)                 an integral controller

so that the share follows its course while the weights change. Zones stand in the model: what is evaluated or saved on
the way has those that it trains with, and the last model those that it ended with.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from spikelm.spiking.schedule import ramp
from spikelm.spiking.site import Site, SpikeSite, spike_groups

SMALLEST, LARGEST = 0.02, 50.0  # of the factor; beyond, the share does not follow any more
_SAVED = "silent_share_control"  # where the trainer's state holds what the controller knows


class DeadZones:
    """The dead zones of a model as they were, to be scaled together.

    Args:
        model: a spikelm model, before training changes its zones and before a checkpoint is loaded into it.

    Raises:
        ValueError: no site of the model has a dead zone above 0, so that a factor would change nothing.
    """

    def __init__(self, model: nn.Module):
        # Sites, not their tensors: a model that moves to another device gets new ones.
        sites = [module for module in model.modules() if isinstance(module, SpikeSite)]
        self._first = {site: site.dead_zone.clone() for site in sites}
        if not any(bool(zone.any()) for zone in self._first.values()):
            raise ValueError(
                "The model has no dead zones above 0 to scale; convert it with a silent_share or a dead_zone."
            )

    def scale(self, factor: float) -> None:
        """Set every zone to `factor` times its first value."""
        for site, first in self._first.items():
            site.dead_zone.copy_(first.to(site.dead_zone.device) * factor)

    def check(self, factor: float) -> None:
        """Raise ValueError unless the model's zones are those of `factor`: a checkpoint of another run has others."""
        pairs = ((site.dead_zone, first.to(site.dead_zone.device)) for site, first in self._first.items())
        if not all(torch.equal(zone, first * factor) for zone, first in pairs):
            raise ValueError(
                "The checkpoint's dead zones are not those of this model and schedule; resume with the model and the "
                "settings that the run began with, or start a new run."
            )


class _ScalesZones(TrainerCallback):
    """Holds the zones that a model came with: a Trainer shows it to its callbacks before it loads a checkpoint."""

    zones: DeadZones

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take down the zones."""
        self.zones = DeadZones(model)


@dataclass(eq=False)
class DeadZoneSchedule(_ScalesZones):
    """Scales the dead zones of a model that trains from `start` to 1 times what they were.

    Give it to the Trainer's constructor, with the model as it was when training began.

    Args:
        start: the first factor, >= 0. over: the share of the steps after which zones have their full width.

    Raises:
        ValueError: `over` outside (0, 1], `start` below 0; with the model: it has no zones; when training resumes: the
            checkpoint's zones are those of another run.
    """

    start: float = 0.0
    over: float = 0.5

    def __post_init__(self) -> None:
        ramp(0, 1, self.over)
        if self.start < 0:
            raise ValueError(f"start must be a factor >= 0 of the dead zones; got {self.start}.")

    def factor(self, step: int, steps: int) -> float:
        """The factor after `step` of `steps` steps."""
        return 1.0 + (self.start - 1.0) * (1.0 - ramp(step, steps, self.over))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the zones of the first step; those of a resumed run are there already."""
        factor = self.factor(state.global_step, state.max_steps)
        if state.global_step:
            self.zones.check(factor)
        self.zones.scale(factor)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the zones of the step to come."""
        self.zones.scale(self.factor(state.global_step, state.max_steps))


@dataclass(eq=False)
class SilentShareControl(_ScalesZones):
    """Makes the silent share (reads) of a model that trains follow a course, by one factor on all dead zones.

    The course leads evenly from the share measured in the first step to `target` over the share `over` of the steps,
    then stays. What the controller knows is saved with the trainer's state, bit for bit. Give it to the Trainer's
    constructor, with the model as it was when training began.

    Args:
        target: the share of reads to end with, in (0, 1). over: the share of the steps on the way.
        gain: change of the factor's logarithm per unit of share missed.

    Raises:
        ValueError: `target`, `over` or `gain` out of range; with the model: it has no zones; when training resumes: the
            checkpoint's zones are those of another run.
    """

    target: float
    over: float = 0.5
    gain: float = 1.0

    def __post_init__(self) -> None:
        ramp(0, 1, self.over)
        if not 0 < self.target < 1:
            raise ValueError(f"target must be a silent share in (0, 1); got {self.target}.")
        if self.gain <= 0:
            raise ValueError(f"gain must be above 0; got {self.gain}.")
        self.meter = ShareMeter()
        self.start: float | None = None
        self.log_factor = 0.0

    @property
    def factor(self) -> float:
        """What the zones are multiplied with now."""
        return math.exp(self.log_factor)

    def correct(self, share: float, step: int, steps: int) -> None:
        """Answer the share measured in step `step` of `steps` (the first is 0) by a new factor."""
        self.start = share if self.start is None else self.start
        asked = self.target + (self.start - self.target) * (1.0 - ramp(step, steps, self.over))
        moved = self.log_factor + self.gain * (asked - share)
        self.log_factor = min(max(moved, math.log(SMALLEST)), math.log(LARGEST))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Take up the factor of a resumed run, and start to measure."""
        if state.global_step:
            saved = state.stateful_callbacks.get(_SAVED, {"log_factor": 0.0, "start": None})
            self.log_factor, self.start = saved["log_factor"], saved["start"]
            self.zones.check(self.factor)
        self.meter.watch(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the zones of the step to come."""
        self.correct(self.meter.read(), state.global_step - 1, state.max_steps)
        self.zones.scale(self.factor)
        state.stateful_callbacks[_SAVED] = {"log_factor": self.log_factor, "start": self.start}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop to measure."""
        self.meter.leave()


class ShareMeter:
    """The silent share (reads) of the training passes of a model, over all processes; padding does not count."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._sums: Tensor | None = None  # silent reads, all reads; float64

    def watch(self, model: nn.Module) -> None:
        """Measure from now on. Sites are read before what else hooks them changes their output."""
        self.leave()
        for group in spike_groups(model):
            if group.fan_out:
                hook = self._hook(group.fan_out)
                self._hooks.append(group.site.register_forward_hook(hook, prepend=True))

    def _hook(self, fan_out: int) -> Any:
        def count(site: Site, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not site.training:
                return
            coded = output.detach()
            context = inputs[1] if len(inputs) > 1 else None
            if context is not None and context.valid is not None:
                coded = coded[context.valid]
            silent = (coded == 0).sum().double()
            sums = torch.stack([silent, torch.full_like(silent, coded.numel())]) * fan_out
            self._sums = sums if self._sums is None else self._sums + sums

        return count

    def read(self) -> float:
        """The share since the last reading. Raises ValueError if no activation passed a site with readers."""
        if self._sums is None:
            raise ValueError("No activation passed a spike site in training, so there is no silent share to control.")
        sums, self._sums = self._sums, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        silent, reads = sums.tolist()
        return silent / reads

    def leave(self) -> None:
        """Stop to measure, and forget."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._sums = None
