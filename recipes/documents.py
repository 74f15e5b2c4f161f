"""Documents out of files and hubs, tokenised once: `datasets` keeps them as Arrow files, memory-mapped when read.

A document is a whole text file, or one row of a .jsonl or .parquet file or of a hub dataset. Its tokens are what the
tokenizer makes of it, the tokenizer's own special tokens included, and an end-of-text token behind them.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from gzip import BadGzipFile
from gzip import open as open_gzip
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Part of the cache key: raise it when the same files must give other tokens.
_VERSION = 1
_BATCH = 64


class Document(NamedTuple):
    """Tokens `[n]` int64; `learned` `[n]` bool says which of them carry loss (None: all)."""

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_] | None = None


class TextEncoder:
    """Turns texts into documents, an end-of-text token behind each.

    Args:
        tokenizer: of transformers.
        end_of_text: a token of its vocabulary. None: its `eos_token`; without one, nothing is appended.

    Raises:
        ValueError: `end_of_text` is no token of the vocabulary.
    """

    field = "text"  # the column of rows that holds the text, unless a source names another
    masks = False  # whether documents say which of their tokens are learned

    def __init__(self, tokenizer: Any, end_of_text: str | None = None):
        if end_of_text is not None and end_of_text not in tokenizer.get_vocab():
            raise ValueError(f"end_of_text: {end_of_text!r} is not a token of this tokenizer; leave it out.")
        self.tokenizer = tokenizer
        self.ends_with = end_of_text or tokenizer.eos_token
        self.end = None if self.ends_with is None else tokenizer.convert_tokens_to_ids(self.ends_with)
        self.key = f"text {self.end} {tokenizer_key(tokenizer)}"

    def __call__(self, texts: list[Any]) -> list[Document]:
        """One document per text that is not blank. Raises ValueError for what is no text."""
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"a text was expected, got {type(text).__name__}")
        kept = [text for text in texts if text.strip()]
        if not kept:
            return []
        # verbose=False: a document may be longer than the model's context, it is cut later.
        encoded = self.tokenizer(kept, return_attention_mask=False, verbose=False)["input_ids"]
        return [Document(np.asarray(self._ended(ids), np.int64)) for ids in encoded]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.end is None or (ids and ids[-1] == self.end) else [*ids, self.end]


def tokenizer_key(tokenizer: Any) -> str:
    """A digest that is the same for tokenizers that give the same tokens, in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return digest(type(tokenizer).__name__, rules, repr(sorted(map(str, tokenizer.special_tokens_map.items()))))


def rows(path: Path, field: str) -> Iterator[Any]:
    """The documents of a file, undecoded: its whole text, or `field` of every row of .jsonl and .parquet (also .gz).

    Raises:
        ValueError: the file cannot be read, is empty or not UTF-8, or a row is broken or lacks the field. Names the
            file, and the row.
    """
    kind = _kind(path)
    if kind == ".json":
        raise ValueError(f"{path}: .json is not read. Write one object per line into a .jsonl file.")
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path, field)
            return
        with open_gzip(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if kind == ".jsonl":
                yield from _json_rows(path, file, field)
                return
            text = _decoded(path, file.read())
    except (OSError, EOFError, BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Repair it, or leave it out of the sources.") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty. Leave it out of the sources.")
    yield text


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _decoded(where: Any, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}. Convert it, or leave it out.") from error


def _json_rows(path: Path, lines: Iterable[bytes], field: str) -> Iterator[Any]:
    found = False
    for number, raw in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not (line := _decoded(where, raw).strip()):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}).") from error
        if not isinstance(row, dict) or field not in row:
            raise ValueError(f"{where}: no field {field!r}. Name the source's `field`.")
        found = True
        yield row[field]
    if not found:
        raise ValueError(f"{path}: the file is empty. Leave it out of the sources.")


def _parquet_rows(path: Path, field: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path}: no column {field!r} among {names}. Name the source's `field`.")
        if not file.metadata.num_rows:
            raise ValueError(f"{path}: the file is empty. Leave it out of the sources.")
        for batch in file.iter_batches(_BATCH, columns=[field]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error}).") from error


def encoded(named: Iterable[tuple[str, Any]], encode: Callable[[list[Any]], list[Document]]) -> Iterator[Document]:
    """Documents of `(origin, value)` pairs, in batches. A value that cannot be encoded is reported with its origin."""
    pairs = iter(named)
    while batch := list(islice(pairs, _BATCH)):
        try:
            yield from encode([value for _, value in batch])
        except ValueError:
            for origin, value in batch:  # which one was it?
                try:
                    encode([value])
                except ValueError as error:
                    raise ValueError(f"{origin}: {error}") from error
            raise


def files_key(files: list[Path]) -> str:
    """A digest of names, sizes and times of files."""
    stamps = [(str(file.resolve()), file.stat()) for file in files]
    return digest(*(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stamps))


def stored(part: Any, encode: Any) -> "StoredDocuments":
    """All documents of a part of a source, tokenised at most once by any number of processes.

    Args:
        part: `named()` gives `(origin, value)` pairs, `key` says when they may have changed, `label` is for errors.
        encode: turns values into documents; `key` says how.

    Raises:
        ValueError: a document that cannot be read or encoded, or none at all. Nothing is kept then.
    """
    datasets = library()

    def generate() -> Iterator[dict[str, Any]]:
        found = False
        for ids, learned in encoded(part.named(), encode):
            found = True
            yield {"input_ids": ids} if learned is None else {"input_ids": ids, "learned": learned}
        if not found:
            raise ValueError(f"{part.label}: there is no document.")

    columns = {"input_ids": datasets.List(datasets.Value("int32"))}
    if encode.masks:
        columns["learned"] = datasets.List(datasets.Value("bool"))
    try:
        dataset = datasets.Dataset.from_generator(
            generate,
            features=datasets.Features(columns),
            fingerprint=digest(str(_VERSION), part.key, encode.key)[:32],
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    return StoredDocuments(dataset)


class StoredDocuments:
    """Tokenised documents on disk. `lengths`: tokens of each, `[documents]` int64."""

    def __init__(self, dataset: Any):
        import pyarrow.compute

        self._dataset = dataset
        lengths = pyarrow.compute.list_value_length(dataset.data.column("input_ids"))
        self.lengths = lengths.to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def piece(self, document: int, begin: int, end: int) -> Document:
        """Tokens `begin` to `end` of a document, read without touching the rest of it."""
        parts = [
            self._dataset.data.column(name)[document].values.slice(begin, end - begin).to_numpy(zero_copy_only=False)
            for name in self._dataset.column_names
        ]
        return Document(parts[0].astype(np.int64), *parts[1:])


def library() -> Any:
    """The module `datasets`, which takes a second to import. Raises ValueError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("recipes read their data through `datasets`: pip install 'spikelm[train]'.") from error
    return datasets


def value_digest(value: Any) -> float:
    """A number in [0, 1) that depends on the value alone: which side of a split a document falls on."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return int(digest(text)[:13], 16) / 16**13


def digest(*parts: str) -> str:
    """SHA-256 over texts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
