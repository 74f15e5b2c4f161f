"""Parts of a run: how many held-out tokens a checkpoint is measured on."""

import dataclasses

import pytest

from spikelm.recipes.run import _spread
from spikelm.recipes.settings import Settings

SETTINGS = Settings(
    out="unused", data={"window": 8}, tokens=64, batch=1, micro_batch=1, checkpoints=64, tokenizer="bytes"
)


def measured_on(tokens):
    chosen = _spread(list(range(20)), dataclasses.replace(SETTINGS, heldout_tokens=tokens))
    return [chosen[i] for i in range(len(chosen))]


def test_held_out_windows_are_spread_over_all():
    assert measured_on(32) == [0, 6, 13, 19]
    assert measured_on(1) == [0]
    assert measured_on(None) == measured_on(20 * 8) == measured_on(10_000) == list(range(20))
    assert _spread(None, SETTINGS) is None


def test_held_out_tokens_are_a_number_of_tokens():
    with pytest.raises(ValueError, match="heldout_tokens must be at least 1; got 0"):
        dataclasses.replace(SETTINGS, heldout_tokens=0)
