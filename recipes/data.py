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

from dataclasses import dataclass
from typing import Any

from spikelm.recipes.documents import TextEncoder, stored
from spikelm.recipes.packing import PLANS, InOrder, Mixture, Windows
from spikelm.recipes.settings import strict
from spikelm.recipes.sources import Files, Hub, Source, split
from spikelm.recipes.streaming import Reader, Stream


@dataclass(frozen=True, kw_only=True)
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

    sources: list[Source]
    window: int
    heldout: float | list[str] = 0.0
    streaming: bool = False
    documents: str = "cut"
    end_of_text: str | None = None

    def __post_init__(self) -> None:
        weighted = {source.weight is not None for source in self.sources}
        if not weighted:
            raise ValueError("data.sources must name at least one source.")
        if len(weighted) == 2:
            raise ValueError("data.sources: either every source has a weight, or none.")
        if self.streaming and len(self.sources) > 1 and weighted != {True}:
            raise ValueError("data.sources: streamed sources have no known size; give each a weight.")
        if self.window < 2:
            raise ValueError(f"data.window must be at least 2; got {self.window}.")
        if not isinstance(self.heldout, list) and not 0 <= self.heldout < 1:
            raise ValueError(f"data.heldout must be a share below 1, or files; got {self.heldout}.")
        if self.documents not in PLANS:
            raise ValueError(f"data.documents must be {' or '.join(PLANS)}; got {self.documents!r}.")

    @classmethod
    def of(cls, mapping: Any) -> "DataSettings":
        """Read the mapping `data` of a YAML file. Raises ValueError for what is missing, unknown or out of range."""
        if isinstance(mapping, dict) and isinstance(mapping.get("sources"), list):
            sources = [Source.of(source, f"data.sources[{i}].") for i, source in enumerate(mapping["sources"])]
            mapping = mapping | {"sources": sources}
        return strict(cls, mapping, "data.")


@dataclass(frozen=True)
class Data:
    """Data ready to train on.

    Attributes:
        train: a `Mixture`, one pass long (`train.sized(n)`: as long as asked for), or a `Stream` without end.
        heldout: every held-out document once, or None.
        facts: what `describe` knows of the sources.
    """

    train: Mixture | Stream
    heldout: InOrder | None
    facts: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """What there is, for logs and model cards: plain numbers and names, per source and in all.

        `epochs` of a source: how often its tokens are seen in `len(train)` windows.
        """
        facts = {**self.facts, "sources": [dict(source) for source in self.facts["sources"]]}
        if isinstance(self.train, Mixture):
            facts["windows"] = len(self.train)
            for fact, source, taken in zip(facts["sources"], self.train.sources, self.train.taken()):
                fact |= {"windows": taken, "epochs": round(source.plan.epochs(taken), 3)}
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
    facts: list[dict[str, Any]] = [{"source": source.label} for source in settings.sources]
    heldout = []
    for fact, (_, held) in zip(facts, parts):
        if held is not None:
            windows = _windows(held, encode, settings, None)
            fact |= _sizes(held, windows, "heldout_") | {"heldout_names": [str(file) for file in held.files]}
            heldout.append(windows)
    weights = [source.weight or 1.0 for source in settings.sources]
    train: Mixture | Stream
    if settings.streaming:
        whole = settings.documents == "whole"
        readers = [Reader(part, encode, settings.window, whole, [seed, i]) for i, (part, _) in enumerate(parts)]
        train = Stream(readers, weights, settings.window, pad, seed)
    else:
        sources = [_windows(part, encode, settings, [seed, i]) for i, (part, _) in enumerate(parts)]
        if settings.sources[0].weight is None:
            weights = [float(source.plan.tokens) for source in sources]
        for fact, (part, _), windows in zip(facts, parts, sources):
            fact |= _sizes(part, windows)
        train = Mixture(sources, weights, pad, seed, sum(source.plan.windows() for source in sources))
    for fact, weight in zip(facts, weights):
        fact["share"] = round(weight / sum(weights), 4)
    form = {"window": settings.window, "documents": settings.documents, "streaming": settings.streaming}
    form |= {"end_of_text": encode.ends_with, "sources": facts}
    return Data(train, InOrder(heldout, pad) if heldout else None, form)


def _windows(part: Files | Hub, encode: Any, settings: DataSettings, seed: list[int] | None) -> Windows:
    documents = stored(part, encode)
    return Windows(documents, PLANS[settings.documents](documents.lengths, settings.window, seed))


def _sizes(part: Files | Hub, windows: Windows, prefix: str = "") -> dict[str, int]:
    lengths = windows.documents.lengths
    sizes = {"files": len(part.files), "documents": len(lengths), "tokens": int(lengths.sum())}
    return {prefix + name: size for name, size in sizes.items()}
