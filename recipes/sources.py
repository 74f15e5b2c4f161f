"""Where documents come from, and which of them are held out: whole files, or whole documents of a hub dataset."""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from spikelm.recipes.documents import files_key, library, rows, value_digest
from spikelm.recipes.settings import strict


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from: either `files` or `hub`.

    Attributes:
        files: paths or globs. A text file is one document, as is every row of a .jsonl or .parquet file.
        hub: id of a dataset, or its folder. split, name: which part of it.
        heldout_split: the split of a hub dataset that is held out.
        field: the column of rows. None: that of the recipe, `text` (or `messages`).
        weight: share of the tokens trained on, relative to other sources. None: as many as the source has.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    hub: str | None = None
    split: str = "train"
    name: str | None = None
    heldout_split: str | None = None
    field: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if bool(self.files) == bool(self.hub):
            raise ValueError("a source has either files or hub.")
        if self.files and (self.split, self.name, self.heldout_split) != ("train", None, None):
            raise ValueError("split, name and heldout_split of a source belong to hub, not to files.")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"weight of a source must be above 0; got {self.weight}.")

    @property
    def label(self) -> str:
        """What reports call the source."""
        return self.hub or ", ".join(self.files)

    @classmethod
    def of(cls, mapping: Any, prefix: str = "") -> "Source":
        """Read a mapping of the YAML file, where `files` may be a single text. Raises ValueError."""
        if isinstance(mapping, dict) and isinstance(mapping.get("files"), str):
            mapping = mapping | {"files": [mapping["files"]]}
        return strict(cls, mapping, prefix)


class Files:
    """Documents of files, each named by its file."""

    def __init__(self, label: str, files: list[Path], field: str):
        self.label, self.files, self._field = label, files, field

    @property
    def key(self) -> str:
        """Changes when a file does."""
        return f"files {self._field} {files_key(self.files)}"

    def named(self) -> Iterator[tuple[str, Any]]:
        """`(file, document)` of all files in order."""
        return _named_rows(self.files, self._field)

    def stream(self, order: np.random.Generator) -> Any:
        """An `IterableDataset` of rows `{"origin", "value"}`, the files in an order of their own."""
        files = [self.files[i] for i in order.permutation(len(self.files))]
        return library().IterableDataset.from_generator(
            _rows_as_dicts, gen_kwargs={"files": files, "field": self._field}
        )


def _named_rows(files: list[Path], field: str) -> Iterator[tuple[str, Any]]:
    return ((str(file), value) for file in files for value in rows(file, field))


def _rows_as_dicts(files: list[Path], field: str) -> Iterator[dict[str, Any]]:
    for origin, value in _named_rows(files, field):
        yield {"origin": origin, "value": value}


class Hub:
    """Documents of a split of a hub dataset: all, or those on one side of a split by a hash of their content.

    Args:
        source: with `hub`. split: which split of it.
        share: of the documents that are held out. heldout: take these, not the others.
    """

    files: tuple[Path, ...] = ()

    def __init__(self, source: Source, split: str, field: str, share: float = 0.0, heldout: bool = False):
        self.label = f"{source.hub}, {split}{' (held out)' if heldout else ''}"
        self._source, self._split, self._field = source, split, field
        self._share, self._heldout = share, heldout

    @property
    def key(self) -> str:
        """Changes when the dataset does, or the share that is held out."""
        return f"hub {self._field} {self._share} {self._heldout} {self._load(streaming=False)._fingerprint}"

    def named(self) -> Iterator[tuple[str, Any]]:
        """`(hub id and row, document)` in order."""
        for number, row in enumerate(self._load(streaming=False)):
            value = row[self._field]
            if value is not None and (value_digest(value) < self._share) == self._heldout:
                yield f"{self.label}, row {number}", value

    def stream(self, order: np.random.Generator) -> Any:
        """An `IterableDataset` of rows `{"origin", "value"}`, as stored."""
        rows = self._load(streaming=True)
        named = rows.map(
            lambda row: {"origin": self.label, "value": row[self._field]}, remove_columns=rows.column_names
        )
        return named.filter(lambda row: row["value"] is not None)

    def _load(self, streaming: bool) -> Any:
        datasets, source = library(), self._source
        try:
            dataset = datasets.load_dataset(source.hub, source.name, split=self._split, streaming=streaming)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{source.hub}: cannot be loaded ({' '.join(str(error).split())}).") from error
        names = dataset.column_names
        if names is not None and self._field not in names:
            raise ValueError(f"{source.hub}: no column {self._field!r} among {', '.join(names)}. Name its `field`.")
        return dataset


def split(
    sources: list[Source], heldout: float | list[str], field: str, streaming: bool
) -> list[tuple[Files | Hub, Files | Hub | None]]:
    """What is trained on and what is held out (None: nothing), for every source.

    Raises ValueError: a source without files, a file in two sources, a held-out name that fits no file, nothing left to
    train on, nothing held out although something should be.
    """
    parts: list[tuple[Files | Hub, Files | Hub | None]] = []
    owners: dict[Path, str] = {}
    unused = set(heldout) if isinstance(heldout, list) else set()
    for source in sources:
        column = source.field or field
        if source.hub:
            parts.append(_split_hub(source, heldout, column, streaming))
            continue
        files = _found(source)
        for file in files:
            if (owner := owners.setdefault(file.resolve(), source.label)) != source.label:
                raise ValueError(f"{file} is in two sources, {owner} and {source.label}: leave it to one of them.")
        if isinstance(heldout, list):
            fits = [(file, pattern) for file in files for pattern in heldout if file.absolute().match(pattern)]
            held = {file for file, _ in fits}
            unused -= {pattern for _, pattern in fits}
        else:
            held = _share_of(files, heldout)
        if len(held) == len(files):
            raise ValueError(f"{source.label}: every file is held out, nothing is left to train on.")
        train = Files(source.label, [file for file in files if file not in held], column)
        parts.append((train, Files(source.label, [file for file in files if file in held], column) if held else None))
    if unused:
        raise ValueError(f"heldout: no file fits {', '.join(sorted(unused))}.")
    if heldout and all(held is None for _, held in parts):
        raise ValueError("heldout: nothing is held out. A source needs two files, or a hub dataset a heldout_split.")
    return parts


def _split_hub(source: Source, heldout: float | list[str], field: str, streaming: bool) -> tuple[Hub, Hub | None]:
    if source.heldout_split:
        return Hub(source, source.split, field), Hub(source, source.heldout_split, field)
    if isinstance(heldout, list) or not heldout:
        return Hub(source, source.split, field), None
    if streaming:
        raise ValueError(f"{source.hub} is streamed: a share cannot be held out, name its heldout_split.")
    return Hub(source, source.split, field, heldout), Hub(source, source.split, field, heldout, heldout=True)


def _found(source: Source) -> list[Path]:
    """The files of a source, each once (however it is linked), in the order of their names."""
    found: dict[Path, Path] = {}
    for pattern in source.files:
        matches = map(Path, sorted(glob(str(Path(pattern).expanduser()), recursive=True)))
        files = {match.resolve(): match for match in matches if match.is_file()}
        if not files:
            raise ValueError(f"no file fits {pattern!r} (seen from {Path.cwd()}).")
        found = files | found
    return sorted(found.values())


def _share_of(files: list[Path], share: float) -> set[Path]:
    """About `share` of the files, at least one of two or more, whichever have the smallest hashes of their names."""
    if not share or len(files) < 2:
        return set()
    ranked = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
    return set(ranked[: min(len(files) - 1, max(1, round(share * len(files))))])
