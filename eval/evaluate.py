"""Evaluate a spiking model beside its baseline: quality, controls, spikes, speed, the trade-off curve, one report.

    report = evaluate(model, source_model, tokenizer, [read_text("essay.txt")], out="report/")

All rows are measured in one pass over the texts; `docs/report.md` says what every key of the report means.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn
from tqdm import tqdm

from spikelm.conversion.texts import calibration_sample
from spikelm.eval import plots
from spikelm.eval.controls import MagnitudeProfile
from spikelm.eval.data import Text, TokenizedText, spread, tokenize
from spikelm.eval.fidelity import Row, check_pair, compare, run
from spikelm.eval.report import build, environment, write_report
from spikelm.eval.rows import TARGETS, calibrated_allocation, control_rows, curve_rows, curve_windows, model_row
from spikelm.eval.speed import tokens_per_second
from spikelm.spiking.site import SpikeGroup, SpikeSite, spike_groups
from spikelm.spiking.trains import execute_trains

EXECUTE = ("counts", "trains")
PROMPT = "The brain computes with spikes: short pulses, sent only when there is something to say."
_CALIBRATION_TOKENS = 2048


def evaluate(
    model: nn.Module,
    baseline: nn.Module,
    tokenizer: Any,
    texts: list[Text],
    *,
    tokens: int = 8000,
    window: int = 512,
    controls: bool = True,
    curve: bool = True,
    curve_tokens: int = 2000,
    calibration: Text | None = None,
    execute: str = "counts",
    prompt: str = PROMPT,
    names: tuple[str, str] | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure `model` against `baseline` on the same windows of the same texts.

    Args:
        model: a spikelm model, with or without spike sites (then the spike fields of the report are None).
        baseline: the model it came from; any causal language model of transformers with the same vocabulary.
        tokenizer: of both.
        texts: what to measure on; their names must differ.
        tokens: tokens of each text. window: tokens of a window; windows are disjoint.
        controls: whether to measure the control rows: uniform dead zone, TEAL, int-k ANN, plain k = 3.
        curve: whether to measure perplexity against silent share.
        curve_tokens: tokens of a point of the curve, over all texts, in whole windows.
        calibration: text for the thresholds of controls and curve; default: `conversion.texts.calibration_sample`.
        execute: `counts`, or `trains` to run the model itself on expanded trains, slot by slot.
        prompt: for the spike raster.
        names: how the report calls model and baseline; default: what they were loaded from.
        out: folder for `report.json`, `report.md` and pictures; None: nothing is written.
        progress: whether to show a bar and print an estimate of the time.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: texts that are too short or share a name, a tokenizer or vocabularies that do not fit, logits that
            are not finite, an unknown way to execute, trains without spike sites, a file where the folder should be.
    """
    groups = list(spike_groups(model))
    spiking = bool(groups)
    _check(texts, execute, groups, out)
    cut = [tokenize(text, tokenizer, tokens, window) for text in texts]
    apply: Callable[[], AbstractContextManager] = partial(execute_trains, model) if execute == "trains" else nullcontext
    calibration = calibration or Text("Python reference topics", calibration_sample(), "pydoc_data.topics")
    held_out: list[Tensor] = []
    windows = curve_windows(cut, curve_tokens)
    with _evaluating(model, baseline):
        check_pair(model, baseline, cut)
        load = list(psutil.getloadavg())
        speed = tokens_per_second(model, baseline, cut[0].windows, apply)
        rows = [model_row(model, apply)]
        if spiking and (controls or curve):
            held_out = spread(calibration, tokenizer, _CALIBRATION_TOKENS, window)
            profile = _profile(model, held_out, progress)
            if controls:
                rows += control_rows(model, cut, profile, progress)
            if curve:
                allocate = calibrated_allocation(model, held_out, progress)
                rows += curve_rows(model, profile, allocate, windows, TARGETS)
        total = _forward_tokens(cut, rows)
        with tqdm(total=total, desc="Evaluating", unit="tok", unit_scale=True, disable=not progress) as bar:
            if progress:
                bar.write(_estimate(total, cut, speed), file=sys.stderr)
            compare(model, baseline, cut, rows, bar)
    report = build(
        cut,
        rows,
        windows if spiking and curve else None,
        model,
        speed={"tokens_per_second": speed, "load_average": load},
        measured_on={
            "calibration": {
                "name": calibration.name if held_out else None,
                "source": calibration.source if held_out else None,
                "tokens": sum(map(len, held_out)),
            },
            "execute": execute,
            **environment(model, baseline, names),
        },
    )
    if out is not None:
        write_report(report, out)
        plots.write(report, model, tokenizer, prompt, out)
    return report


def _check(texts: list[Text], execute: str, groups: list[SpikeGroup], out: str | Path | None) -> None:
    names = [text.name for text in texts]
    if not texts:
        raise ValueError("There is no text to evaluate on; give at least one.")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several texts are called {doubled[0]!r}; give each its own name.")
    if execute not in EXECUTE:
        raise ValueError(f"execute must be one of {', '.join(EXECUTE)}; got {execute!r}.")
    if execute == "trains" and not groups:
        raise ValueError("execute is 'trains', but the model has no spike sites; evaluate it with 'counts'.")
    if strange := next((group for group in groups if not isinstance(group.site, SpikeSite)), None):
        raise ValueError(
            f"The report compares spike codes with their controls, but {strange.path} holds "
            f"{type(strange.site).__name__}: neurons and events have none. Count their spikes with SpikeStatistics."
        )
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{str(out)!r} is a file; give a folder for the report.")


@contextmanager
def _evaluating(*networks: nn.Module) -> Iterator[None]:
    """Eval mode within, the mode of before afterwards."""
    modes = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for network, mode in zip(networks, modes):
            network.train(mode)


def _profile(model: nn.Module, windows: list[Tensor], progress: bool) -> MagnitudeProfile:
    profile = MagnitudeProfile(model)
    with profile.collecting():
        for window in tqdm(windows, desc="Reading magnitudes", unit="window", disable=not progress):
            run(model, window)
    return profile


def _estimate(total: int, texts: list[TokenizedText], speed: dict[str, dict[str, float]]) -> str:
    baseline = sum(text.tokens for text in texts)
    seconds = baseline / speed["baseline"]["prefill"] + (total - baseline) / speed["model"]["prefill"]
    # Controls and points of the curve may be faster than trains; probabilities over the vocabulary come on top.
    return (
        f"{total:,} tokens in all rows at {speed['model']['prefill']:.0f} tokens/s (baseline "
        f"{speed['baseline']['prefill']:.0f}): about {max(1, round(1.2 * seconds / 60))} min"
    )


def _forward_tokens(texts: list[TokenizedText], rows: list[Row]) -> int:
    """Tokens of all forward passes: the baseline's and those of every row."""
    return sum(
        len(window) * (1 + sum(row.covers(t, w) for row in rows))
        for t, text in enumerate(texts)
        for w, window in enumerate(text.windows)
    )
