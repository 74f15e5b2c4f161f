"""Text that every Python carries: the reference topics of `help()`, one half to calibrate on, one to evaluate on.

The topics are split by a hash of their names. Some paragraphs stand in several topics; those of the first half are
left out of the second, so that nothing is measured on text that was calibrated on. The text differs a little between
versions of Python: whoever reports numbers names the version.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pydoc_data.topics import topics
from typing import Any, TypeAlias

import torch
from torch import Tensor

Texts: TypeAlias = str | Tensor | Sequence[str | Tensor] | None


def tokenized(text: Texts, tokenizer: Any) -> tuple[Tensor, dict[str, str]]:
    """Ids `[N]` of a text, of ids, or of a list of either, one after the other; and what to record about them.

    Args:
        text: see above; None: `calibration_sample()`.
        tokenizer: turns text into ids; it may be None if there is no text.

    Raises:
        ValueError: a text without a tokenizer, or something else than text and integers.
    """
    name = "the text given"
    if text is None:
        text, name = calibration_sample(), "Python's built-in reference topics"
    parts = [text] if isinstance(text, (str, Tensor)) else list(text)
    digest, ids = hashlib.sha256(), []
    for part in parts:
        if isinstance(part, str):
            if tokenizer is None:
                raise ValueError("A text needs a tokenizer, and the source has none: give tokenizer= or token ids.")
            digest.update(part.encode())
            part = torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        elif isinstance(part, Tensor) and not part.is_floating_point():
            part = part.flatten().cpu()
            digest.update(part.numpy().tobytes())
        else:
            raise ValueError(f"A text must be a str or token ids [N]; got {type(part).__name__}.")
        ids.append(part)
    if parts and all(isinstance(part, Tensor) for part in parts):
        name = "the token ids given"
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64), {
        "text": name,
        "text_sha256": digest.hexdigest(),
    }


def calibration_sample() -> str:
    """About 240,000 characters of English documentation with code."""
    return "\n\n".join(_half(1))


def evaluation_sample() -> str:
    """About 150,000 characters of the same kind; no paragraph of it is in `calibration_sample`."""
    return "\n\n".join(_unseen())


@cache
def _unseen() -> tuple[str, ...]:
    seen = set(_paragraphs(_half(1)))
    kept = []
    for paragraph in _paragraphs(_half(0)):
        if paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    return tuple(kept)


@cache
def _half(which: int) -> tuple[str, ...]:
    def side(name: str) -> int:
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2

    return tuple(topics[name].strip() for name in sorted(topics) if side(name) == which)


def _paragraphs(texts: tuple[str, ...]) -> list[str]:
    return [paragraph for text in texts for part in text.split("\n\n") if (paragraph := part.strip("\n"))]
