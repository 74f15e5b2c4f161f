"""Named texts, cut into disjoint windows of tokens.

Every window is scored on its own: its first token has no context and is not predicted. A tokenizer that puts a
begin-of-text token before a text puts it before every window, because its model was trained to see one there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# No tokenizer of a published model needs more characters for a token on the average of a text.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Text:
    """A named text.

    Attributes:
        name: how the report calls it. content: the text itself. source: where it comes from, for the report.
    """

    name: str
    content: str
    source: str


@dataclass(frozen=True)
class TokenizedText:
    """What is left of a text once it is cut.

    Attributes:
        name, source: of the text.
        window: tokens of a window; the last one may be shorter.
        windows: `[tokens]` int64 each, disjoint, in order.
        text_bytes: for each window, the UTF-8 bytes of the tokens that are predicted.
    """

    name: str
    source: str
    window: int
    windows: list[Tensor]
    text_bytes: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that go through a model."""
        return sum(len(window) for window in self.windows)

    @property
    def predicted_tokens(self) -> int:
        """Tokens that are predicted: all but the first of every window."""
        return self.tokens - len(self.windows)


def read_text(path: str | Path, name: str | None = None) -> Text:
    """The text in a UTF-8 file; its name is the file's unless given.

    Raises:
        ValueError: no such file, not a text file, or empty.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"Text {str(path)!r}: {what}; give the path of a plain UTF-8 text file.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Text {str(path)!r} is not UTF-8 (byte {error.start}); give a plain text file, or convert it first."
        ) from None
    if "\0" in content:
        raise ValueError(f"Text {str(path)!r} holds zero bytes, so it is a binary file; give a plain UTF-8 text file.")
    if not content.strip():
        raise ValueError(f"Text {str(path)!r} is empty; give a plain UTF-8 text file.")
    return Text(name or path.stem, content, str(path))


def read_texts(paths: Iterable[str | Path]) -> list[Text]:
    """`read_text` of every path; files of the same name are told apart by a number.

    Raises:
        ValueError: as `read_text`.
    """
    texts: list[Text] = []
    for path in paths:
        text = read_text(path)
        taken = [t.name for t in texts]
        if text.name in taken:
            number = next(n for n in range(2, len(taken) + 3) if f"{text.name}-{n}" not in taken)
            text = read_text(path, f"{text.name}-{number}")
        texts.append(text)
    return texts


def tokenize(text: Text, tokenizer: Any, tokens: int, window: int = 512) -> TokenizedText:
    """Cut the first `tokens` tokens of a text into disjoint windows.

    Args:
        text: the text.
        tokenizer: a transformers tokenizer.
        tokens: how many tokens go through a model in total, begin-of-text tokens included.
        window: tokens of a window.

    Raises:
        ValueError: the text holds fewer tokens, or a size is out of range.
    """
    if window < 2 or tokens < 2:
        raise ValueError(f"window ({window}) and tokens ({tokens}) must be at least 2: one token predicts nothing.")
    sizes = [min(window, tokens - start) for start in range(0, tokens, window)]
    if sizes[-1] == 1:
        raise ValueError(f"{tokens} tokens leave a last window of one token, which predicts nothing; ask for one less.")
    prefix = _prefix(tokenizer)
    needed = tokens - len(prefix) * len(sizes)
    if min(sizes) <= len(prefix):
        raise ValueError(f"A window of {min(sizes)} tokens has no room beside the begin-of-text token; make it larger.")

    ids, ends = _encode(tokenizer, text.content[: _CHARACTERS_PER_TOKEN * needed])
    if len(ids) <= needed:
        ids, ends = _encode(tokenizer, text.content)
    if len(ids) < needed:
        raise ValueError(
            f"Text {text.name!r} ({text.source}) is too short: {len(ids)} tokens found, {needed} needed; give a longer "
            "text or ask for fewer tokens."
        )
    windows, text_bytes, start = [], [], 0
    for size in sizes:
        stop = start + size - len(prefix)
        windows.append(torch.tensor([*prefix, *ids[start:stop]]))
        begin = ends[start] if not prefix else (ends[start - 1] if start else 0)
        text_bytes.append(ends[stop - 1] - begin)
        start = stop
    return TokenizedText(text.name, text.source, window, windows, text_bytes)


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: usually nothing or one begin-of-text token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return list(full[:start])


def _encode(tokenizer: Any, content: str) -> tuple[list[int], list[int]]:
    """Token ids, and for each the UTF-8 bytes of the text up to its end."""
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        sizes = [len(tokenizer.decode([token]).encode()) for token in ids]
        return ids, torch.tensor(sizes).cumsum(0).tolist()
    coded = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    byte_at = [0]
    for character in content:
        byte_at.append(byte_at[-1] + len(character.encode("utf-8", "surrogatepass")))
    return coded["input_ids"], [byte_at[end] for _, end in coded["offset_mapping"]]


def spread(text: Text, tokenizer: Any, tokens: int, window: int = 512) -> list[Tensor]:
    """Windows `[window]` spread evenly over a whole text, about `tokens` in all, fewer if the text is short.

    For calibration, where variety counts more than an exact number.

    Raises:
        ValueError: the text does not fill one window.
    """
    ids, _ = _encode(tokenizer, text.content)
    prefix = _prefix(tokenizer)
    size = window - len(prefix)
    whole = len(ids) // size
    if whole == 0:
        raise ValueError(
            f"Text {text.name!r} ({text.source}) is too short to calibrate on: {len(ids)} tokens found, {size} needed; "
            "give a longer text."
        )
    taken = max(1, min(whole, tokens // window))
    starts = [i * whole // taken * size for i in range(taken)]
    return [torch.tensor([*prefix, *ids[start : start + size]]) for start in starts]
