"""Windows out of sources that are read on the way, with a state that is saved and restored exactly.

Documents come in blocks of `BLOCK`, each block in an order of its own. The state of a source is where its block began
(as `datasets` says it), how many documents of the block are used up, and how many tokens of the next one. So a restored
stream reads one block again and tokenises nothing twice but the document that it was in the middle of.

Every process sees the same stream in the same order. Accelerate divides it: by default the main process reads and hands
out batches (`dispatch_batches`), otherwise each process reads all and keeps its own batches. Either way items, their
order and therefore losses do not depend on the number of processes.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from spikelm.recipes.documents import Document, encoded
from spikelm.recipes.packing import as_item, phases

BLOCK = 1000
_REMEMBERED = 4096


class Reader:
    """Endless windows of one streamed source.

    Args:
        part: has `stream(rng)`, an iterable dataset of rows `{"origin", "value"}`.
        encode: turns values into documents.
        window: tokens of a window.
        whole: documents are not cut, see `packing.py`.
        seed: of the order.
    """

    def __init__(self, part: Any, encode: Any, window: int, whole: bool, seed: list[int]):
        self._part, self._encode, self._window, self._whole = part, encode, window, whole
        self._seed = seed
        self.load_state_dict({"epoch": 0, "block": 0, "origin": None, "document": 0, "token": 0})

    def state_dict(self) -> dict[str, Any]:
        """Where the next window begins; plain numbers and texts, so that JSON takes it."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state_dict` was."""
        self._state = dict(state)
        self._rows: Any = None
        self._block: list[tuple[str, Any]] = []
        self._document: Document | None = None
        self._fruitless = False  # a whole epoch so far, without a document

    def window(self) -> list[Document]:
        """The documents of the next window."""
        pieces: list[Document] = []
        room, state = self._window, self._state
        while room:
            ids, learned = self._current()
            if self._whole:
                ids = ids[: self._window]
                if len(ids) > room:
                    break
            piece = slice(state["token"], state["token"] + room)
            pieces.append(Document(ids[piece], None if learned is None else learned[: len(ids)][piece]))
            room -= len(pieces[-1].ids)
            state["token"] += len(pieces[-1].ids)
            if state["token"] == len(ids):
                self._next()
        return pieces

    def _current(self) -> Document:
        """The document that is being read, the next one if none is."""
        state = self._state
        while self._document is None:
            if not self._block:
                self._read_block()
            elif state["document"] == len(self._block):
                state |= {"block": state["block"] + 1, "document": 0, "origin": self._rows.state_dict()}
                self._block = []
            else:
                self._document = next(encoded([self._block[state["document"]]], self._encode), None)
                if self._document is None:  # nothing but white space
                    self._next()
        self._fruitless = False
        return self._document

    def _next(self) -> None:
        self._document = None
        self._state["document"] += 1
        self._state["token"] = 0

    def _read_block(self) -> None:
        state = self._state
        seed = [*self._seed, state["epoch"]]
        if self._rows is None:
            self._rows = self._part.stream(np.random.default_rng(seed))
            if state["origin"] is not None:
                self._rows.load_state_dict(copy.deepcopy(state["origin"]))
            self._iterator = iter(self._rows)
        block = [(row["origin"], row["value"]) for row in islice(self._iterator, BLOCK)]
        if block:
            order = np.random.default_rng([*seed, state["block"] + 1]).permutation(len(block))
            self._block = [block[i] for i in order]
            return
        if self._fruitless or state["block"] == 0:
            raise ValueError(f"{self._part.label}: there is no document.")
        self._state |= {"epoch": state["epoch"] + 1, "block": 0, "origin": None}
        self._rows, self._fruitless = None, True


class Stream(IterableDataset):
    """Windows of several streamed sources in the shares of their weights, without end.

    Every `iter` begins where `load_state_dict` went, or at the start.

    Args:
        readers: one per source.
        weights: shares of the sources; they need not add up to 1.
        pad: token that fills what documents leave free.
        seed: of the mixing.
    """

    def __init__(self, readers: list[Reader], weights: list[float], window: int, pad: int, seed: int):
        self._readers, self._weights, self._window, self._pad = readers, weights, window, pad
        self._phases = phases(len(readers), seed)
        self._begin: dict[str, Any] = {
            "taken": [0] * len(readers),
            "readers": [reader.state_dict() for reader in readers],
        }
        self._states: OrderedDict[int, dict[str, Any]] = OrderedDict()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a stream is read by one worker: set dataloader_num_workers to 0 or 1.")
        taken = list(self._begin["taken"])
        for reader, state in zip(self._readers, self._begin["readers"]):
            reader.load_state_dict(state)
        while True:
            self._remember(taken)
            due = [(n + phase) / weight for n, phase, weight in zip(taken, self._phases, self._weights)]
            source = due.index(min(due))  # as `packing.schedule`
            item = as_item(self._readers[source].window(), self._window, self._pad)
            taken[source] += 1
            yield item

    def _remember(self, taken: list[int]) -> None:
        self._states[sum(taken)] = {
            "taken": list(taken),
            "readers": [reader.state_dict() for reader in self._readers],
        }
        if len(self._states) > _REMEMBERED:
            self._states.popitem(last=False)

    def state_dict(self, items: int) -> dict[str, Any]:
        """The state after `items` items since the very start, which JSON takes.

        Loaders read ahead of what was trained on, therefore the states of the last 4,096 items are kept. Raises
        ValueError for one that is not.
        """
        if items == sum(self._begin["taken"]):
            return copy.deepcopy(self._begin)
        if items not in self._states:
            raise ValueError(f"the stream's state after {items} items is not known: it keeps the last {_REMEMBERED}.")
        return copy.deepcopy(self._states[items])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `iter` begin there. Raises ValueError for the state of other sources."""
        if len(state["taken"]) != len(self._readers):
            raise ValueError(f"the state is of {len(state['taken'])} sources, the stream has {len(self._readers)}.")
        self._begin = copy.deepcopy(state)
        self._states.clear()
