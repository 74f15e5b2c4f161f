"""Byte n-grams against the smoothing formula written out."""

import math
from collections import Counter

import pytest

from spikelm.recipes.ngram import bits_per_byte

TRAIN, TEST = b"the cat sat on the mat; the cat ate", b"the rat sat\xff"


def probability(context, byte):
    """Interpolated Witten-Bell by dictionaries."""
    shorter = probability(context[1:], byte) if context else 1 / 256
    n = len(context)
    followers = Counter(TRAIN[i + n] for i in range(len(TRAIN) - n) if TRAIN[i : i + n] == context)
    if not followers:
        return shorter
    total, kinds = sum(followers.values()), len(followers)
    return (followers[byte] + kinds * shorter) / (total + kinds)


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_counts_follow_the_formula(order):
    bits = [-math.log2(probability(TEST[max(0, i - order + 1) : i], TEST[i])) for i in range(len(TEST))]
    assert bits_per_byte(TRAIN, TEST, order) == pytest.approx(sum(bits) / len(bits), abs=1e-12)


def test_probabilities_add_up():
    assert sum(probability(b"the ", byte) for byte in range(256)) == pytest.approx(1.0)


@pytest.mark.parametrize(("train", "test", "order"), [(b"", b"a", 2), (b"a", b"", 2), (b"a", b"a", 0), (b"a", b"a", 9)])
def test_wrong_arguments_are_refused(train, test, order):
    with pytest.raises(ValueError, match=r"empty|order must"):
        bits_per_byte(train, test, order)
