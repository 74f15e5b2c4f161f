"""Run a model on its spike trains, slot by slot, instead of on integer counts.

A count s stands for a train of T slots that decodes back exactly, s = sum_t w_t train_t. A linear is linear, so

    W (s V) + b  =  V * sum_t w_t (W train_t) + b

and every product on the right sees nothing but 0, 1 and -1: what event-driven hardware would compute. On a CPU or GPU
this is T products instead of one; it is here to show and to check, not to be fast.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from spikelm.kernels.spike_train import expand, slot_weights, slots_needed
from spikelm.spiking.site import Site, SpikeGroup, spike_groups

if TYPE_CHECKING:
    from spikelm.context import ForwardContext


@contextmanager
def execute_trains(model: nn.Module, code: str | None = None, slots: int | None = None) -> Iterator[None]:
    """Within this context every linear behind a spike site reads trains, one slot after the other.

    Args:
        model: a spikelm model with spike sites.
        code: `binary`, `ternary`, `bitwise`, `twos_complement`; default: the model's `spike_code`.
        slots: slots of every train; default: as many as the largest count of each pass needs.

    Raises:
        ValueError: the model has no spike sites; or, while running, a count does not fit the code or the slots.
    """
    groups = [group for group in spike_groups(model) if not group.site.graded]
    if not groups:
        raise ValueError("The model has no spike sites, so there are no trains to run on; convert it with sites.")
    code = code or model.config.spike_code
    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(_group_on_trains(group, code, slots))
        yield


@contextmanager
def _group_on_trains(group: SpikeGroup, code: str, slots: int | None) -> Iterator[None]:
    latest: dict[str, Tensor] = {}

    def capture(site: Site, counts: Tensor, threshold: Tensor, context: "ForwardContext | None") -> None:
        latest["trains"] = expand(counts, code, slots or slots_needed(counts, code))
        latest["threshold"] = threshold

    group.site.observers.append(capture)
    originals: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, linear in group.readers.items():
        originals[name] = linear.forward
        linear.forward = partial(_linear_on_trains, linear, latest, code)  # type: ignore[method-assign]
    try:
        yield
    finally:
        group.site.observers.remove(capture)
        for name, linear in group.readers.items():
            linear.forward = originals[name]  # type: ignore[method-assign]


def _linear_on_trains(linear: nn.Linear, latest: dict[str, Tensor], code: str, x: Tensor) -> Tensor:
    trains, threshold = latest["trains"], latest["threshold"]
    weight = linear.weight.to(threshold.dtype)
    total = None
    for factor, train in zip(slot_weights(code, trains.shape[0]).tolist(), trains):
        product = factor * F.linear(train.to(weight.dtype), weight)
        total = product if total is None else total + product
    y = threshold * total
    if linear.bias is not None:
        y = y + linear.bias.to(y.dtype)
    return y.to(x.dtype)
