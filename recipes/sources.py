"""Where documents come from, and which of them are held out: whole files, or whole documents of a hub dataset."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from spikelm.recipes.documents import files_key, rows, value_digest


@dataclass(frozen=True)
class Source:
    """Where documents come from: either `files` or `hub`.

    Attributes:
        files: a path or glob, or several. A text file is one document, as is a row of a .jsonl or .parquet file.
        hub: id of a dataset, or its folder. split, name: which part of it.
        heldout_split: the split of a hub dataset that is held out.
        field: the column of rows. None: that of the recipe, `text` (or `messages`).
        weight: share of the tokens trained on, relative to the other sources'. None: as many as the source has.
    """

    files: tuple[str, ...] = ()
    hub: str | None = None
    split: str = "train"
    name: str | None = None
    heldout_split: str | None = None
    field: str | None = None
    weight: float | None = None

    @property
    def label(self) -> str:
        """What reports call the source."""
        return self.hub or ", ".join(self.files)

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "Source":
        """Read a mapping of the YAML file. Raises ValueError."""
        given = known(cls, mapping, "a source")
        if isinstance(given.get("files"), str):
            given["files"] = [given["files"]]
        given["files"] = strings(given.get("files", []), "files")
        for name in ("hub", "split", "name", "heldout_split", "field"):
            if not isinstance(given.get(name, ""), str):
                raise ValueError(f"{name} of a source must be a text, got {given[name]!r}.")
        if bool(given["files"]) == bool(given.get("hub")):
            raise ValueError(f"a source has either files or hub, got {dict(mapping)}.")
        if misplaced := sorted({"split", "name", "heldout_split"} & set(given)) if given["files"] else []:
            raise ValueError(f"a source of files has no {misplaced[0]}: that belongs to hub.")
        if (weight := given.get("weight")) is not None and not (is_number(weight) and weight > 0):
            raise ValueError(f"weight of a source must be a number above 0, got {weight!r}.")
        return cls(**given)


class Files:
    """Documents of files, each named by its file."""

    def __init__(self, files: list[Path], field: str):
        self.files, self._field = files, field

    @property
    def key(self) -> str:
        """Changes when a file does."""
        return f"files {self._field} {files_key(self.files)}"

    def named(self) -> Iterator[tuple[str, Any]]:
        """`(file, document)` of all files in order."""
        return _named_rows(self.files, self._field)

    def stream(self, order: np.random.Generator) -> Any:
        """An `IterableDataset` of rows `{"origin", "value"}`, the files in an order of their own."""
        import datasets

        files = [self.files[i] for i in order.permutation(len(self.files))]
        return datasets.IterableDataset.from_generator(
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

    files: list[Path] = []

    def __init__(self, source: Source, split: str, field: str, share: float = 0.0, heldout: bool = False):
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
                yield f"{self._source.hub}, {self._split} row {number}", value

    def stream(self, order: np.random.Generator) -> Any:
        """An `IterableDataset` of rows `{"origin", "value"}`, as stored."""
        origin = f"{self._source.hub}, {self._split}"
        rows = self._load(streaming=True)
        named = rows.map(lambda row: {"origin": origin, "value": row[self._field]}, remove_columns=rows.column_names)
        return named.filter(lambda row: row["value"] is not None)

    def _load(self, streaming: bool) -> Any:
        import datasets

        source = self._source
        try:
            dataset = datasets.load_dataset(source.hub, source.name, split=self._split, streaming=streaming)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{source.hub}: cannot be loaded ({' '.join(str(error).split())}).") from error
        names = dataset.column_names
        if names is not None and self._field not in names:
            raise ValueError(f"{source.hub}: no column {self._field!r} among {', '.join(names)}. Name its `field`.")
        return dataset


def split(
    sources: tuple[Source, ...], heldout: float | tuple[str, ...], field: str, streaming: bool
) -> list[tuple[Files | Hub, Files | Hub | None]]:
    """What is trained on and what is held out (None: nothing), for every source.

    Raises ValueError: a source without files, a file in two sources, a held-out name that fits no file, nothing left to
    train on, nothing held out although something should be.
    """
    parts: list[tuple[Files | Hub, Files | Hub | None]] = []
    owners: dict[Path, str] = {}
    unused = set(heldout) if isinstance(heldout, tuple) else set()
    for source in sources:
        column = source.field or field
        if source.hub:
            parts.append(_split_hub(source, heldout, column, streaming))
            continue
        files = _found(source)
        for file in files:
            if owners.setdefault(file, source.label) != source.label:
                raise ValueError(
                    f"{file} is in two sources, {owners[file]} and {source.label}: leave it to one of them."
                )
        if isinstance(heldout, tuple):
            held = {file for file in files for pattern in heldout if file.match(pattern)}
            unused -= {pattern for pattern in heldout if any(file.match(pattern) for file in files)}
        else:
            held = _share_of(files, heldout)
        if len(held) == len(files):
            raise ValueError(f"{source.label}: every file is held out, nothing is left to train on.")
        train = Files([file for file in files if file not in held], column)
        parts.append((train, Files([file for file in files if file in held], column) if held else None))
    if unused:
        raise ValueError(f"heldout: no file fits {', '.join(sorted(unused))}.")
    if heldout and all(held is None for _, held in parts):
        raise ValueError("heldout: nothing is held out. A source needs two files, or a hub dataset a heldout_split.")
    return parts


def _split_hub(source: Source, heldout: float | tuple[str, ...], field: str, streaming: bool) -> tuple[Hub, Hub | None]:
    if source.heldout_split:
        return Hub(source, source.split, field), Hub(source, source.heldout_split, field)
    if isinstance(heldout, tuple) or not heldout:
        return Hub(source, source.split, field), None
    if streaming:
        raise ValueError(f"{source.hub} is streamed: a share cannot be held out, name its heldout_split.")
    return Hub(source, source.split, field, heldout), Hub(source, source.split, field, heldout, heldout=True)


def _found(source: Source) -> list[Path]:
    """The files of a source, each once (however it is linked), in the order of their names."""
    found: dict[Path, None] = {}
    for pattern in source.files:
        matches = [Path(match) for match in sorted(glob(str(Path(pattern).expanduser()), recursive=True))]
        files = [match.resolve() for match in matches if match.is_file()]
        if not files:
            raise ValueError(f"no file fits {pattern!r} (seen from {Path.cwd()}).")
        found |= dict.fromkeys(files)
    return list(found)


def _share_of(files: list[Path], share: float) -> set[Path]:
    """About `share` of the files, at least one of two or more, whichever have the smallest hashes of their names."""
    if not share or len(files) < 2:
        return set()
    ranked = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).hexdigest())
    return set(ranked[: min(len(files) - 1, max(1, round(share * len(files))))])


def known(cls: Any, mapping: Any, what: str) -> dict[str, Any]:
    """The mapping as a dict, if its keys are fields of `cls` and none is missing. Raises ValueError."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{what} must be a mapping of names to values, got {mapping!r}.")
    names = {field.name: field.default is MISSING for field in fields(cls)}
    if unknown := [name for name in mapping if name not in names]:
        raise ValueError(f"{what} has no field {unknown[0]!r}; there are {', '.join(names)}.")
    if missing := [name for name, required in names.items() if required and name not in mapping]:
        raise ValueError(f"{what} needs {missing[0]!r}.")
    return dict(mapping)


def strings(value: Any, what: str) -> tuple[str, ...]:
    """A list of texts as a tuple. Raises ValueError."""
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) and entry for entry in value):
        raise ValueError(f"{what} must be a list of texts, got {value!r}.")
    return tuple(value)


def is_number(value: Any) -> bool:
    """Whether a value of YAML is a number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
