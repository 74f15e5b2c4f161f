"""A model beside its baseline, on the same windows of the same texts in the same run.

    nll     -log p(token | the window so far), natural logarithm, mean over the predicted tokens
    ratio   exp(nll of the model - nll of the baseline) = perplexity over perplexity
    error   standard error of the ratio, from the spread of the difference in nll from token to token
    kl      mean over the predicted tokens of sum_v p_baseline(v) (log p_baseline(v) - log p_model(v)), in nats
    top-1   share of the predicted tokens where both find the same token most likely
    top-5   of the five tokens that each finds most likely, the share that both have; mean over the predicted tokens

One forward of the baseline serves every row (the model as it is, and its variants); at any time there are the logits
of one window of the baseline and of one row, never more. Without a baseline only nll is measured.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.eval.data import TokenizedText
from spikelm.spiking.site import spike_groups
from spikelm.spiking.statistics import SpikeStatistics

TOP = 5
_CHUNK = 64  # tokens whose probabilities are taken at once: keeps the temporaries in the cache


@dataclass(frozen=True)
class WindowScore:
    """Sums over the predicted tokens of one window; nll and kl in nats, `squares` of the differences in nll.

    `common` counts the tokens that are among the likeliest `TOP` of both. Without a baseline all but nll is 0 and
    `paired` False.
    """

    predicted: int
    text_bytes: int
    nll: float
    baseline_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    common: int = 0
    squares: float = 0.0
    paired: bool = True


@dataclass(frozen=True)
class Measured:
    """One row on one window: its score, and what the sites did (None and [] without spike sites)."""

    score: WindowScore
    spikes: dict[str, Any] | None
    sites: list[dict[str, Any]]


@dataclass
class Row:
    """The model in one form: as it is, or changed for as long as `apply()` is entered.

    Attributes:
        name: how the report calls it.
        apply: makes the context in which the model takes this form.
        windows: how many windows of each text are scored, from the first on; None: all.
        setting: what the report says about the form.
        measured: per text, one entry for each of its windows so far.
    """

    name: str
    apply: Callable[[], AbstractContextManager] = nullcontext
    windows: list[int] | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    measured: list[list[Measured]] = field(default_factory=list)

    def covers(self, text: int, window: int) -> bool:
        """Whether a window of a text belongs to this row."""
        return self.windows is None or window < self.windows[text]

    def select(self, text: int | None = None, windows: list[int] | None = None) -> list[Measured]:
        """What was measured on one text or on all, perhaps on the first windows of each only."""
        kept = [m if windows is None else m[: windows[t]] for t, m in enumerate(self.measured)]
        return kept[text] if text is not None else [one for per_text in kept for one in per_text]


def check_pair(model: nn.Module, baseline: nn.Module | None, texts: list[TokenizedText]) -> None:
    """Find out at once, on two tokens, whether two models, or one, can be measured on these texts.

    Raises:
        ValueError: a token is in no vocabulary, the vocabularies differ, or logits are not finite.
    """
    largest = max(int(window.max()) for text in texts for window in text.windows)
    for network in [model] if baseline is None else [model, baseline]:
        known = network.get_input_embeddings().num_embeddings  # type: ignore[operator,union-attr]
        if largest >= known:
            raise ValueError(
                f"The tokenizer gives token {largest}, but {type(network).__name__} knows {known}; use the tokenizer "
                "that belongs to the models."
            )
    window = texts[0].windows[0][:2]
    score(window, run(model, window), _reference(baseline, window), 1)


def compare(
    model: nn.Module, baseline: nn.Module | None, texts: list[TokenizedText], rows: list[Row], bar: tqdm
) -> None:
    """Measure every row on its windows; the results are added to the rows.

    Args:
        model, baseline: causal language models with one vocabulary, in eval mode; the second may be missing.
        texts: the windows.
        rows: what to score; `bar` advances by the tokens of every forward.

    Raises:
        ValueError: the vocabularies differ, or logits are not finite.
    """
    for row in rows:
        row.measured = [[] for _ in texts]
    for t, text in enumerate(texts):
        for w, window in enumerate(text.windows):
            active = [row for row in rows if row.covers(t, w)]
            if not active:
                continue
            reference = _reference(baseline, window)
            bar.update(0 if reference is None else len(window))
            for row in active:
                with row.apply():
                    logits, spikes, sites = run_counted(model, window)
                scored = score(window, logits, reference, text.text_bytes[w])
                row.measured[t].append(Measured(scored, spikes, sites))
                del logits
                bar.update(len(window))


def _reference(baseline: nn.Module | None, window: Tensor) -> Tensor | None:
    return None if baseline is None else log_probs(run(baseline, window))


def run_counted(model: nn.Module, window: Tensor) -> tuple[Tensor, dict[str, Any] | None, list[dict[str, Any]]]:
    """`run`, with the spikes of this pass: `SpikeStatistics.summary` and `by_site`, or None and []."""
    if not any(True for _ in spike_groups(model)):
        return run(model, window), None, []
    with SpikeStatistics(model) as statistics:
        logits = run(model, window)
    return logits, statistics.summary(), statistics.by_site()


@torch.no_grad()
def run(model: nn.Module, window: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` of one window `[tokens]`.

    Raises:
        ValueError: they are not finite.
    """
    device = next(model.parameters()).device
    logits = model(input_ids=window[None].to(device), use_cache=False).logits[0]
    if not bool(torch.isfinite(logits.amax())) or not bool(torch.isfinite(logits.amin())):
        raise ValueError(
            f"{type(model).__name__} gives logits that are not finite, so nothing can be compared; look for a damaged "
            "checkpoint or a dtype with too small a range."
        )
    return logits


