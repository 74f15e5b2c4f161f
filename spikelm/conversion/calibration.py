"""Calibration: dead zones and stored magnitudes of all spike sites, from the float model's activations on a text."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.conversion.allocation import ActivationProfile
from spikelm.conversion.texts import calibration_sample
from spikelm.spiking.silence import counted_silence, silent_reads
from spikelm.spiking.site import SpikeGroup, spike_groups

WINDOW = 512
TOLERANCE = 0.004
_CHECKED = 2048  # tokens on which the share of the spiking model is measured


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    text: str | Tensor | None = None,
    *,
    silent_share: float | None = None,
    allocation: str = "gradient",
    tokens: int = 4096,
    progress: bool = True,
) -> dict[str, Any]:
    """Set what a text decides of every spike site of a model, in place: `dead_zone`, `k`, and stored tensors.

    Args:
        model: a spikelm model with spike sites.
        tokenizer: turns `text` into ids; None if `text` is ids.
        text: what to calibrate on, or token ids `[N]`; None: `texts.calibration_sample()`.
        silent_share: the share of site inputs, weighted by the weights that each reads, that are to be zero.
            None: only magnitudes are set.
        allocation: `gradient`: dead zones per channel and k per site where they cost least (needs
            `spike_dead_zone_per_channel`); mean k over the reads stays the configuration's. `uniform`: one dead zone
            for all sites, which keep their k.
        tokens: how many tokens to look at, in windows of 512 spread over the text.
        progress: whether to show bars.

    Returns:
        What was measured, ready for a record: `text`, `text_sha256`, `tokens`; and, with a silent share, the share
        reached by the spiking model on (at most 2,048 of) those tokens, and k, mean dead zone and share of every site.

    Raises:
        ValueError: a text that is too short, a share that cannot be reached.
    """
    groups = list(spike_groups(model))
    ids, result = _windows(model, tokenizer, text, tokens)
    stored = [group for group in groups if group.site.magnitude is not None]
    if stored:
        _set_magnitudes(model, stored, groups, ids, progress)
    if silent_share is None:
        return result
    profile = activation_profile(model, ids, gradients=allocation == "gradient", progress=progress)
    allocate = profile.uniform
    if allocation == "gradient":
        allocate = profile.by_gradient
        for group, k in zip(groups, profile.counts_by_gradient(), strict=True):
            group.site.k.fill_(k)
    return result | {"allocation": allocation} | _reach(model, groups, ids, silent_share, allocate, progress)


def activation_profile(model: nn.Module, ids: Tensor, *, gradients: bool, progress: bool = False) -> ActivationProfile:
    """What the sites of the float model see on `ids` `[n, T]`; with gradients, also what each channel matters.

    From one profile follow the dead zones for any silent share: `profile.by_gradient(share)`, `profile.uniform(share)`.
    """
    groups = list(spike_groups(model))
    profile = ActivationProfile(groups)
    with _substituted(groups, profile.see):
        if gradients:
            _run_with_gradients(model, ids, progress)
        else:
            _run(model, ids, "Reading activations", progress)
    return profile


def _windows(model: nn.Module, tokenizer: Any, text: str | Tensor | None, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """Ids `[n, T]` spread over the text, and what to record about it."""
    name = "the text given"
    if text is None:
        text, name = calibration_sample(), "Python's built-in reference topics"
    if isinstance(text, Tensor):
        ids, digest = text.flatten().cpu(), hashlib.sha256(text.cpu().numpy().tobytes())
        name = "the token ids given"
    else:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        digest = hashlib.sha256(text.encode())
    length = min(WINDOW, model.config.max_position_embeddings, len(ids))
    if length < 16:
        raise ValueError(f"The calibration text has {len(ids)} tokens; expected at least 16. Give a longer text.")
    pieces = ids[: len(ids) // length * length].view(-1, length)
    count = min(len(pieces), max(tokens // length, 1))
    described = {"text": name, "text_sha256": digest.hexdigest(), "tokens": count * length}
    return _spread(pieces, count).to(model.device), described


def _spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows `[n, T]`, evenly apart."""
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


