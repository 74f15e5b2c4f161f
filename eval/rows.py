"""The rows of an evaluation: the model, its controls at the same silent share, and the points of the curve."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.conversion.calibration import activation_profile
from spikelm.eval import controls
from spikelm.eval.controls import MagnitudeProfile, match_share
from spikelm.eval.data import TokenizedText
from spikelm.eval.fidelity import Row, run_counted
from spikelm.spiking.site import SpikeSite, spike_groups

PLAIN_K = 3.0
TARGETS = (0.2, 0.25, 0.3, 0.4, 0.5)
_PROBE_WINDOWS = 2

# Silent share -> site path -> dead zones: how an allocation spreads a share over the sites.
Allocation = Callable[[float], dict[str, Tensor]]


def model_row(model: nn.Module, apply: Callable[[], AbstractContextManager]) -> Row:
    """The model as it is."""
    return Row("model", apply, setting=_setting(model))


def control_rows(
    model: nn.Module,
    texts: list[TokenizedText],
    profile: MagnitudeProfile,
    progress: bool = False,
    target: float | None = None,
) -> list[Row]:
    """Uniform dead zone, TEAL, int-k ANN and plain k = 3, each prepared on a few windows of the texts.

    The share that the first two must meet is `target`, by default that of the model on the same windows (`probe`);
    what every row reaches on all windows is measured with it. No probability of a token is looked at here.
    """
    windows = probe(texts)
    bar = tqdm(desc="Matching controls", unit="pass", disable=not progress)
    measured = [run_counted(model, window)[1:] for window in windows]
    if target is None:
        target = mean_share([spikes for spikes, _ in measured])
    largest = {
        sites[0]["path"]: max(site["max_count"] for site in sites) for sites in zip(*(rows for _, rows in measured))
    }

    def reached(apply: Callable[[Any], AbstractContextManager], setting: Any) -> float:
        bar.update()
        with apply(setting):
            return mean_share([run_counted(model, window)[1] for window in windows])

    uniform = partial(controls.uniform_dead_zone, model)
    teal = partial(controls.teal, model)
    dead_zone = match_share(target, profile.dead_zone, partial(reached, uniform))
    thresholds = match_share(target, profile.thresholds, partial(reached, teal))
    bar.close()
    bits = [controls.bits_of(largest[group.path]) for group in spike_groups(model)]
    return [
        Row("uniform_dead_zone", partial(uniform, dead_zone), setting=_setting(model) | {"dead_zone": dead_zone}),
        Row("teal", partial(teal, thresholds), setting=_setting()),
        Row(
            "int_k",
            partial(controls.int_levels, model, largest),
            setting=_setting() | {"bits_mean": sum(bits) / len(bits), "bits_max": max(bits)},
        ),
        Row(
            "plain_k3",
            partial(controls.plain_code, model, PLAIN_K),
            setting=_setting() | {"k": PLAIN_K, "dead_zone": 0.0},
        ),
    ]


def curve_rows(
    model: nn.Module, profile: MagnitudeProfile, allocate: Allocation, windows: list[int], targets: tuple[float, ...]
) -> list[Row]:
    """For every target share: the calibrated allocation, one dead zone for all sites, and TEAL.

    Targets that rounding alone exceeds have no dead zone and are left out.
    """
    rows = []
    for target in targets:
        if target <= profile.silent_share(0.0):
            continue
        dead_zone = profile.dead_zone(target)
        families: dict[str, tuple[Callable[[], AbstractContextManager], float | None]] = {}
        with suppress(ValueError):  # a share that the allocation cannot reach has no point
            families["calibrated"] = (partial(controls.allocated, model, allocate(target)), None)
        families["uniform_dead_zone"] = (partial(controls.uniform_dead_zone, model, dead_zone), dead_zone)
        families["teal"] = (partial(controls.teal, model, profile.thresholds(target)), None)
        for family, (apply, zone) in families.items():
            setting = _setting() | {"target_silent_share": target, "dead_zone": zone}
            rows.append(Row(family, apply, windows, setting))
    return rows


def calibrated_allocation(model: nn.Module, windows: list[Tensor], progress: bool = False) -> Allocation:
    """The allocation that a conversion calibrates, from one pass forward and back over calibration windows."""
    ids = torch.stack(windows).to(next(model.parameters()).device)
    profile = activation_profile(model, ids, gradients=True, progress=progress)
    return lambda share: {group.path: zone for group, zone in zip(profile.groups, profile.by_gradient(share))}


def curve_windows(texts: list[TokenizedText], tokens: int) -> list[int]:
    """How many windows of each text a point of the curve takes: in turn from every text until there are `tokens`."""
    taken = [0] * len(texts)
    seen = 0
    for w in range(max(len(text.windows) for text in texts)):
        for t, text in enumerate(texts):
            if w < len(text.windows) and seen < tokens:
                taken[t] += 1
                seen += len(text.windows[w])
    return taken


def probe(texts: list[TokenizedText]) -> list[Tensor]:
    """The windows that shares are matched on."""
    turns = [text.windows[w] for w in range(_PROBE_WINDOWS) for text in texts if w < len(text.windows)]
    return turns[:_PROBE_WINDOWS]


def mean_share(summaries: list[dict[str, Any] | None]) -> float:
    """Silent share (reads) over passes, weighted by their tokens; `SpikeStatistics.summary` of each."""
    seen = [summary for summary in summaries if summary is not None]
    return sum(s["silent_share_reads"] * s["tokens"] for s in seen) / sum(s["tokens"] for s in seen)


def _setting(model: nn.Module | None = None) -> dict[str, Any]:
    """Counts per mean magnitude and dead zone of all sites, where they agree, and the fields of other rows."""
    empty = {"k": None, "dead_zone": None, "bits_mean": None, "bits_max": None}
    if model is None:
        return empty
    sites = [group.site for group in spike_groups(model) if isinstance(group.site, SpikeSite)]
    k = {float(site.k) for site in sites}
    zones = {value for site in sites for value in (float(site.dead_zone.min()), float(site.dead_zone.max()))}
    return empty | {
        "k": k.pop() if len(k) == 1 else None,
        "dead_zone": zones.pop() if len(zones) == 1 else None,
    }
