"""Windows of one length out of documents of any length, every place known in advance.

A window `[W]` holds pieces of documents, one behind the other:

    input_ids     a a a a a | b b | c c c c c
    position_ids  0 1 2 3 4 | 0 1 | 0 1 2 3 4      a restart tells the model where a document begins
    labels        - a a a a | - b | - c c c c      -100 for `-`: no document's beginning is predicted from another

(the model shifts labels itself: the label at t is what it predicts at t - 1.) Which pieces window i holds depends on
the seed and on i alone. So skipping costs nothing, and a run that is resumed sees what it would have seen.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from spikelm.recipes.documents import Document, StoredDocuments

IGNORED = -100


class Piece(NamedTuple):
    """Tokens `begin` to `end` of a document."""

    document: int
    begin: int
    end: int


def as_item(pieces: list[Document], window: int, pad: int) -> dict[str, Tensor]:
    """A training item: `input_ids`, `labels`, `position_ids`, each `[window]` int64.

    What the pieces leave free is filled with `pad` as a document of its own that carries no loss.
    """
    ids: NDArray[np.int64] = np.full(window, pad, np.int64)
    labels: NDArray[np.int64] = np.full(window, IGNORED, np.int64)
    positions: NDArray[np.int64] = np.empty(window, np.int64)
    at = 0
    for piece in pieces:
        end = at + len(piece.ids)
        ids[at:end] = piece.ids
        labels[at:end] = piece.ids if piece.learned is None else np.where(piece.learned, piece.ids, IGNORED)
        labels[at] = IGNORED
        positions[at:end] = np.arange(end - at)
        at = end
    positions[at:] = np.arange(window - at)
    named = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.from_numpy(array) for name, array in named.items()}


class _Plan:
    """Where the windows of a source begin, in every epoch.

    Args:
        lengths: tokens of the documents, `[documents]`.
        window: tokens of a window.
        seed: of the order of the documents, another one in every epoch. None: as stored.
    """

    def __init__(self, lengths: NDArray[np.int64], window: int, seed: list[int] | None):
        self.window, self.tokens = window, int(lengths.sum())
        self._lengths, self._seed = lengths, seed
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`(order, ends)`: the documents in order, and where each ends in the text that they make together."""
        if epoch not in self._orders:
            count = len(self._lengths)
            order = np.arange(count)
            if self._seed is not None:
                order = np.random.default_rng([*self._seed, epoch]).permutation(count)
            if len(self._orders) > 1:  # a window may reach over the end of an epoch: two are kept
                self._orders.pop(min(self._orders))
            self._orders[epoch] = order, self._lengths[order].cumsum()
        return self._orders[epoch]