@contextmanager
def _substituted(groups: list[SpikeGroup], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Every site hands its input on as it is, after `see(index, input)`."""

    def passing(index: int) -> Callable[[Tensor], Tensor]:
        def substitute(x: Tensor) -> Tensor:
            see(index, x)
            return x

        return substitute

    for index, group in enumerate(groups):
        group.site.substitute = passing(index)
    try:
        yield
    finally:
        for group in groups:
            group.site.substitute = None


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, what: str, progress: bool) -> None:
    rows = max(WINDOW // ids.shape[1], 1)
    for batch in tqdm(ids.split(rows), desc=what, unit="window", disable=not progress, delay=1.0):
        model.model(input_ids=batch, use_cache=False)


def _run_with_gradients(model: nn.Module, ids: Tensor, progress: bool) -> None:
    """One pass forward and back; the loss is that of labels drawn from the model itself."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator(ids.device).manual_seed(0)
    rows = max(WINDOW // ids.shape[1], 1)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for batch in tqdm(ids.split(rows), desc="Weighing activations", unit="window", disable=not progress, delay=1.0):
            embedded = model.get_input_embeddings()(batch).detach().requires_grad_()
            with torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, drawn, reduction="sum").backward(inputs=[embedded])
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _set_magnitudes(
    model: nn.Module, stored: list[SpikeGroup], groups: list[SpikeGroup], ids: Tensor, progress: bool
) -> None:
    """The mean over tokens of mean |x|, into every site that stores one."""
    totals, rows = [0.0] * len(groups), [0] * len(groups)

    def see(index: int, x: Tensor) -> None:
        totals[index] += float(x.abs().float().mean(-1).sum())
        rows[index] += x.numel() // x.shape[-1]

    with _substituted(groups, see):
        _run(model, ids, "Reading magnitudes", progress)
    for group, total, count in zip(groups, totals, rows, strict=True):
        if group in stored:
            nn.init.constant_(group.site.magnitude, max(total / count, 1e-12))


def _reach(
    model: nn.Module,
    groups: list[SpikeGroup],
    ids: Tensor,
    share: float,
    allocate: Callable[[float], list[Tensor]],
    progress: bool,
) -> dict[str, Any]:
    """Set dead zones by `allocate(share)`; corrected once if the spiking model then misses the share."""
    checked = _spread(ids, min(len(ids), max(_CHECKED // ids.shape[1], 1)))
    asked = share
    for _ in range(2):
        zones = allocate(asked)
        for group, zone in zip(groups, zones, strict=True):
            with torch.no_grad():
                group.site.dead_zone.copy_(zone.expand_as(group.site.dead_zone))
        reached, sites = _measure(model, groups, checked, progress)
        if abs(reached - share) < TOLERANCE:
            break
        asked += share - reached
    names = [f"{group.layer_idx}.{group.name}" for group in groups]
    return {
        "silent_share_asked": share,
        "silent_share_reads": reached,
        "k": {name: round(float(group.site.k), 3) for name, group in zip(names, groups, strict=True)},
        "mean_dead_zone": {name: round(float(zone.mean()), 5) for name, zone in zip(names, zones, strict=True)},
        "silent_share": {name: round(site, 5) for name, site in zip(names, sites, strict=True)},
    }


def _measure(model: nn.Module, groups: list[SpikeGroup], ids: Tensor, progress: bool) -> tuple[float, list[float]]:
    """The silent share of the spiking model, weighted by reads, and that of every site."""
    with counted_silence(model) as counted:
        _run(model, ids, "Measuring silence", progress)
    silent, reads = silent_reads(groups, counted)
    return silent / reads, [counted[group.path][0] / counted[group.path][1] for group in groups]