def score(window: Tensor, logits: Tensor, reference: Tensor | None, text_bytes: int) -> WindowScore:
    """Compare one window.

    Args:
        window: `[tokens]` int64.
        logits: `[tokens, vocabulary]` of the row.
        reference: `[tokens, vocabulary]` log-probabilities of the baseline; None: there is none.
        text_bytes: UTF-8 bytes of the predicted tokens.

    Raises:
        ValueError: the vocabularies differ in size.
    """
    if reference is not None and logits.shape[1] != reference.shape[1]:
        raise ValueError(
            f"The model has a vocabulary of {logits.shape[1]} and its baseline one of {reference.shape[1]}; compare a "
            "model with the one that it was converted from."
        )
    device = logits.device if reference is None else reference.device
    predicted, top = len(window) - 1, min(TOP, logits.shape[1])
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    for start in range(0, predicted, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, predicted))
        targets = window[chunk.start + 1 : chunk.stop + 1, None].to(device)
        ours = _log_softmax(logits[chunk].to(device))
        nll = -ours.gather(1, targets).double()
        sums[0] += nll.sum()
        if reference is None:
            continue
        theirs = reference[chunk]
        base = -theirs.gather(1, targets).double()
        sums[1] += base.sum()
        sums[2] += (theirs.exp() * (theirs - ours)).sum(1).sum(dtype=torch.float64)
        likeliest, expected = ours.topk(top).indices, theirs.topk(top).indices
        sums[3] += (ours.argmax(1) == theirs.argmax(1)).sum()
        sums[4] += (likeliest[:, :, None] == expected[:, None]).sum()
        sums[5] += (nll - base).square().sum()
    nll_sum, base_sum, kl, agreed, common, squares = sums.tolist()
    paired = reference is not None
    return WindowScore(predicted, text_bytes, nll_sum, base_sum, kl, int(agreed), int(common), squares, paired)


def combine(scores: list[WindowScore]) -> dict[str, Any]:
    """Means over the predicted tokens of all windows, with the report's keys; None where a number overflows."""
    tokens = sum(s.predicted for s in scores)
    text_bytes = sum(s.text_bytes for s in scores)
    if not tokens or not all(s.paired for s in scores):
        return _alone(scores, tokens, text_bytes)
    nll, baseline = sum(s.nll for s in scores) / tokens, sum(s.baseline_nll for s in scores) / tokens
    ratio = _exp(nll - baseline)
    variance = max(0.0, sum(s.squares for s in scores) / tokens - (nll - baseline) ** 2)
    bits = tokens / math.log(2) / max(text_bytes, 1)
    return {
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": None if ratio is None else ratio * math.sqrt(variance / tokens),
        "top1_agreement": sum(s.agreed for s in scores) / tokens,
        "top5_agreement": sum(s.common for s in scores) / tokens / TOP,
        # The sum of tiny terms of both signs may end below zero by rounding.
        "kl_nats": max(0.0, sum(s.kl for s in scores) / tokens),
        "nll_nats": {"model": nll, "baseline": baseline},
        "perplexity": {"model": _exp(nll), "baseline": _exp(baseline)},
        "bits_per_byte": {"model": nll * bits, "baseline": baseline * bits},
    }


def _alone(scores: list[WindowScore], tokens: int, text_bytes: int) -> dict[str, Any]:
    """The keys of `combine` where nothing was compared."""
    nll = sum(s.nll for s in scores) / tokens if tokens else None
    compared = ("perplexity_ratio", "perplexity_ratio_error", "top1_agreement", "top5_agreement", "kl_nats")
    return dict.fromkeys(compared) | {
        "nll_nats": {"model": nll, "baseline": None},
        "perplexity": {"model": None if nll is None else _exp(nll), "baseline": None},
        "bits_per_byte": {
            "model": None if nll is None else nll * tokens / math.log(2) / max(text_bytes, 1),
            "baseline": None,
        },
    }


def merge(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """One entry from several of the same shape: means weighted by their `tokens`; tokens add up, maxima stay."""
    weights = [entry["tokens"] for entry in entries]

    def join(values: list[Any], name: str) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: join([value[key] for value in values], key) for key in first}
        if name == "tokens":
            return sum(values)
        if name == "max_count":
            return max(values)
        if all(value == first for value in values):
            return first
        return sum(value * weight for value, weight in zip(values, weights)) / sum(weights)

    return join(entries, "")


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities in float32 or better, in the place of the logits where the dtype allows."""
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    for start in range(0, len(logits), _CHUNK):
        chunk = logits[start : start + _CHUNK]
        chunk.copy_(_log_softmax(chunk))
    return logits


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None