class CutPlan(_Plan):
    """All epochs are one endless text, cut every `window` tokens: nothing is lost, nothing is filled up."""

    def windows(self) -> int:
        """Windows that begin in the first epoch."""
        return -(-self.tokens // self.window)

    def epochs(self, windows: int) -> float:
        """How often the source is seen in so many windows."""
        return windows * self.window / self.tokens

    def pieces(self, index: int) -> list[Piece]:
        """The pieces of window `index`, which together are `window` long."""
        epoch, at = divmod(index * self.window, self.tokens)
        order, ends = self._order(epoch)
        place = int(np.searchsorted(ends, at, side="right"))
        found, room = [], self.window
        while room:
            if place == len(order):
                epoch, at, place = epoch + 1, 0, 0
                order, ends = self._order(epoch)
            begin = at - (int(ends[place - 1]) if place else 0)
            taken = min(room, int(ends[place]) - at)
            found.append(Piece(int(order[place]), begin, begin + taken))
            at, room, place = at + taken, room - taken, place + 1
        return found


class WholePlan(_Plan):
    """Documents stay whole: a window takes the next ones while they fit. What is longer than a window loses its end."""

    def __init__(self, lengths: NDArray[np.int64], window: int, seed: list[int] | None):
        super().__init__(np.minimum(lengths, window), window, seed)
        self._first = [0]  # the first window of every epoch that was reached, and of the next one
        self._starts: list[list[int]] = []  # of every such epoch: `_starts_of`

    def windows(self) -> int:
        """Windows of the first epoch."""
        self._reach(0)
        return self._first[1]

    def epochs(self, windows: int) -> float:
        """How often the source is seen in so many windows."""
        return windows / self.windows()  # epochs differ by a few windows

    def pieces(self, index: int) -> list[Piece]:
        """The pieces of window `index`, which together are at most `window` long."""
        self._reach(index)
        epoch = int(np.searchsorted(self._first, index, side="right")) - 1
        order, _ = self._order(epoch)
        at = index - self._first[epoch]
        begin, end = self._starts[epoch][at : at + 2]
        return [Piece(int(d), 0, int(self._lengths[d])) for d in order[begin:end]]

    def _reach(self, index: int) -> None:
        while self._first[-1] <= index:
            starts = self._starts_of(len(self._starts))
            self._starts.append(starts)
            self._first.append(self._first[-1] + len(starts) - 1)

    def _starts_of(self, epoch: int) -> list[int]:
        """Place in the order of the first document of every window, and the end of the last one."""
        _, ends = self._order(epoch)
        starts, before = [0], 0
        while starts[-1] < len(ends):
            starts.append(int(np.searchsorted(ends, before + self.window, side="right")))
            before = int(ends[starts[-1] - 1])
        return starts


PLANS = {"cut": CutPlan, "whole": WholePlan}


class Windows:
    """Endless windows of one source: window i is `pieces(i)` of the plan."""

    def __init__(self, documents: StoredDocuments, plan: CutPlan | WholePlan):
        self.documents, self.plan = documents, plan

    def __getitem__(self, index: int) -> list[Document]:
        return [self.documents.piece(*piece) for piece in self.plan.pieces(index)]


def schedule(weights: list[float], phases: list[float], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which source gives item i, and which of its windows: `(source, window)`, each `[count]`.

    Window j of source k is due at `(j + phase_k) / weight_k`, and items come when they are due. So after any number of
    items every source has given its share, up to one window per source.
    """
    total = sum(weights)
    shares = [int(count * weight / total) + len(weights) + 1 for weight in weights]
    due = np.concatenate([(np.arange(n) + phase) / w for n, phase, w in zip(shares, phases, weights)])
    source: NDArray[np.int64] = np.repeat(np.arange(len(weights)), shares)
    window = np.concatenate([np.arange(n) for n in shares])
    order = np.argsort(due, kind="stable")[:count]
    return source[order], window[order]


def phases(count: int, seed: int) -> list[float]:
    """When the first window of every source is due."""
    return np.random.default_rng([seed, count]).random(count).tolist()


class Mixture(Dataset):
    """Windows of several sources in the shares of their weights. Item i depends on the seed and on i alone.

    Args:
        sources: one `Windows` each.
        weights: shares of the sources; they need not add up to 1.
        pad: token that fills what documents leave free.
        seed: of the mixing. The order within a source is that of its plan.
        length: number of items.
    """

    def __init__(self, sources: list[Windows], weights: list[float], pad: int, seed: int, length: int):
        self.sources, self.weights, self._pad, self._seed = sources, weights, pad, seed
        self._source, self._window = schedule(weights, phases(len(sources), seed), length)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        windows = self.sources[self._source[index]]
        return as_item(windows[int(self._window[index])], windows.plan.window, self._pad)

    def sized(self, length: int) -> "Mixture":
        """The same items, as many as asked for: beyond one pass, sources begin anew in another order."""
        return Mixture(self.sources, self.weights, self._pad, self._seed, length)

    def taken(self) -> list[int]:
        """Windows of every source among the items."""
        return np.bincount(self._source, minlength=len(self.sources)).tolist()


class InOrder(Dataset):
    """Every document of several sources once, in the order in which they are stored: to evaluate on."""

    def __init__(self, sources: list[Windows], pad: int):
        self.sources, self._pad = sources, pad
        self._ends = np.cumsum([source.plan.windows() for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[which]
        own = index - int(self._ends[which - 1] if which else 0)
        pieces = source[own]
        if own + 1 == source.plan.windows() and isinstance(source.plan, CutPlan):
            pieces = _first_tokens(pieces, source.plan.tokens - own * source.plan.window)
        return as_item(pieces, source.plan.window, self._pad)


def _first_tokens(pieces: list[Document], count: int) -> list[Document]:
    kept = []
    for piece in pieces:
        if count > 0:
            kept.append(Document(piece.ids[:count], None if piece.learned is None else piece.learned[:count]))
            count -= len(piece.ids)
    return kept
