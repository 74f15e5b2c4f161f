"""Byte n-gram models: what counting alone predicts, the least that a trained model must beat.

    p(c | h) = (count(h c) + T(h) p(c | h')) / (count(h) + T(h))

with h' the context h without its first byte and T(h) the number of different bytes seen after h (interpolated
Witten-Bell smoothing, Bell, Cleary and Witten 1990). The shortest context is empty, below it all bytes are alike.
"""

import numpy as np
from numpy.typing import NDArray

LONGEST = 8  # bytes that fill 64 bits


def bits_per_byte(train: bytes, test: bytes, order: int) -> float:
    """Mean of -log2 p over the bytes of `test`, by counts of `train`.

    Args:
        train: text to count. test: text to predict, each byte from those before it.
        order: n of the n-gram: its context is n - 1 bytes. 1 to 8.

    Raises:
        ValueError: an empty text or an order that does not fit.
    """
    if not train or not test:
        raise ValueError("An n-gram model needs text to count and text to predict; one of them is empty.")
    if not 1 <= order <= LONGEST:
        raise ValueError(f"order must lie between 1 and {LONGEST} bytes; got {order}.")
    p = np.full(len(test), 1 / 256)
    for n in range(1, min(order, len(test), len(train)) + 1):
        p[n - 1 :] = _refined(_grams(train, n), _grams(test, n), p[n - 1 :])
    return float(-np.log2(p).mean())


def _grams(text: bytes, length: int) -> NDArray[np.uint64]:
    """Every run of `length` bytes as one number."""
    symbols = np.frombuffer(text, np.uint8).astype(np.uint64)
    keys: NDArray[np.uint64] = np.zeros(len(text) - length + 1, np.uint64)
    for i in range(length):
        keys = (keys << np.uint64(8)) | symbols[i : len(symbols) - length + 1 + i]
    return keys


def _refined(seen: NDArray[np.uint64], asked: NDArray[np.uint64], shorter: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of the last bytes of `asked`, given those by the next shorter context."""
    grams, counts = np.unique(seen, return_counts=True)
    contexts, owner = np.unique(grams >> np.uint64(8), return_inverse=True)
    total, kinds = np.bincount(owner, weights=counts), np.bincount(owner)
    count = _look_up(grams, counts, asked)
    here = asked >> np.uint64(8)
    total, kinds = _look_up(contexts, total, here), _look_up(contexts, kinds, here)
    return np.where(total > 0, (count + kinds * shorter) / np.maximum(total + kinds, 1), shorter)


def _look_up(keys: NDArray[np.uint64], values: NDArray, asked: NDArray[np.uint64]) -> NDArray:
    """The value of each asked key, 0 where there is none; `keys` rise."""
    place = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
