"""How spikes come into a model that trains: the `spikes` section of a recipe's YAML file.

    spikes:
      annealing: {over: 0.5}                  # sites: from real values to codes over the first half of the steps
      dead_zone: {start: 0.5, over: 0.5}      # calibrated dead zones: from half of their width to all of it
      silent_share: {target: 0.5, over: 0.5}  # or, in its place: zones follow a course of the silent share of reads
      counts: {stages: [8, 4, 2]}             # largest count, in stages of equal length
      rate: {weight: 0.1, width: 0.1}         # nats per token for every read
      gradient_noise: {scale: 0.01, decay: 0.55}

Each is described where it is defined, and off unless it is named.
"""

from typing import Any

from transformers import TrainerCallback

from spikelm.recipes.noise import GradientNoise
from spikelm.recipes.settings import strict
from spikelm.spiking.rate import RateRegulariser
from spikelm.spiking.schedule import CodeAnnealing, CountReduction
from spikelm.spiking.zones import DeadZoneSchedule, SilentShareControl

KINDS: dict[str, Any] = {
    "annealing": CodeAnnealing,
    "dead_zone": DeadZoneSchedule,
    "silent_share": SilentShareControl,
    "counts": CountReduction,
    "rate": RateRegulariser,
    "gradient_noise": GradientNoise,
}


def spike_callbacks(given: dict[str, Any]) -> list[TrainerCallback]:
    """What the section asks for. Raises ValueError, with the field, for what is unknown or out of range."""
    if unknown := sorted(set(given) - set(KINDS)):
        raise ValueError(f"spikes has no {unknown[0]!r}; it has {', '.join(KINDS)}.")
    if {"dead_zone", "silent_share"} <= set(given):
        raise ValueError("spikes: dead_zone and silent_share both scale the dead zones; choose one.")
    callbacks = []
    for name, fields in given.items():
        if not isinstance(fields, dict):
            raise ValueError(f"spikes.{name} must hold named fields; got {fields!r}.")
        try:
            callbacks.append(strict(KINDS[name], fields))
        except ValueError as error:
            raise ValueError(f"spikes.{name}: {error}") from error
    return callbacks
