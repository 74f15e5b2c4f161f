"""The silent share of a model, and nothing else: counted in passes without gradients, padding included.

`SpikeStatistics` gives the same share where there is no padding, and much more, which costs time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from spikelm.spiking.site import SpikeGroup, spike_groups


@contextmanager
def counted_silence(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Within this context: path of every site -> [silent inputs, all inputs] of the passes so far."""
    groups = list(spike_groups(model))
    counted = {group.path: [0, 0] for group in groups}

    def observe(path: str, site: Any, counts: Tensor, threshold: Tensor, context: Any) -> None:
        counted[path][0] += int((counts == 0).sum())
        counted[path][1] += counts.numel()

    observers = [partial(observe, group.path) for group in groups]
    for group, observer in zip(groups, observers):
        group.site.observers.append(observer)
    try:
        yield counted
    finally:
        for group, observer in zip(groups, observers):
            group.site.observers.remove(observer)


def silent_reads(groups: list[SpikeGroup], counted: dict[str, list[int]]) -> tuple[int, int]:
    """Weight reads that silent inputs make unnecessary, and all reads behind the sites of `groups`."""
    silent, reads = (sum(group.fan_out * counted[group.path][i] for group in groups) for i in (0, 1))
    return silent, reads
