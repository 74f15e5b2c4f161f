"""Text that every Python carries: the reference topics of `help()`, one half to calibrate on, one to evaluate on.

The topics are split by a hash of their names. Some paragraphs stand in several topics; those of the first half are
left out of the second, so that nothing is measured on text that was calibrated on. The text differs a little between
versions of Python: whoever reports numbers names the version.
"""

import hashlib
from functools import cache
from pydoc_data.topics import topics


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
