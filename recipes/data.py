"""What recipes train on: sources of text, mixed and packed into windows, whole files held out.

    data:
      sources:
        - files: corpora/anarchism/*.txt          # text (also .gz), .jsonl, .parquet
          weight: 2
        - hub: owner/name                         # a dataset of the hub, or its folder
          split: train
          heldout_split: validation
          weight: 1
      window: 2048
      heldout: ["anarchism/secA*.txt"]            # or a share of the files: 0.02

Text is tokenised once and kept as Arrow files by `datasets`; with `streaming: true` it is tokenised on the way.
How documents become windows: `packing.py`; how a stream is resumed: `streaming.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spikelm.recipes.documents import TextEncoder, stored
from spikelm.recipes.packing import PLANS, InOrder, Mixture, Windows
from spikelm.recipes.sources import Source, is_number, known, split, strings
from spikelm.recipes.streaming import Reader, Stream


@dataclass(frozen=True)
class DataSettings:
    """What the `data` section of a recipe says.

    Attributes:
        sources: where documents come from. All have a weight, or none has.
        window: tokens of an item.
        heldout: share of the files of every source (of the documents of a hub dataset) that is held out, chosen by a
            hash of their names (of their text); or names or globs of files, at least one file each. 0: none.
        streaming: read on the way instead of tokenising all beforehand.
        documents: `cut` where windows end (nothing is lost), or kept `whole` (windows are filled up; a document longer
            than a window loses its end).
        end_of_text: token behind every text. None: the tokenizer's `eos_token`, if it has one.
    """

    sources: tuple[Source, ...]
    window: int
    heldout: float | tuple[str, ...] = 0.0
    streaming: bool = False
    documents: str = "cut"
    end_of_text: str | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "DataSettings":
        """Read a mapping of the YAML file. Raises ValueError for what is missing, unknown or out of range."""
        given = known(cls, mapping, "data")
        if not isinstance(given["sources"], list) or not given["sources"]:
            raise ValueError("sources of data must be a list with at least one entry.")
        given["sources"] = tuple(Source.of(entry) for entry in given["sources"])
        weighted = [source.weight is not None for source in given["sources"]]
        if any(weighted) and not all(weighted):
            raise ValueError("either every source has a weight, or none.")
        window = given["window"]
        if not isinstance(window, int) or isinstance(window, bool) or window < 2:
            raise ValueError(f"window of data must be an integer of at least 2, got {window!r}.")
        heldout = given.get("heldout", 0.0)
        if isinstance(heldout, str):
            heldout = [heldout]
        if isinstance(heldout, list):
            given["heldout"] = strings(heldout, "heldout")
        elif not is_number(heldout) or not 0 <= heldout < 1:
            raise ValueError(f"heldout of data must be a share below 1 or a list of files, got {heldout!r}.")
        if given.get("documents", "cut") not in PLANS:
            raise ValueError(f"documents of data must be {' or '.join(PLANS)}, got {given['documents']!r}.")
        if not isinstance(given.get("streaming", False), bool):
            raise ValueError(f"streaming of data must be true or false, got {given['streaming']!r}.")
        if not isinstance(given.get("end_of_text", ""), str):
            raise ValueError(f"end_of_text of data must be a token, got {given['end_of_text']!r}.")
        settings = cls(**given)
        if settings.streaming and not all(weighted) and len(weighted) > 1:
            raise ValueError("streamed sources have no known size: give each a weight.")
        return settings


@dataclass(frozen=True)
class Data:
    """Data ready to train on.

    Attributes:
        train: a `Mixture`, one pass long (`train.sized(n)`: as long as asked for), or a `Stream` without end.
        heldout: every held-out document once, or None.
    """

    train: Mixture | Stream
    heldout: InOrder | None
    _facts: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What there is, for logs and model cards: plain numbers and names, per source and in all.

        `epochs` of a source: how often its tokens are seen in `len(train)` windows.
        """
        facts = {**self._facts, "sources": [dict(source) for source in self._facts["sources"]]}
        if isinstance(self.train, Mixture):
            facts["windows"] = len(self.train)
            for source, taken in zip(facts["sources"], self.train.taken()):
                source["windows"] = taken
                source["epochs"] = round(taken / source.pop("windows_of_an_epoch"), 3)
        return facts


def load_data(settings: DataSettings, tokenizer: Any, seed: int, encode: Any = None) -> Data:
    """Find, read, tokenise and pack.

    Args:
        settings: see `DataSettings`.
        tokenizer: of transformers. Its own special tokens are kept.
        seed: of the order of documents and sources; what is held out does not depend on it.
        encode: turns documents into tokens. None: `TextEncoder`, which takes them as texts.

    Raises:
        ValueError: a source without files; a file that is empty, unreadable or not UTF-8 (named); a held-out name that
            fits no file; nothing left to train on or nothing to hold out.
    """
    encode = encode or TextEncoder(tokenizer, settings.end_of_text)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    parts = split(settings.sources, settings.heldout, encode.field, settings.streaming)
    plan = PLANS[settings.documents]
    weights = [source.weight or 1.0 for source in settings.sources]
    facts: list[dict[str, Any]] = [{"source": source.label} for source in settings.sources]
    heldout = []
    for fact, (_, held) in zip(facts, parts):
        if held is not None:
            documents = stored(held.named, encode, held.key)
            fact |= {"heldout_documents": len(documents), "heldout_tokens": int(documents.lengths.sum())}
            fact |= {"heldout_files": [file.name for file in held.files]}
            if len(documents):
                heldout.append(Windows(documents, plan(documents.lengths, settings.window, None)))
    train: Mixture | Stream
    if settings.streaming:
        readers = [
            Reader(part, encode, settings.window, settings.documents, [seed, i]) for i, (part, _) in enumerate(parts)
        ]
        train = Stream(readers, weights, settings.window, pad, seed)
    else:
        sources = []
        for i, (fact, (part, _)) in enumerate(zip(facts, parts)):
            documents = stored(part.named, encode, part.key)
            if not len(documents):
                raise ValueError(f"{settings.sources[i].label}: no document to train on.")
            windows = Windows(documents, plan(documents.lengths, settings.window, [seed, i]))
            sources.append(windows)
            fact |= {"documents": len(documents), "tokens": int(documents.lengths.sum())}
            fact |= {
                "windows_of_an_epoch": windows.plan.tokens / settings.window
                if settings.documents == "cut"
                else windows.plan.windows()
            }
        if settings.sources[0].weight is None:
            weights = [float(source.plan.tokens) for source in sources]
        train = Mixture(sources, weights, pad, seed, sum(source.plan.windows() for source in sources))
    for fact, (part, _), weight in zip(facts, parts, weights):
        fact |= {"files": len(part.files), "share": round(weight / sum(weights), 4)}
    shared = {
        "window": settings.window,
        "documents": settings.documents,
        "streaming": settings.streaming,
        "end_of_text": encode.ends_with,
    }
    return Data(train, InOrder(heldout, pad) if heldout else None, {**shared, "sources": facts})
