"""What an evaluation is made of: a subject, and parts that each measure one thing about it.

    part.run(subject, settings, bar, earlier) -> a dict: what `report.json` holds under the part's name

A part is a file with one `Part`. It knows its settings (two of them: for a full run and for `--quick`), says beforehand
how many tokens it will run through a model, moves the bar by as many, and turns its own result into paragraphs of
Markdown and into figures; both read nothing but the result, so that a page can be made again from `report.json`.
`spikelm.eval.evaluate` runs the parts one after the other, keeps what is finished, and reports what failed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from spikelm.eval.data import Text, TokenizedText, tokenize
from spikelm.spiking.site import SpikeGroup, spike_groups
from spikelm.spiking.trains import execute_trains

PROMPT = "The brain computes with spikes: short pulses, sent only when there is something to say."
Result = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is evaluated, beside what, on what.

    Attributes:
        model: a spikelm model in eval mode, with or without spike sites.
        baseline: the model it came from, any causal language model of transformers with the same vocabulary; None:
            there is none, and what would compare with it is left out.
        tokenizer: of both.
        texts: what quality and spikes are measured on; their names differ.
        calibration: a text for thresholds of controls, never measured on.
        execute: `counts`, or `trains`: the model runs on expanded trains, slot by slot.
        prompt: for the spike raster.
    """

    model: nn.Module
    baseline: nn.Module | None
    tokenizer: Any
    texts: list[Text]
    calibration: Text
    execute: str = "counts"
    prompt: str = PROMPT
    groups: list[SpikeGroup] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", list(spike_groups(self.model)))

    @property
    def spiking(self) -> bool:
        """Whether the model has spike sites."""
        return bool(self.groups)

    def running(self) -> AbstractContextManager:
        """The context in which the model runs as `execute` says."""
        return execute_trains(self.model) if self.execute == "trains" else nullcontext()

    def cut(self, tokens: int, window: int) -> list[TokenizedText]:
        """The texts in disjoint windows of so many tokens. Raises ValueError for one that is too short."""
        return [tokenize(text, self.tokenizer, tokens, window) for text in self.texts]

    def networks(self) -> dict[str, tuple[nn.Module, Callable[[], AbstractContextManager]]]:
        """Model and, if there is one, baseline: name -> network and the context that it runs in."""
        both: dict[str, tuple[nn.Module, Callable[[], AbstractContextManager]]] = {"model": (self.model, self.running)}
        return both if self.baseline is None else both | {"baseline": (self.baseline, nullcontext)}


def _no_figures(result: Result) -> dict[str, Figure]:
    return {}


def _no_summary(result: Result) -> dict[str, float | str | None]:
    return {}


def _no_files(settings: Any) -> Iterable[Path]:
    return ()


@dataclass(frozen=True)
class Part:
    """One part of an evaluation.

    Attributes:
        name: its key in the report. title: its heading.
        full, quick: settings, two instances of one frozen dataclass whose fields JSON can hold.
        run: (subject, settings, bar, earlier) -> result; `earlier` holds the results of the parts in `needs`. Raises
            whatever goes wrong: it is reported. Numbers that do not exist are None.
        cost: (subject, settings) -> tokens that the bar will move by: forward tokens of either network, a decoded
            token counted as `DECODED`.
        page: result -> Markdown paragraphs, tables and images among them. figures: result -> file name -> figure.
        summary: result -> label with unit -> number: what is put beside that of other reports.
        needs: names of parts whose results it reads. reads: settings -> files that its result depends on.
        lacks: subject -> why the part cannot be asked of this subject, or None if it can.
    """

    name: str
    title: str
    full: Any
    quick: Any
    run: Callable[[Subject, Any, tqdm, dict[str, Result]], Result]
    cost: Callable[[Subject, Any], float]
    page: Callable[[Result], list[str]]
    figures: Callable[[Result], dict[str, Figure]] = _no_figures
    summary: Callable[[Result], dict[str, float | str | None]] = _no_summary
    needs: tuple[str, ...] = ()
    reads: Callable[[Any], Iterable[Path]] = _no_files
    lacks: Callable[[Subject], str | None] = lambda subject: None


# What decoding one token costs in tokens of prefill, about; for the estimate of the time left alone.
DECODED = 20.0


@contextmanager
def evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Eval mode within, the mode of before afterwards."""
    present = [network for network in networks if network is not None]
    modes = [network.training for network in present]
    try:
        for network in present:
            network.eval()
        yield
    finally:
        for network, mode in zip(present, modes):
            network.train(mode)
